"""The bound of a learned variance and the hybrid loss, against KL divergences and masses written out by hand."""

import math

import pytest
import torch
from exact_models import GaussianMixture

from vdm_diffusers.decoders import decode_pixels, encode_pixels
from vdm_diffusers.gaussian import diffuse, posterior
from vdm_diffusers.learned_variance import decoder_bound, hybrid_loss, split_variance, variance_bound
from vdm_diffusers.noise_schedules import log_snr_from_betas, make_betas
from vdm_diffusers.prediction import PREDICTION_TYPES, convert, prediction_target

SHAPE = (5, 2, 3, 7)


def setting(prediction_type="epsilon", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, noise = (
        torch.rand(SHAPE, generator=generator).double() * 2 - 1,
        torch.randn(SHAPE, generator=generator).double(),
    )
    log_snr_t = torch.tensor([8.0, 2.0, 0.3, -1.0, -7.0], dtype=torch.float64)
    log_snr_s = log_snr_t + torch.tensor([0.9, 0.01, 3.0, 0.2, 1e-4], dtype=torch.float64)
    target = prediction_target(x, noise, log_snr_t, prediction_type)
    prediction = target + 0.3 * torch.randn(SHAPE, generator=generator).double()
    fraction = 2 * torch.rand(SHAPE, generator=generator).double() - 1
    output = torch.cat([prediction, fraction], dim=1).to(dtype)
    return output, x.to(dtype), noise.to(dtype), log_snr_s, log_snr_t


def by_hand(output, x, noise, log_snr_s, log_snr_t, prediction_type, variance_type):
    """sum KL(N(m1, v1) || N(m2, v2)) by torch.distributions."""
    z_t = diffuse(x, noise, log_snr_t)
    prediction, channels = output.chunk(2, dim=1)
    x_hat = convert(prediction, z_t, log_snr_t, source=prediction_type, target="sample")
    mean_q, variance_q = posterior(z_t, x, log_snr_t, log_snr_s)
    mean_p, _ = posterior(z_t, x_hat, log_snr_t, log_snr_s)
    variance_q = variance_q.reshape(-1, 1, 1, 1)
    forward = (torch.sigmoid(-log_snr_t) * -torch.expm1(log_snr_t - log_snr_s)).reshape(-1, 1, 1, 1)
    v = (channels + 1) / 2
    log_variance = channels if variance_type == "learned" else v * forward.log() + (1 - v) * variance_q.log()
    q = torch.distributions.Normal(mean_q, variance_q.sqrt())
    p = torch.distributions.Normal(mean_p, (log_variance / 2).exp())
    return torch.distributions.kl_divergence(q, p).flatten(1).sum(1)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_bound_is_the_steps_divergence(prediction_type, variance_type):
    output, x, noise, log_snr_s, log_snr_t = setting(prediction_type)
    options = {"prediction_type": prediction_type, "variance_type": variance_type}
    expected = by_hand(output, x, noise, log_snr_s, log_snr_t, **options)
    bound = variance_bound(output, x, noise, log_snr_s, log_snr_t, **options)
    torch.testing.assert_close(bound, expected, rtol=1e-9, atol=1e-9)
    single = variance_bound(output.float(), x.float(), noise.float(), log_snr_s, log_snr_t, **options)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=2e-4, atol=1e-4)


def test_the_prediction_learns_nothing_from_the_bound():
    output, x, noise, log_snr_s, log_snr_t = setting()
    output.requires_grad_()
    variance_bound(output, x, noise, log_snr_s, log_snr_t, prediction_type="epsilon").sum().backward()
    prediction, channels = output.grad.chunk(2, dim=1)
    assert float(prediction.abs().max()) == 0 and bool((channels != 0).all())


