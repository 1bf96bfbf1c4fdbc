"""`compare_likelihood`: the truth for Gaussians, exactness, errors, what is shared and what is refused."""

import math

import pytest
import torch
from exact_models import GaussianMixture

from vdm_diffusers import VariationalAutoencoder, VDMPipeline, VDMUNet2DModel, compare_likelihood, evaluate_likelihood
from vdm_diffusers.decoders import encode_pixels
from vdm_diffusers.schedulers import VDMScheduler

SCALE = 12 * math.log(2)


def scheduler(high=13.3, low=-5.0, **kwargs):
    return VDMScheduler(beta_schedule="log_snr_linear", log_snr_max=high, log_snr_min=low, **kwargs)


def gaussian(offset, variance):
    return GaussianMixture.gaussian(
        offset + torch.linspace(-0.3, 0.3, 12, dtype=torch.float64).reshape(1, 3, 4), variance
    )


TRUE, OTHER = gaussian(0.0, 0.2**2), gaussian(0.05, 0.25**2)


def images(count=64):
    x = TRUE.sample(count, torch.Generator().manual_seed(0))
    return ((x + 1) / 2 * 256).floor().clamp(0, 255).long()


def gaussian_kl_to_marginal(x, data, log_snr):
    """KL(q(z_t | x) || p(z_t)) of p(x) = N(mean, v I): (B,)."""
    a, s = 1 / (1 + math.exp(-log_snr)), 1 / (1 + math.exp(log_snr))
    total = a * float(data.variances) + s
    return (0.5 * (math.log(total / s) - 1 + (a * (x - data.means) ** 2 + s) / total)).flatten(1).sum(1)


def exact_diffusion(levels, data, high=13.3, low=-5.0):
    x = encode_pixels(levels, dtype=torch.float64)
    return gaussian_kl_to_marginal(x, data, high) - gaussian_kl_to_marginal(x, data, low)


def compare(first, second, levels, schedulers=None, **kwargs):
    s, t = schedulers or (scheduler(), scheduler())
    kwargs = {"generator": 0, "progress_bar": False} | kwargs
    return compare_likelihood(
        first.as_model(s.log_snr),
        second.as_model(t.log_snr),
        levels,
        a_options={"scheduler": s},
        b_options={"scheduler": t},
        **kwargs,
    )


# --- truth -----------------------------------------------------------------------------------------------------------


def test_two_gaussians_differ_by_the_closed_form():
    levels = images()
    report = compare(TRUE, OTHER, levels)
    expected = exact_diffusion(levels, TRUE) - exact_diffusion(levels, OTHER)
    assert report.is_paired and report.difference < 0
    assert abs(report.difference - float(expected.mean()) / SCALE) < 4 * report.standard_error < 0.05
    assert report.share_better > 0.5
    z = (report.diffusion - expected) / (report.standard_error * SCALE * 8)
    assert float(z.square().mean()) == pytest.approx(1, abs=0.8)
    assert torch.equal(report.prior, torch.zeros(64)) and torch.equal(report.reconstruction, torch.zeros(64))


def test_the_bands_add_up_to_the_difference():
    levels = images()
    report = compare(TRUE, OTHER, levels, num_samples=64, variance_reduction=False)
    total = sum(band["difference"] for band in report.bands)
    assert total == pytest.approx(float(report.diffusion.mean()) / SCALE, abs=1e-12)
    for band in report.bands[1:-1]:
        low, high = band["log_snr_low"], band["log_snr_high"]
        expected = float((exact_diffusion(levels, TRUE, high, low) - exact_diffusion(levels, OTHER, high, low)).mean())
        assert abs(band["difference"] - expected / SCALE) < 5 * band["standard_error"] + 1e-9


def test_a_model_against_itself_is_exactly_zero_and_the_sign_turns_with_the_order():
    levels = images(16)
    same = compare(TRUE, TRUE, levels)
    assert same.difference == 0 and same.standard_error == 0 and same.share_better == 0.5
    forth, back = compare(TRUE, OTHER, levels), compare(OTHER, TRUE, levels)
    assert forth.difference == pytest.approx(-back.difference, rel=1e-9)
    assert forth.standard_error == pytest.approx(back.standard_error, rel=1e-9)
    assert forth.share_better == pytest.approx(1 - back.share_better)


def test_it_is_the_difference_of_two_reports_with_a_smaller_error():
    levels = images()
    s = scheduler()
    paired = compare(TRUE, OTHER, levels, num_samples=16, variance_reduction=False)
    reports = [
        evaluate_likelihood(
            data.as_model(s.log_snr), levels, scheduler=s, generator=seed, progress_bar=False, variance_reduction=False
        )
        for seed, data in enumerate((TRUE, OTHER))
    ]
    error = math.hypot(*(r.standard_error for r in reports))
    apart = reports[0].bits_per_dim - reports[1].bits_per_dim
    assert abs(paired.difference - apart) < 4 * math.hypot(error, paired.standard_error)
    assert paired.standard_error < error / 2


