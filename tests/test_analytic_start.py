"""The analytic start: exact for Gaussian data and for single pixels, the same after saving, and learnt upon."""

import math

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from vdm_diffusers import (
    AnalyticStartModel,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
    evaluate_likelihood,
    fit_analytic_start,
)
from vdm_diffusers.decoders import level_values
from vdm_diffusers.gaussian import alpha_sigma
from vdm_diffusers.models.analytic_start import FULL_COVARIANCE, NoiseLevel, _LevelMean

ENDS = {"knots": (-1.0, 999.0), "log_snr": (13.3, -5.0)}


def inner(channels, out=2, **config):
    return VDMUNet2DModel(
        in_channels=3 * channels,
        out_channels=out * channels,
        hidden_channels=8,
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        fourier_exponents=(),
        residual_connection=False,
        dropout=0.0,
        **config,
    )


def timestep(log_snr):
    return 1000 * (13.3 - log_snr) / 18.3 - 1


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_of_gaussian_data_it_is_the_posterior_mean(path):
    """E[x | z] = mean + alpha C (alpha^2 C + sigma^2 I)^-1 (z - alpha mean), whatever C is."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(32, 32, generator=generator, dtype=torch.float64) / 6
    images = (torch.randn(4000, 32, generator=generator, dtype=torch.float64) @ factor + 0.3).reshape(-1, 2, 4, 4)
    model = fit_analytic_start(inner(2), images, num_levels=None, prediction_type="sample", path=path, **ENDS).double()
    start = model.start
    covariance = start.basis.double().T @ torch.diag(start.variance.double()) @ start.basis.double()
    z = torch.randn(5, 2, 4, 4, generator=generator, dtype=torch.float64)
    for log_snr in (9.0, 2.0, -4.0):
        alpha, sigma = (float(c) for c in alpha_sigma(log_snr, path))
        mean = start.mean.double().flatten()
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(32).double())
        expected = mean + (z.flatten(1) - alpha * mean) @ gain.T
        torch.testing.assert_close(model(z, timestep(log_snr)).sample.flatten(1), expected, atol=2e-5, rtol=0)


def test_the_spectrum_of_large_images_gives_the_variance_of_each_pixel():
    side = 24
    assert 3 * side * side > FULL_COVARIANCE
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(300, 3, side, side, generator=generator).cumsum(2).cumsum(3) / side
    start = fit_analytic_start(inner(3), images, num_levels=None, **ENDS).start
    eye = torch.eye(3 * side * side, dtype=torch.float64).reshape(-1, 3, side, side)
    matrix = torch.cat([start._transform(part).flatten(1) for part in eye.split(256)]).T  # coordinates of each pixel
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(eye)).double(), atol=1e-5, rtol=0)
    brute = (matrix**2).T @ start.variance.double().flatten()
    torch.testing.assert_close(start.spread(start.variance.double()).flatten(), brute, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_levels", "excluded"), [(2, None), (17, None), (256, None), (17, 0), (17, 16), (17, 5), (256, 0), (256, 128)]
)
def test_the_mean_over_levels_against_brute_force(num_levels, excluded):
    generator = torch.Generator().manual_seed(2)
    values = level_values(num_levels)
    log_frequencies = torch.randn(num_levels, generator=generator, dtype=torch.float64)
    m = (2.6 * torch.rand(50, generator=generator, dtype=torch.float64) - 1.3).requires_grad_()
    v = (torch.logspace(-6, 1, 50, dtype=torch.float64)).requires_grad_()
    kept = torch.arange(num_levels) != (-1 if excluded is None else excluded)
    logits = (log_frequencies - (values - m[:, None]) ** 2 / (2 * v[:, None]))[:, kept]
    mean, log_sum = torch.softmax(logits, dim=1) @ values[kept], logits.logsumexp(1)
    ours, our_sum = _LevelMean.apply(m, v, values, log_frequencies, excluded)
    torch.testing.assert_close(ours, mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(our_sum, log_sum, atol=1e-9, rtol=1e-12)
    for mine, brute in ((ours, mean), (our_sum, log_sum)):
        gradients = torch.autograd.grad(mine.sum(), (m, v), retain_graph=True)
        expected = torch.autograd.grad(brute.sum(), (m, v), retain_graph=True)
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-9, rtol=1e-8)


def background_images():
    """Integers 0..6, most of them 0."""
    generator = torch.Generator().manual_seed(3)
    ink = torch.rand(500, 1, 4, 4, generator=generator) < 0.3
    return ink * torch.randint(1, 7, (500, 1, 4, 4), generator=generator)


def test_the_odds_of_the_most_frequent_level_move_by_themselves():
    images = background_images()
    model = fit_analytic_start(inner(1, out=3), images, num_levels=7, prediction_type="sample", **ENDS)
    plain = fit_analytic_start(inner(1), images, num_levels=7, prediction_type="sample", **ENDS)
    assert model.config.spike_level == 0 and plain.config.spike_level is None
    z = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    for log_snr in (12.0, 3.0, -3.0):  # a new network moves nothing
        t = timestep(log_snr)
        torch.testing.assert_close(model(z, t).sample, plain(z, t).sample, atol=2e-6, rtol=0)
    nn.init.constant_(model.network.conv_out.bias[2:], 1.5)
    log_snr = torch.full((8,), 1.0)
    level = NoiseLevel.of(log_snr, "vp")
    mean, variance = model.start.cavity(z, level)
    precision = 1 / variance + level.snr
    m, v = ((mean / variance + level.slope * z) / precision)[..., None].double(), (1 / precision)[..., None].double()
    values = level_values(7)
    logits = model.start.log_frequencies.double() - (values - m) ** 2 / (2 * v)
    logits[..., 0] += 1.5
    expected = torch.softmax(logits, -1) @ values
    torch.testing.assert_close(model(z, timestep(1.0)).sample.double(), expected, atol=2e-5, rtol=0)


def test_with_independent_pixels_it_is_the_exact_denoiser():
    """Of a pixel that knows nothing of the others, E[x_i | z_i] is a sum over levels with their frequencies."""
    generator = torch.Generator().manual_seed(3)
    images = (torch.rand(20_000, 1, 3, 3, generator=generator) < 0.3).long() * 4 + torch.randint(
        0, 3, (20_000, 1, 3, 3), generator=generator
    )
    model = fit_analytic_start(inner(1), images, num_levels=7, prediction_type="sample", **ENDS)
    values = level_values(7)
    z = torch.randn(64, 1, 3, 3, generator=generator)
    frequency = images.flatten().bincount(minlength=7).double() / images.numel()
    for log_snr in (8.0, 4.0, 1.0):
        alpha, sigma = (float(c) for c in alpha_sigma(log_snr))
        logits = (frequency + 1e-12).log() - (z[..., None].double() - alpha * values) ** 2 / (2 * sigma**2)
        expected = torch.softmax(logits, -1) @ values
        error = (model(z, timestep(log_snr)).sample.double() - expected).abs().mean()
        assert error < 0.02, (log_snr, error)


def test_the_bound_of_gaussian_data_is_near_its_entropy_before_any_training():
    generator = torch.Generator().manual_seed(4)
    smooth = torch.randn(4000, 1, 6, 6, generator=generator).cumsum(2).cumsum(3) * 12 + 128
    images = smooth.round().clamp(0, 255).long()
    model = fit_analytic_start(inner(1), images, **ENDS).eval()
    pipe = VDMPipeline(model, VDMScheduler(beta_schedule="log_snr_linear", log_snr_max=13.3, log_snr_min=-5.0))
    report = evaluate_likelihood(pipe, images[:200], num_samples=8, progress_bar=False)
    flat = images.flatten(1).double()
    sign, log_det = torch.linalg.slogdet(torch.cov(flat.T))
    assert sign > 0
    entropy = 0.5 * (math.log(2 * math.pi * math.e) + float(log_det) / 36) / math.log(2)
    assert abs(report.bits_per_dim - entropy) < 0.1 + 3 * report.total_error, (report.bits_per_dim, entropy)


def test_saved_and_loaded_it_says_the_same_and_its_tables_are_never_rounded(tmp_path):
    images = torch.randint(0, 256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(5))
    model = fit_analytic_start(inner(1, num_class_embeds=4), images, **ENDS).eval()
    z, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 3])
    pipe = VDMPipeline(model, VDMScheduler(beta_schedule="log_snr_linear"))
    pipe.save_pretrained(tmp_path)
    again = VDMPipeline.from_pretrained(tmp_path).unet
    assert torch.equal(model(z, 100, class_labels=labels).sample, again(z, 100, class_labels=labels).sample)
    half = AnalyticStartModel.from_pretrained(tmp_path, subfolder="unet").to(torch.bfloat16)
    assert half.network.dtype == torch.bfloat16
    assert torch.equal(half.start.mean, model.start.mean)
    assert half(z, 100, class_labels=labels).sample.isfinite().all()


def test_a_diffusers_network_wears_it_and_gradients_reach_all_its_weights():
    images = torch.randint(0, 256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(6))
    config = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = UNet2DModel(in_channels=3, out_channels=2, **config, **blocks)
    model = fit_analytic_start(network, images, **ENDS)
    model(torch.randn(2, 1, 8, 8), torch.tensor([100, 700])).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network_class": "Linear"}, "network_class"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"knots": (0.0,)}, "equally many"),
        ({"in_channels": 2}, "in_channels"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    config = {"network_class": "VDMUNet2DModel", "network_config": dict(inner(1).config), "in_channels": 1}
    with pytest.raises(ValueError, match=message):
        AnalyticStartModel(**{**config, **change})


def test_another_size_is_refused():
    model = AnalyticStartModel("VDMUNet2DModel", dict(inner(1).config), in_channels=1, sample_size=8)
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\)"):
        model(torch.zeros(1, 1, 4, 4), 0)