def test_its_minimum_is_the_optimal_variance():
    # For one Gaussian the error of the exact network is the same everywhere: x - x_hat ~ N(0, e), and the best
    # variance is the posterior's + c_x^2 e. The averaged bound has its minimum there.
    generator = torch.Generator().manual_seed(1)
    model = GaussianMixture.gaussian(torch.zeros(1, 40, 50), 0.3)
    s, t = torch.tensor(1.0).double(), torch.tensor(-0.5).double()
    x = model.sample(100, generator)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    z_t = diffuse(x, noise, t)
    eps_hat = model.predict(z_t, t, "epsilon")
    alpha_square, sigma_square = torch.sigmoid(t), torch.sigmoid(-t)
    error = 0.3 * sigma_square / (0.3 * alpha_square + sigma_square)
    c = -torch.expm1(t - s)
    best = torch.sigmoid(-s) * c + torch.sigmoid(s) * c**2 * error
    log_variance = best.log().clone().requires_grad_()

    def bound(log_variance):
        output = torch.cat([eps_hat, log_variance.expand_as(eps_hat)], dim=1)
        return variance_bound(output, x, noise, s, t, prediction_type="epsilon", variance_type="learned").mean() / (
            40 * 50
        )

    bound(log_variance).backward()
    # d KL / d ln variance = 1/2 (1 - best / variance): 200000 squares of normals put the minimum within 5 sqrt(2 / N)
    assert abs(float(log_variance.grad)) < 0.5 * 5 * math.sqrt(2 / 2e5)
    assert bound(log_variance + 0.1) > bound(log_variance) < bound(log_variance - 0.1)


def test_decoder_bound_is_the_mass_of_the_bins():
    log_snr = log_snr_from_betas(make_betas("linear", 1000))
    generator = torch.Generator().manual_seed(2)
    levels = torch.randint(0, 256, SHAPE, generator=generator)
    levels[0, 0, 0, :2] = torch.tensor([0, 255])
    x = encode_pixels(levels, 256, "endpoint", torch.float64)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    fraction = 2 * torch.rand(SHAPE, generator=generator, dtype=torch.float64) - 1
    x_1 = diffuse(x, noise, log_snr[0])
    x_hat = x + 0.004 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    output = torch.cat([x_hat, fraction], dim=1).requires_grad_()
    bound = decoder_bound(output, x, noise, levels, log_snr[0], log_snr[1], prediction_type="sample")
    beta = make_betas("linear", 1000)
    alpha_bar = torch.cumprod(1 - beta, 0)
    low = beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1])
    deviation = (0.5 * ((fraction + 1) / 2 * beta[0].log() + (1 - fraction) / 2 * low.log())).exp()
    normal = torch.distributions.Normal(x_hat, deviation)
    upper = torch.where(levels == 255, 1.0, normal.cdf(x + 1 / 255))
    lower = torch.where(levels == 0, 0.0, normal.cdf(x - 1 / 255))
    torch.testing.assert_close(bound, -(upper - lower).log().flatten(1).sum(1), rtol=1e-8, atol=1e-8)
    bound.sum().backward()
    assert float(output.grad[:, :2].abs().max()) == 0 < float(output.grad[:, 2:].abs().max())
    assert torch.equal(decode_pixels(x, 256, "endpoint"), levels) and x_1.shape == x.shape


def test_hybrid_loss_trains_the_two_halves_apart():
    output, x, noise, log_snr_s, log_snr_t = setting()
    output.requires_grad_()
    bound = variance_bound(output, x, noise, log_snr_s, log_snr_t, prediction_type="epsilon")
    loss = hybrid_loss(output, x, noise, log_snr_t, bound, 1000, prediction_type="epsilon")
    simple = ((output[:, :2] - noise) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss, simple + bound / (42 * math.log(2)), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), output, retain_graph=True)
    (from_simple,) = torch.autograd.grad(simple.sum(), output, retain_graph=True)
    (from_bound,) = torch.autograd.grad(bound.sum(), output)
    torch.testing.assert_close(gradient[:, :2], from_simple[:, :2], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[:, 2:], from_bound[:, 2:] / (42 * math.log(2)), rtol=1e-9, atol=1e-18)


def test_invalid_arguments_are_named():
    output, x, noise, log_snr_s, log_snr_t = setting()
    with pytest.raises(ValueError, match="out_channels=4"):
        split_variance(x, 2)
    with pytest.raises(ValueError, match="variance_type"):
        variance_bound(output, x, noise, log_snr_s, log_snr_t, prediction_type="epsilon", variance_type="fixed_small")
    with pytest.raises(ValueError, match="s must come before t"):
        variance_bound(output, x, noise, log_snr_t, log_snr_s, prediction_type="epsilon")