@pytest.mark.slow
def test_z_scores_over_300_seeds_have_variance_one():
    levels = images(64)
    expected = float((exact_diffusion(levels, TRUE) - exact_diffusion(levels, OTHER)).mean()) / SCALE
    z = []
    for seed in range(300):
        report = compare(TRUE, OTHER, levels, generator=seed)
        z.append((report.difference - expected) / report.standard_error)
    z = torch.tensor(z)
    assert float(z.square().mean()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("ends", [(13.3, -5.0, 11.0, -4.0), (11.0, -6.0, 13.3, -5.0)])
def test_schedules_with_other_ends_count_each_within_its_own(ends):
    levels = images()
    s, t = scheduler(*ends[:2]), scheduler(*ends[2:])
    report = compare(TRUE, TRUE, levels, schedulers=(s, t), num_samples=64)
    expected = exact_diffusion(levels, TRUE, *ends[:2]) - exact_diffusion(levels, TRUE, *ends[2:])
    assert abs(float((report.diffusion - expected).mean()) / SCALE) < 4 * report.standard_error
    single = [
        evaluate_likelihood(TRUE.as_model(x.log_snr), levels, scheduler=x, generator=0, progress_bar=False)
        for x in (s, t)
    ]
    for term in ("prior", "reconstruction"):
        assert torch.allclose(getattr(report, term), getattr(single[0], term) - getattr(single[1], term), atol=1e-9)


def test_a_table_with_ddpms_decoder_beside_a_log_snr_schedule():
    levels = images()
    table = VDMScheduler(clip_sample=False)
    s = scheduler()
    report = compare(TRUE, OTHER, levels, schedulers=(s, table), method="continuous", num_samples=128)
    single = [
        evaluate_likelihood(
            data.as_model(x.log_snr),
            levels,
            scheduler=x,
            method="continuous",
            generator=7,
            progress_bar=False,
            num_samples=128,
        )
        for data, x in ((TRUE, s), (OTHER, table))
    ]
    apart = single[0].bits_per_dim - single[1].bits_per_dim
    error = math.hypot(report.standard_error, *(r.standard_error for r in single))
    assert report.is_paired and abs(report.difference - apart) < 4 * error < 0.2


# --- chains ----------------------------------------------------------------------------------------------------------


def test_chains_of_the_same_steps_are_paired_whatever_their_variances():
    levels = images(32)
    s = scheduler()
    report = compare(TRUE, OTHER, levels, method="discrete", num_steps=10, num_samples=64)
    reports = [
        evaluate_likelihood(
            data.as_model(s.log_snr),
            levels,
            scheduler=s,
            method="discrete",
            num_steps=10,
            generator=5,
            progress_bar=False,
            num_samples=64,
        )
        for data in (TRUE, OTHER)
    ]
    error = math.hypot(report.standard_error, *(r.standard_error for r in reports))
    assert (
        report.is_paired and abs(report.difference - (reports[0].bits_per_dim - reports[1].bits_per_dim)) < 4 * error
    )
    wide = scheduler(variance_type="fixed_large")
    mixed = compare(TRUE, TRUE, levels, schedulers=(wide, s), method="discrete", num_steps=10, num_samples=64)
    bounds = [
        evaluate_likelihood(
            TRUE.as_model(x.log_snr),
            levels,
            scheduler=x,
            method="discrete",
            num_steps=10,
            generator=5,
            progress_bar=False,
            num_samples=64,
        )
        for x in (wide, s)
    ]
    error = math.hypot(mixed.standard_error, *(r.standard_error for r in bounds))
    assert mixed.is_paired and abs(mixed.difference - (bounds[0].bits_per_dim - bounds[1].bits_per_dim)) < 4 * error


def test_chains_of_other_steps_are_subtracted_and_that_is_said():
    levels = images(16)
    s, t = scheduler(num_train_timesteps=20), scheduler(num_train_timesteps=10)
    report = compare(TRUE, TRUE, levels, schedulers=(s, t), method="discrete")
    assert not report.is_paired and report.settings["not_paired"] == "the chains have 20 and 10 steps"
    assert report.difference < 0 and "not paired" in str(report)  # more steps, a tighter bound


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    unet = VDMUNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        hidden_channels=8,
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=5,
    )
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    torch.nn.init.normal_(unet.class_embedding.weight)
    for block in unet.down_blocks:
        torch.nn.init.normal_(block.time_emb_proj.weight, std=0.3)
        torch.nn.init.normal_(block.conv2.weight, std=0.1)
    return VDMPipeline(unet=unet, scheduler=scheduler(), num_levels=17)


