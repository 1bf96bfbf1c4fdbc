"""Tweedie's formula, its covariance, Langevin steps and predictor-corrector sampling, against distributions known
exactly.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from vdm_diffusers.elbo import continuous_weight, discrete_weight
from vdm_diffusers.gaussian import alpha_sigma, diffuse, posterior_coefficients
from vdm_diffusers.noise_schedules import LinearLogSNRSchedule
from vdm_diffusers.objectives import diffusion_loss
from vdm_diffusers.prediction import convert
from vdm_diffusers.score import (
    corrector_step_size,
    langevin_step,
    predictor_corrector,
    tweedie_covariance,
    tweedie_covariance_product,
    tweedie_mean,
)
from vdm_diffusers.time_sampling import low_discrepancy

PATHS = ("vp", "ve", "flow")


def mixture(path="vp", means=((1.0, -2.0, 0.5), (-1.0, 0.0, 1.5), (0.3, 1.0, -1.0)), variance=0.2):
    """ln q(z_t) of equally likely normals of one variance, in three dimensions."""
    means = torch.tensor(means, dtype=torch.float64)

    def log_density(z, log_snr):
        alpha, sigma = alpha_sigma(log_snr, path)
        v = alpha**2 * variance + sigma**2
        square = ((z.reshape(-1, 1, 3) - alpha * means) ** 2).sum(-1)
        return torch.logsumexp(-square / (2 * v), 1) - 1.5 * torch.log(2 * math.pi * v) - math.log(len(means))

    def score(z, log_snr):
        if not z.requires_grad:
            z = z.detach().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(log_density(z, log_snr).sum(), z, create_graph=True)
        return grad

    def moments(z, log_snr):
        """E[x | z], Cov[x | z] by Bayes' rule, component by component."""
        alpha, sigma = alpha_sigma(log_snr, path)
        v = alpha**2 * variance + sigma**2
        weight = torch.softmax(-((z[:, None] - alpha * means) ** 2).sum(-1) / (2 * v), 1)
        centre = means + alpha * variance / v * (z[:, None] - alpha * means)
        mean = (weight[..., None] * centre).sum(1)
        deviation = centre - mean[:, None]
        between = torch.einsum("bk,bki,bkj->bij", weight, deviation, deviation)
        return mean, between + variance * sigma**2 / v * torch.eye(3, dtype=torch.float64)

    return score, moments, means


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("log_snr", [-4.0, 0.3, 6.0])
def test_tweedie_gives_the_moments_of_bayes_rule(path, log_snr):
    score, moments, _ = mixture(path)
    z = torch.randn(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean, covariance = moments(z, log_snr)
    level = torch.tensor(log_snr, dtype=torch.float64)
    scores = score(z, level).detach()
    torch.testing.assert_close(tweedie_mean(z, scores, log_snr, path=path), mean, rtol=1e-11, atol=1e-11)
    actual = tweedie_covariance(score, z, log_snr, path=path)
    torch.testing.assert_close(actual, covariance, rtol=1e-9, atol=1e-10)
    vector = torch.randn(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    product = tweedie_covariance_product(score, z, log_snr, vector, path=path)
    torch.testing.assert_close(product, torch.einsum("bij,bj->bi", covariance, vector), rtol=1e-9, atol=1e-10)


def test_covariance_of_images_has_one_matrix_for_each():
    # one Gaussian N(0, 2 I): Cov[x | z] = 2 sigma^2 / (2 alpha^2 + sigma^2) I, whatever the shape
    z = torch.randn(5, 2, 3, 1)
    alpha, sigma = alpha_sigma(0.7)
    score = lambda z, log_snr: -z / float(2 * alpha**2 + sigma**2)  # noqa: E731
    covariance = tweedie_covariance(score, z, 0.7)
    expected = float(2 * sigma**2 / (2 * alpha**2 + sigma**2)) * torch.eye(6).expand(5, 6, 6)
    torch.testing.assert_close(covariance, expected)


def test_covariance_of_an_asymmetric_network_is_its_symmetric_part():
    matrix = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    covariance = tweedie_covariance(lambda z, _: z @ matrix.T, torch.zeros(1, 2, dtype=torch.float64), 0.0)
    torch.testing.assert_close(covariance[0], torch.eye(2, dtype=torch.float64))


def test_noise_prediction_is_a_score():
    x, noise = torch.randn(7, 3, 5), torch.randn(7, 3, 5)
    log_snr = torch.linspace(-4, 8, 7, dtype=torch.float64)
    z = diffuse(x, noise, log_snr)
    score = convert(noise, z, log_snr, source="epsilon", target="score")
    torch.testing.assert_close(tweedie_mean(z, score, log_snr), x, rtol=2e-5, atol=2e-3)


@pytest.mark.parametrize("relative_step", [0.05, 0.5, 1.5])
def test_langevin_chain_has_its_known_stationary_variance(relative_step):
    # for N(0, v) the chain is a linear recursion: z' = (1 - h/v) z + sqrt(2h) n, stationary variance v / (1 - h /
    # (2v))
    v = 0.6
    h = relative_step * v
    generator = torch.Generator().manual_seed(0)
    z = torch.zeros(40000, 1, dtype=torch.float64)
    for _ in range(200 if relative_step < 0.1 else 40):
        z = langevin_step(z, -z / v, h, torch.randn(z.shape, dtype=z.dtype, generator=generator))
    expected = v / (1 - h / (2 * v))
    assert abs(float(z.var()) / expected - 1) < 5 * math.sqrt(2 / len(z))


def test_corrector_step_makes_drift_and_noise_of_the_stated_ratio():
    # at a pure-noise level the score of q(z_t | x) is -eps / sigma: |h s| / |sqrt(2h) n| -> r
    for path in PATHS:
        _, sigma = alpha_sigma(1.3, path)
        h = corrector_step_size(1.3, 0.16, path=path)
        assert float(h / sigma / (2 * h).sqrt()) == pytest.approx(0.16, rel=1e-12)


def sliced_distance(a, b):
    """Largest distance between the distribution functions of a and b, over the three axes (Kolmogorov's)."""
    worst = 0.0
    for i in range(a.shape[1]):
        grid = torch.cat([a[:, i], b[:, i]]).sort().values
        ranks = [torch.searchsorted(c[:, i].sort().values, grid, right=True) / len(c) for c in (a, b)]
        worst = max(worst, float((ranks[0] - ranks[1]).abs().max()))
    return worst


def test_corrector_repairs_what_few_predictor_steps_leave():
    score, _, means = mixture()
    count = 4000
    generator = torch.Generator().manual_seed(3)
    label = torch.randint(3, (count,), generator=generator)
    x = means[label] + math.sqrt(0.2) * torch.randn(count, 3, dtype=torch.float64, generator=generator)
    exact = diffuse(x, torch.randn(count, 3, dtype=torch.float64, generator=generator), 6.0)
    start = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    grid = torch.linspace(-6, 6, 7, dtype=torch.float64)
    plain, corrected = (
        predictor_corrector(
            lambda z, level: score(z, level).detach(),
            start,
            grid,
            corrector_steps=n,
            signal_to_noise_ratio=0.4,
            generator=generator,
        )
        for n in (0, 20)
    )
    before, after = sliced_distance(plain, exact), sliced_distance(corrected, exact)
    assert (
        before > 0.05
    )  # six steps with the posterior's variance are too few: 0.03 would be a 5 sigma event for equal ones
    assert after < 0.6 * before


def test_predictor_corrector_follows_the_variance_of_a_gaussian_step_by_step():
    # for x ~ N(0, 4) everything is linear, so that the variance after every step is a recursion in plain numbers
    def level_variance(log_snr):
        alpha, sigma = alpha_sigma(log_snr)
        return 4 * alpha**2 + sigma**2

    levels = [-8.0, -3.0, -1.0, 0.5, 2.0, 5.0, math.inf]
    variance = 1.0
    for t, s in pairwise(levels):
        z_coefficient, x_coefficient, step_variance = posterior_coefficients(t, s)
        gain = 4 * alpha_sigma(t)[0] / level_variance(t)  # E[x | z_t] = gain z_t
        variance = (z_coefficient + x_coefficient * gain) ** 2 * variance + step_variance
        for _ in range(2 if s < math.inf else 0):
            h = 2 * (0.3 * alpha_sigma(s)[1]) ** 2
            variance = (1 - h / level_variance(s)) ** 2 * variance + 2 * h
    x = predictor_corrector(
        lambda z, log_snr: -z / level_variance(log_snr),
        torch.randn(50000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.tensor(levels, dtype=torch.float64),
        corrector_steps=2,
        signal_to_noise_ratio=0.3,
        generator=torch.Generator().manual_seed(1),
    )
    assert abs(float(x.var() / variance) - 1) < 5 * math.sqrt(2 / len(x))


def test_refusals():
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="log_snrs"):
        predictor_corrector(lambda z, _: -z, z, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="corrector_steps"):
        predictor_corrector(lambda z, _: -z, z, torch.tensor([0.0, 1.0]), corrector_steps=-1)
    with pytest.raises(ValueError, match="signal_to_noise_ratio"):
        corrector_step_size(0.0, 0.0)
    with pytest.raises(ValueError, match="one number"):
        tweedie_covariance(lambda z, _: -z, z, torch.zeros(2))
    with pytest.raises(ValueError, match="does not determine"):
        tweedie_mean(z, z, -math.inf)
    with pytest.raises(ValueError, match="shape"):
        langevin_step(z, torch.zeros(3, 2), 0.1, z)


# --- score networks among the others ---------------------------------------------------------------------------------


@pytest.mark.parametrize("continuous", [True, False])
def test_equal_predictions_have_equal_elbo_losses_whatever_the_network_predicts(continuous):
    """The three equivalent objectives: one x_hat, told as data, noise or score, costs the same to float precision."""
    shape = (9, 2, 5, 3)
    x, noise, error = (
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    log_snr = torch.linspace(8, -5, 9, dtype=torch.float64)
    schedule = LinearLogSNRSchedule(8.5, -5.0)
    t = schedule.inverse(log_snr)
    weight = continuous_weight(schedule.derivative(t)) if continuous else 40 * discrete_weight(log_snr + 0.3, log_snr)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        z = diffuse(x, noise, log_snr)
        x_hat = x + 0.3 * error
        losses = {}
        for prediction_type in ("sample", "epsilon", "score"):
            output = convert(x_hat, z, log_snr, source="sample", target=prediction_type)
            losses[prediction_type] = diffusion_loss(
                output.to(dtype),
                x.to(dtype),
                noise.to(dtype),
                log_snr,
                prediction_type=prediction_type,
                elbo_weight=weight,
            ).double()
        for prediction_type in ("epsilon", "score"):
            # float32 rounds outputs whose errors are small beside them: relative to the loss of the outputs' last
            # digits
            torch.testing.assert_close(losses[prediction_type], losses["sample"], rtol=tolerance, atol=0)


def test_a_score_network_learns_a_mixture_and_is_sampled_with_and_without_corrector():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def score(z, log_snr):
        level = log_snr.expand(len(z)).to(z.dtype)[:, None]
        return network(torch.cat([z, level / 4], 1)) / torch.sigmoid(-level).sqrt()

    schedule = LinearLogSNRSchedule(7.0, -6.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(600):
        x = torch.randint(2, (256, 1), generator=generator) * 2.0 - 1 + 0.1 * torch.randn(256, 1, generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        t = low_discrepancy(256, generator=generator)
        log_snr = schedule.log_snr(t)
        loss = diffusion_loss(
            score(diffuse(x, noise, log_snr), log_snr),
            x,
            noise,
            log_snr,
            prediction_type="score",
            elbo_weight=continuous_weight(schedule.derivative(t)),
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-50:]) < 0.6 * sum(losses[:50])
    grid = torch.cat([torch.linspace(-6, 7, 60, dtype=torch.float64), torch.tensor([math.inf])])
    for corrector_steps in (0, 1):
        with torch.no_grad():
            x = predictor_corrector(
                score,
                torch.randn(2000, 1, generator=generator),
                grid,
                corrector_steps=corrector_steps,
                generator=generator,
            )
        assert (
            float(((x.abs() - 1).abs() < 0.4).float().mean()) > 0.95
        )  # four standard deviations about the two centres
        assert 0.4 < float((x > 0).float().mean()) < 0.6
