"""`classify` and `mutual_information`: closed forms for Gaussians, the digits model, errors, what is refused."""

import math

import pytest
import torch
from exact_models import GaussianMixture
from sklearn.datasets import load_digits

from vdm_diffusers import VDMPipeline, VDMUNet2DModel, classify, mutual_information
from vdm_diffusers.decoders import encode_pixels
from vdm_diffusers.schedulers import VDMScheduler

CARD = "model_cards/digits-class"


def scheduler(**kwargs):
    return VDMScheduler(beta_schedule="log_snr_linear", log_snr_max=13.3, log_snr_min=-8.0, **kwargs)


CLASSES = [
    GaussianMixture.gaussian(mean + torch.linspace(-0.2, 0.2, 12, dtype=torch.float64).reshape(1, 3, 4), 0.2**2)
    for mean in (-0.15, 0.0, 0.15)
]
EVERYTHING = GaussianMixture(
    torch.cat([c.means for c in CLASSES]), torch.full((3,), 0.2**2).double(), torch.full((3,), 1 / 3).double()
)


class Exact(torch.nn.Module):
    """The denoiser of each class, and of all of them for the label 3."""

    def __init__(self, s):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))  # says where it is
        self.models = [data.as_model(s.log_snr) for data in (*CLASSES, EVERYTHING)]

    def forward(self, sample, timestep, class_labels):
        out = torch.empty_like(sample)
        for k, model in enumerate(self.models):
            mine = class_labels == k
            if bool(mine.any()):
                out[mine] = model(sample[mine], timestep[mine])
        return out


def images(count=40, seed=0):
    labels = torch.arange(count) % 3
    generator = torch.Generator().manual_seed(seed)
    x = torch.stack([CLASSES[k].sample(1, generator)[0] for k in labels.tolist()])
    return ((x + 1) / 2 * 256).floor().clamp(0, 255).long(), labels


def exact_nats(levels):
    x = encode_pixels(levels, dtype=torch.float64)
    return torch.stack([data.nats(x) for data in CLASSES], 1)


def run(levels, **kwargs):
    s = scheduler()
    kwargs = {"generator": 0, "progress_bar": False, "class_labels": [0, 1, 2]} | kwargs
    return classify(Exact(s), levels, scheduler=s, **kwargs)


# --- truth -----------------------------------------------------------------------------------------------------------


def test_gaussian_classes_have_their_posterior():
    """The exact denoiser's bound is tight in continuous time, up to the noise of z_0 and what z_1 still holds."""
    levels, _ = images()
    report = run(levels, num_samples=256, drop_unlikely=False)
    expected = -exact_nats(levels)
    expected = expected - expected.max(1, keepdim=True).values
    close = expected > -6
    error = (report.log_odds - expected)[close].abs()
    assert float((error / (report.log_odds_error[close] + 0.05)).max()) < 4.5
    assert float((report.probabilities - torch.softmax(expected, 1)).abs().max()) < 0.2
    assert float((report.probabilities - torch.softmax(expected, 1)).abs().mean()) < 0.02


def test_the_prior_moves_the_log_odds_by_its_own():
    levels, _ = images(8)
    flat = run(levels, num_samples=16, drop_unlikely=False)
    tilted = run(levels, num_samples=16, drop_unlikely=False, prior=[1, 1, 20])
    apart = (tilted.log_odds[:, 2] - tilted.log_odds[:, 0]) - (flat.log_odds[:, 2] - flat.log_odds[:, 0])
    torch.testing.assert_close(apart, torch.full_like(apart, math.log(20)), atol=1e-9, rtol=0)


def test_the_errors_are_those_of_many_seeds():
    levels, _ = images(12)
    runs = [run(levels, num_samples=16, drop_unlikely=False, generator=seed) for seed in range(24)]
    pairs = torch.stack([r.log_odds[:, 1] - r.log_odds[:, 0] for r in runs])
    scatter = float(pairs.var(0).mean().sqrt())
    stated = float(torch.stack([r.log_odds_error.max(1).values for r in runs]).square().mean().sqrt())
    assert 0.5 * scatter < stated < 3 * scatter  # strata make the scatter smaller than independent evaluations would


