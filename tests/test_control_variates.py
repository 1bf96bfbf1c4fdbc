"""The cheap denoisers that a network's loss is compared with: their expectations are exact, whatever the data are."""

import math

import mpmath
import pytest
import torch

from vdm_diffusers.control_variates import Controls, PixelDenoiser, Surrogate, WienerDenoiser, gauss_legendre
from vdm_diffusers.decoders import encode_pixels, level_values
from vdm_diffusers.gaussian import diffuse


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def pixel_denoiser(num_levels, encoding="bin_center", high=13.3, low=-5.0):
    counts = torch.arange(num_levels) ** 2 % 7 + torch.where(torch.arange(num_levels) == 0, 50, 0)
    return PixelDenoiser.fit(level_values(num_levels, encoding), counts, high, low), counts


@pytest.mark.parametrize(("num_levels", "log_snr"), [(17, 6.13), (17, -3.0), (2, 1.0), (5, 4.4), (256, 9.0)])
def test_denoiser_by_pixels_and_its_expected_loss_are_the_definitions(num_levels, log_snr):
    denoiser, counts = pixel_denoiser(num_levels)
    weight = [float(c) + 0.5 for c in counts] if num_levels <= 49 else [1.0] * num_levels
    values = [mpmath.mpf(float(v)) for v in level_values(num_levels)]
    snr = mpmath.exp(log_snr)

    def x_hat(y):
        near = [(w, v) for w, v in zip(weight, values, strict=True) if abs(v - y) * mpmath.sqrt(snr) < 16]
        near = near or list(zip(weight, values, strict=True))
        terms = [(w * mpmath.exp(-snr / 2 * (y - v) ** 2), v) for w, v in near]
        return mpmath.fsum(t * v for t, v in terms) / mpmath.fsum(t for t, _ in terms)

    with mpmath.workdps(20):
        for y in (-1.3, -0.41, 0.2, 0.987):
            found = denoiser.denoise(float64([y]), float64([log_snr]))
            # beyond 49 levels the window ends at six deviations of the noise, where e^-18 is left
            assert float(found) == pytest.approx(float(x_hat(mpmath.mpf(y))), abs=1e-7 if num_levels > 49 else 1e-12)
        step = min(0.25, 0.5 / (float(values[1] - values[0]) * float(mpmath.sqrt(snr))))
        for level in {0, num_levels // 2, num_levels - 1}:
            e = [i * step for i in range(-int(7 / step), int(7 / step) + 1)]
            expected = mpmath.fsum(
                step * mpmath.npdf(v) * (x_hat(values[level] + v / mpmath.sqrt(snr)) - values[level]) ** 2 for v in e
            )
            table = denoiser.expected_loss(float64([log_snr]))
            found = float(table[0, denoiser.kind(torch.tensor(level))])
            assert found == pytest.approx(float(expected), rel=2e-5)


def controls(num_levels, shape=(2, 5, 7), count=6):
    generator = torch.Generator().manual_seed(0)
    if num_levels is None:
        x = torch.randn(count, *shape, generator=generator)
        return Controls(WienerDenoiser.fit(x), None), x, x
    levels = (torch.rand(count, *shape, generator=generator) ** 2 * num_levels).long()
    x = encode_pixels(levels, num_levels)
    pixel = PixelDenoiser.fit(level_values(num_levels), levels.flatten().bincount(minlength=num_levels), 13.3, -5.0)
    return Controls(WienerDenoiser.fit(x), pixel), x, levels


@pytest.mark.parametrize("num_levels", [17, 256, None])
@pytest.mark.parametrize("log_snr", [-4.0, 6.2, 10.0])
def test_features_after_the_means_have_the_expectation_zero(num_levels, log_snr):
    """For one image, over its noise: z below 5."""
    cheap, x, levels = controls(num_levels)
    number = 4000
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(number, *x.shape[1:], generator=generator)
    ell = torch.full((number,), log_snr, dtype=torch.float64)
    x, levels = x[:1].expand(number, *x.shape[1:]), levels[:1].expand(number, *x.shape[1:])
    features = cheap.features(x, levels, noise, diffuse(x, noise, ell), ell)
    assert features.shape == (cheap.num_features, number)
    means, centered = features[: cheap.num_means], features[cheap.num_means :]
    assert bool((means == means[:, :1]).all())  # they do not depend on the noise
    z = centered.mean(1) / (centered.std(1) / math.sqrt(number) + 1e-9 * means[1, 0])
    assert float(z.abs().max()) < 5


@pytest.mark.parametrize("num_levels", [17, 256, None])
def test_known_sums_are_those_of_the_features(num_levels):
    cheap, x, levels = controls(num_levels)
    log_snr, weight = gauss_legendre(torch.linspace(-5, 13.3, 9, dtype=torch.float64))
    weight = weight[:, None] * torch.rand(len(weight), cheap.num_means, generator=torch.Generator().manual_seed(2))
    total = torch.zeros(len(x), dtype=torch.float64)
    for ell, w in zip(log_snr, weight, strict=True):
        at = ell.expand(len(x))
        noise = torch.zeros_like(x)
        features = cheap.features(x, levels, noise, diffuse(x, noise, at), at)
        total += w @ features[: cheap.num_means]
    torch.testing.assert_close(cheap.known_sum(x, levels, log_snr, weight), total, rtol=1e-5, atol=1e-5)


def test_zero_terminal_snr_and_large_signals_are_finite():
    cheap, x, levels = controls(256)
    ell = torch.tensor([-math.inf, -60.0, -20.0, 13.3, 40.0, 6.0], dtype=torch.float64)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    assert bool(cheap.features(x, levels, noise, diffuse(x, noise, ell), ell).isfinite().all())


def test_a_feature_that_vanishes_has_no_large_coefficient():
    """The pixels' loss falls double exponentially with log SNR. A coefficient of 1e5 that fits noise where it is 1e-6
    is a spike at the next knot, which hardly an evaluation sees: estimates were off by tens of their standard errors.
    """
    cheap, x, levels = controls(17, count=48)
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(48).repeat(28)
    log_snr = -5 + 18.3 * torch.rand(len(image), generator=generator, dtype=torch.float64)
    noise = torch.randn(x[image].shape, generator=generator)
    z_t = diffuse(x[image], noise, log_snr)
    features = cheap.features(x[image], levels[image], noise, z_t, log_snr).T
    errors = torch.randn(2, len(image), generator=generator, dtype=torch.float64)
    pixels, rest = features[:, 2] * (1 + 0.1 * errors[0]), 10 * torch.exp((log_snr - 13.3) / 2) * (1 + 0.3 * errors[1])
    knots = torch.linspace(-5, 13.3, 18, dtype=torch.float64)
    surrogate = Surrogate.fit(knots, log_snr, features, pixels + rest, torch.ones_like(log_snr))
    found = surrogate.coefficients[:, 2]
    assert float(found.abs().max()) < 5
    assert float((found[(knots > 0) & (knots < 6)] - 1).abs().max()) < 0.6  # where it matters it is right