SMALL = torch.randint(0, 17, (6, 1, 8, 8), generator=torch.Generator().manual_seed(3))


def test_one_network_with_two_labels(pipe):
    report = compare_likelihood(
        pipe,
        pipe,
        SMALL,
        a_options={"class_labels": 1},
        b_options={"class_labels": 2},
        generator=0,
        progress_bar=False,
    )
    assert report.is_paired and report.difference != 0
    same = compare_likelihood(pipe, pipe, SMALL, class_labels=1, generator=0, progress_bar=False)
    assert same.difference == 0


def test_checkpoints_are_loaded_from_their_folders(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "a")
    report = compare_likelihood(
        tmp_path / "a", str(tmp_path / "a"), SMALL, class_labels=0, generator=0, progress_bar=False
    )
    assert report.difference == 0 and report.num_model_evaluations == 2 * 6 * 16


def test_an_interrupted_comparison_goes_on(pipe, tmp_path):
    def run():
        return compare_likelihood(
            pipe,
            pipe,
            SMALL,
            a_options={"class_labels": 1},
            b_options={"class_labels": 2},
            resume_dir=tmp_path,
            progress_bar=False,
        )

    first = run()
    forward = type(pipe.unet).forward
    try:
        type(pipe.unet).forward = None  # nothing is evaluated again
        second = run()
    finally:
        type(pipe.unet).forward = forward
    assert torch.equal(first.nats, second.nats)


def test_a_target_is_reached(pipe):
    plain = compare_likelihood(
        pipe,
        pipe,
        SMALL,
        a_options={"class_labels": 1},
        b_options={"class_labels": 2},
        generator=0,
        progress_bar=False,
    )
    report = compare_likelihood(
        pipe, pipe, SMALL, a_options={"class_labels": 1}, b_options={"class_labels": 2}, generator=0, progress_bar=False,
        target_standard_error=plain.standard_error / 3,
    )  # fmt: skip
    assert report.standard_error < plain.standard_error / 2
    assert report.num_model_evaluations > 4 * plain.num_model_evaluations


def test_batches_of_a_loader_are_read_once(pipe):
    whole = compare_likelihood(
        pipe,
        pipe,
        SMALL,
        a_options={"class_labels": 1},
        b_options={"class_labels": 2},
        generator=0,
        progress_bar=False,
    )
    parts = compare_likelihood(
        pipe,
        pipe,
        iter(SMALL.split(2)),
        a_options={"class_labels": 1},
        b_options={"class_labels": 2},
        generator=0,
        progress_bar=False,
    )
    assert torch.equal(whole.nats, parts.nats)


def test_a_vae_is_compared_by_its_own_figure(pipe):
    torch.manual_seed(0)
    vae = VariationalAutoencoder(
        sample_size=8, in_channels=1, block_out_channels=(4, 4), latent_channels=1, num_levels=17, norm_num_groups=2
    )
    report = compare_likelihood(vae, pipe, SMALL, b_options={"class_labels": 0}, generator=0, progress_bar=False)
    assert not report.is_paired and "VariationalAutoencoder" in report.settings["not_paired"]
    assert report.bands == [] and math.isfinite(report.difference)


def test_the_report_as_json(pipe):
    report = compare_likelihood(pipe, pipe, SMALL, class_labels=1, generator=0, progress_bar=False)
    summary = report.to_dict(per_image=True)
    assert summary["per_image"]["nats"] == [0.0] * 6 and summary["is_paired"] and summary["difference"] == 0
    assert report.total_error == 0 and summary["settings"]["a"]["num_levels"] == 17


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"a_options": {"labels": 1}}, "`a_options` holds 'labels'"),
        ({"tolerance": 1e-3}, "`options` holds 'tolerance'"),
        ({"method": "ode", "class_labels": 1}, "no terms that two models could share"),
        ({"class_labels": 9}, "class_labels"),
        ({"num_samples": 1, "class_labels": 1}, "`num_samples` must be at least 2"),
        ({"max_model_evaluations": 10, "class_labels": 1}, "2 x 16 x 6"),
    ],
)
def test_what_cannot_be_is_refused(pipe, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        compare_likelihood(pipe, pipe, SMALL, generator=0, progress_bar=False, **options)


def test_models_of_other_levels_are_refused(pipe):
    other = VDMPipeline(unet=pipe.unet, scheduler=scheduler(), num_levels=32)
    with pytest.raises(ValueError, match="17 and 32 levels"):
        compare_likelihood(pipe, other, SMALL, class_labels=1, generator=0, progress_bar=False)