def test_unlikely_classes_are_left_out_and_that_is_counted():
    levels, labels = images(30)
    far = [*CLASSES]
    kept, dropped = (run(levels, num_samples=32, drop_unlikely=word) for word in (False, True))
    assert bool((kept.num_evaluations == 32).all())
    assert dropped.num_model_evaluations <= kept.num_model_evaluations
    assert bool((dropped.num_evaluations[torch.arange(30), dropped.best] == 32).all())
    left = dropped.num_evaluations < 32
    assert bool((dropped.log_odds[left] < -5).all()) and len(far) == 3
    assert (dropped.best == kept.best).float().mean() >= 29 / 30 and len(labels) == 30


def test_mutual_information_of_a_mixture_is_the_closed_form():
    levels, labels = images(60)
    s = scheduler()
    report = mutual_information(
        Exact(s), levels, labels, without=3, scheduler=s, num_samples=64, generator=0, progress_bar=False
    )
    x = encode_pixels(levels, dtype=torch.float64)
    given = torch.stack([CLASSES[k].nats(x[i : i + 1])[0] for i, k in enumerate(labels.tolist())])
    expected = (EVERYTHING.nats(x) - given) / math.log(2)
    assert abs(report.mean - float(expected.mean())) < 4 * report.standard_error + 0.02
    assert float((report.bits - expected).abs().mean()) < 0.3
    assert 0 < report.mean < math.log2(3)


# --- the digits ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.from_numpy(data.images).long()[-100:, None], torch.from_numpy(data.target)[-100:]


def test_the_digits_model_classifies_digits(digits):
    levels, labels = digits
    pipe = VDMPipeline.from_pretrained(CARD)
    few = classify(pipe, levels, num_samples=8, generator=0, progress_bar=False)
    assert (few.best == labels).float().mean() >= 0.93
    assert few.classes == list(range(10)) and few.num_model_evaluations <= 100 * 10 * 8
    assert few.to_dict()["predictions"] == few.predictions and "100 images" in str(few)
    again = classify(pipe, levels, num_samples=8, generator=0, progress_bar=False, batch_size=37)
    torch.testing.assert_close(few.log_odds, again.log_odds, atol=1e-2, rtol=1e-3)


def test_a_digits_label_says_about_three_bits(digits):
    levels, labels = digits
    report = mutual_information(
        VDMPipeline.from_pretrained(CARD), levels[:50], labels[:50], generator=0, progress_bar=False
    )
    assert report.mean > 1.5 and report.standard_error < 0.5 and "bits an image" in str(report)


def test_one_evaluation_has_no_error():
    levels, _ = images(6)
    report = run(levels, num_samples=1)
    assert bool(report.log_odds_error[report.log_odds < 0].isnan().all())
    assert report.to_dict()["log_odds_error"][0].count(None) == 2


def test_a_table_of_betas_with_ddpms_decoder():
    levels, labels = images(24)
    s = VDMScheduler(clip_sample=False)
    report = classify(
        Exact(s),
        levels,
        [0, 1, 2],
        scheduler=s,
        num_samples=64,
        generator=0,
        progress_bar=False,
        pixel_encoding="bin_center",
    )
    expected = exact_nats(levels).argmin(1)
    assert (
        (report.best == expected).float().mean() > 0.8
        and (report.num_evaluations % 1 == 0).all()
        and len(labels) == 24
    )


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"class_labels": [1]}, "two or more different labels"),
        ({"class_labels": [1, 1]}, "two or more different labels"),
        ({"class_labels": [0, 9]}, r"must lie in 0\.\.5"),
        ({"prior": [1, 2]}, "5 positive numbers"),
        ({"prior": [1, 1, 1, 1, 0]}, "5 positive numbers"),
        ({"num_samples": 0}, "`num_samples` must be at least 1"),
        ({"method": "ode"}, "'continuous' or 'discrete'"),
    ],
)
def test_what_cannot_be_is_refused(options, complaint):
    unet = VDMUNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        hidden_channels=8,
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=5,
    )
    pipe = VDMPipeline(unet=unet, scheduler=scheduler(), num_levels=17)
    with pytest.raises(ValueError, match=complaint):
        classify(pipe, torch.zeros(2, 1, 8, 8, dtype=torch.long), generator=0, progress_bar=False, **options)


def test_a_network_without_classes_has_nothing_to_choose():
    unet = VDMUNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, hidden_channels=8, layers_per_block=1, norm_num_groups=4
    )
    pipe = VDMPipeline(unet=unet, scheduler=scheduler(), num_levels=17)
    picture = torch.zeros(2, 1, 8, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="no classes to choose among"):
        classify(pipe, picture)
    with pytest.raises(ValueError, match="no label for 'no class'"):
        mutual_information(pipe, picture, 0)
