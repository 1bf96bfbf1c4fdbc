"""Reverse variances and the grids that go with them, against closed forms, minimisation and exhaustive search."""

import itertools
import math

import pytest
import torch
from exact_models import GaussianMixture

from vdm_diffusers.decoders import decode_pixels, encode_pixels
from vdm_diffusers.elbo import step_kl
from vdm_diffusers.evaluation import chain_log_snrs, estimate_optimal_variance, evaluate_likelihood
from vdm_diffusers.gaussian import posterior_coefficients
from vdm_diffusers.reverse_variance import (
    OptimalVariance,
    continuous_nats,
    expected_step_nats,
    forward_variance,
    learned_range_variance,
    optimal_grid,
    posterior_variance,
)
from vdm_diffusers.schedulers.scheduling_vdm import VDMScheduler


def gaussian_mse(log_snr, variance):
    """E|x - E[x|z]|^2 / D of N(mean, variance I): 1 / (1/variance + SNR)."""
    return 1 / (1 / variance + torch.exp(log_snr))


def table(variance=0.1, knots=400):
    log_snr = torch.linspace(-5.0, 13.3, knots, dtype=torch.float64)
    return OptimalVariance(log_snr, gaussian_mse(log_snr, variance))


def test_fixed_variances_are_ddpms():
    beta = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    log_snr = torch.log(alpha_bar / (1 - alpha_bar))
    torch.testing.assert_close(forward_variance(log_snr[:-1], log_snr[1:]), beta[1:], rtol=1e-9, atol=0)
    tilde = beta[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    torch.testing.assert_close(posterior_variance(log_snr[:-1], log_snr[1:]), tilde, rtol=1e-9, atol=0)
    assert float(forward_variance(math.inf, log_snr[0])) == pytest.approx(1e-4)
    fraction = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1)
    between = learned_range_variance(fraction, 1e-5, 1e-3).flatten()
    torch.testing.assert_close(between, torch.tensor([1e-5, 1e-4, 1e-3]))


def test_optimal_variance_minimises_the_step():
    optimal = table()
    s, t = torch.tensor(1.0, dtype=torch.float64), torch.tensor(-0.5, dtype=torch.float64)
    coefficients = posterior_coefficients(t, s)
    mse = optimal.at(t)
    at = lambda v: float(step_kl(7 * mse[None], coefficients.x, coefficients.variance, v, 7))  # noqa: E731
    best = optimal.variance(s, t)
    assert at(best) < min(at(best * 1.01), at(best * 0.99))
    assert at(best) == pytest.approx(7 * float(expected_step_nats(s, t, mse)), rel=1e-12)
    assert at(coefficients.variance) == pytest.approx(7 * float(expected_step_nats(s, t, mse, "posterior")), rel=1e-12)


def test_for_a_gaussian_the_optimal_variance_makes_every_grid_exact():
    """The true reverse transition of Gaussian data is Gaussian with just this variance: no step costs more than
    information.
    """
    optimal = OptimalVariance(
        *(lambda ell: (ell, gaussian_mse(ell, 0.1)))(torch.linspace(-5, 13.3, 7, dtype=torch.float64))
    )
    grid = optimal.log_snr.flip(0)
    nats = expected_step_nats(grid[:-1], grid[1:], optimal.at(grid[1:])).sum()
    exact = 0.5 * (math.log1p(0.1 * math.exp(13.3)) - math.log1p(0.1 * math.exp(-5)))
    assert float(nats) == pytest.approx(exact, rel=1e-12)
    assert continuous_nats(table(knots=4000), 13.3, -5.0) == pytest.approx(exact, rel=1e-4)


def test_interpolation_is_the_schedulers():
    config = {"log_snr": [3.0, -2.0, 0.0], "mse": [0.1, 0.9, 0.5]}
    optimal = OptimalVariance.from_config(config)
    s = VDMScheduler(beta_schedule="log_snr_linear", variance_type="optimal", optimal_variance=config)
    s.set_timesteps(50)
    log_snr = s.log_snr(s.timesteps)
    for i, t in enumerate(s.timesteps[:-1]):
        assert float(s._get_variance(t)) == pytest.approx(
            float(optimal.variance(log_snr[i + 1], log_snr[i])), rel=1e-6
        )
    assert optimal.to_config() == {"log_snr": [-2.0, 0.0, 3.0], "mse": [0.9, 0.5, 0.1]}
    assert optimal.at(torch.tensor([-math.inf, -1.0, 9.0])).tolist() == pytest.approx([0.9, 0.45**0.5, 0.1])


@pytest.mark.parametrize("variance", ["optimal", "posterior"])
def test_dynamic_programming_finds_what_exhaustive_search_finds(variance):
    mixture_mse = OptimalVariance(torch.tensor([-5.0, -1.0, 2.0, 13.3]), torch.tensor([0.3, 0.25, 0.02, 1e-6]))
    candidates = torch.linspace(13.3, -5.0, 12, dtype=torch.float64)

    def cost(grid):
        return float(expected_step_nats(grid[:-1], grid[1:], mixture_mse.at(grid[1:]), variance).sum())

    every = [candidates[[0, *inner, 11]] for inner in itertools.combinations(range(1, 11), 3)]
    best = min(every, key=cost)
    assert torch.equal(optimal_grid(mixture_mse, 4, candidates, variance=variance), best)
    assert torch.equal(optimal_grid(mixture_mse, 1, candidates), candidates[[0, -1]])
    with pytest.raises(ValueError, match=r"1..11"):
        optimal_grid(mixture_mse, 12, candidates)


def mixture():
    generator = torch.Generator().manual_seed(0)
    means = 0.5 * torch.randn(4, 1, 4, 4, generator=generator, dtype=torch.float64)
    data = GaussianMixture(means, torch.full((4,), 0.05**2).double(), torch.full((4,), 0.25).double())
    return data, decode_pixels(data.sample(64, generator))


@pytest.mark.parametrize("schedule", ["log_snr_linear", "linear"])
def test_measured_variance_travels_in_the_config_and_lowers_the_bound(schedule):
    data, levels = mixture()
    s = VDMScheduler(beta_schedule=schedule, clip_sample=False)
    model = data.as_model(s.log_snr)
    kwargs = {"progress_bar": False, "generator": torch.Generator().manual_seed(0)}
    # many evaluations: what is rare at high log SNR, the wrong component of the mixture, decides where the grid's
    # first step may begin
    measured = estimate_optimal_variance(model, levels, scheduler=s, num_samples=1024, **kwargs)
    assert len(measured["mse"]) == 64
    # the exact network's mse at a knot
    knot = measured["log_snr"][40]
    x = encode_pixels(levels, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    errors = []
    for _ in range(200):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        alpha, sigma = (1 + math.exp(-knot)) ** -0.5, (1 + math.exp(knot)) ** -0.5
        errors.append(((data.denoise(alpha * x + sigma * noise, knot) - x) ** 2).mean())
    assert measured["mse"][40] == pytest.approx(float(torch.stack(errors).mean()), rel=0.1)

    best = VDMScheduler.from_config(s.config, variance_type="optimal", optimal_variance=measured)
    kwargs |= {"method": "discrete", "num_steps": 25, "num_samples": 250}
    posterior = evaluate_likelihood(model, levels, scheduler=s, **kwargs)
    optimal = evaluate_likelihood(model, levels, scheduler=best, **kwargs)
    assert optimal.settings["reverse_variance"] == "optimal" and optimal.settings["num_steps"] == 25
    assert optimal.bits_per_dim < posterior.bits_per_dim - 5 * math.hypot(
        optimal.standard_error, posterior.standard_error
    )
    same_grid = evaluate_likelihood(model, levels, scheduler=best, grid="time", **kwargs)
    assert optimal.bits_per_dim < same_grid.bits_per_dim + 4 * math.hypot(
        optimal.standard_error, same_grid.standard_error
    )
    assert same_grid.bits_per_dim < posterior.bits_per_dim


def test_chains_of_every_grid():
    config = table().to_config()
    linear = VDMScheduler(variance_type="optimal", optimal_variance=config)
    vdm = VDMScheduler(beta_schedule="log_snr_cosine", variance_type="optimal", optimal_variance=config)
    entries = linear.log_snr(torch.arange(1000))
    for grid in ("time", "log_snr", "optimal", None):
        for steps in (2, 30, 700, 1000):
            chain = chain_log_snrs(linear, steps, grid)
            assert len(chain) == steps and bool((chain.diff() < 0).all()) and bool(torch.isin(chain, entries).all())
            assert chain[0] == entries[0] and chain[-1] == entries[-1]
        chain = chain_log_snrs(vdm, 30, grid)
        assert len(chain) == 31 and bool((chain.diff() < 0).all())
        assert (float(chain[0]), float(chain[-1])) == pytest.approx((13.3, -5.0), abs=1e-12)
    assert chain_log_snrs(vdm, None, [13.3, 2.0, -5.0]).tolist() == [13.3, 2.0, -5.0]
    for call, message in [
        (lambda: chain_log_snrs(vdm, 5, [13.3, 2.0, -5.0]), "disagree"),
        (lambda: chain_log_snrs(vdm, None, [13.0, -5.0]), "own ends"),
        (lambda: chain_log_snrs(vdm, 5, "cosine"), "`grid` must be"),
        (lambda: chain_log_snrs(VDMScheduler(), 5, "optimal"), "estimate_optimal_variance"),
        (lambda: OptimalVariance(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])), "distinct"),
        (lambda: OptimalVariance(torch.tensor([1.0]), torch.tensor([-1.0])), "not negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
