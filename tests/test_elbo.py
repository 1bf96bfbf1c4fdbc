"""The bound: each term against closed forms, and the whole against exact -ln p with exact denoisers."""

import itertools
import math

import mpmath as mp
import pytest
import torch
from exact_models import GaussianMixture

from vdm_diffusers.decoders import encode_pixels, softmax_log_likelihood
from vdm_diffusers.elbo import (
    Bound,
    bits_per_dim,
    continuous_weight,
    discrete_weight,
    discrete_weight_x,
    prior_kl,
    squared_error,
    step_kl,
)
from vdm_diffusers.gaussian import alpha_sigma, diffuse, gaussian_kl, posterior, posterior_coefficients
from vdm_diffusers.noise_schedules import (
    CosineSchedule,
    LinearLogSNRSchedule,
    TabulatedNoiseSchedule,
    log_snr_from_betas,
    make_betas,
)
from vdm_diffusers.time_sampling import low_discrepancy

PATHS = ["vp", "ve", "flow"]
SHAPE = (11, 7, 5, 3)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- the terms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_prior_is_the_kl_between_two_gaussians(path):
    x = randn(*SHAPE, seed=1, dtype=torch.float32)
    for log_snr in (-30.0, -5.0, -1.0, 2.0, 60.0):
        alpha, sigma = alpha_sigma(log_snr, path)
        prior_variance = float(sigma**2) if path == "ve" else 1.0
        expected = gaussian_kl(alpha * x.double(), sigma**2, 0.0, prior_variance).flatten(1).sum(1)
        got = prior_kl(x, log_snr, path=path)
        assert got.shape == (11,) and got.dtype == torch.float64
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-16 * x[0].numel())
    each = torch.linspace(-8, 1, 11)
    one_by_one = torch.stack([prior_kl(x[i : i + 1], each[i], path=path)[0] for i in range(11)])
    torch.testing.assert_close(prior_kl(x, each, path=path), one_by_one, rtol=1e-14, atol=0)


def test_prior_against_mpmath_where_it_is_tiny():
    x = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    with mp.workdps(50):
        for log_snr in (-5.0, -14.0, -40.0):
            root = mp.exp(mp.mpf(log_snr) / 2)
            for path, variance, mean in (
                ("vp", 1 / (1 + root**2), root / mp.sqrt(1 + root**2)),
                ("flow", 1 / (1 + root) ** 2, root / (1 + root)),
            ):
                exact = mp.fsum((variance - 1 - mp.log(variance) + (mean * mp.mpf(v)) ** 2) / 2 for v in (0.5, -1.0))
                assert float(abs(mp.mpf(float(prior_kl(x, log_snr, path=path))) - exact) / exact) < 1e-14
    for path in ("vp", "flow"):
        assert prior_kl(x, -math.inf, path=path).tolist() == [0.0]


@pytest.mark.parametrize("path", PATHS)
def test_discrete_weights_are_the_kl_of_the_posteriors(path):
    x, x_hat, eps = randn(6, 5, 3, seed=2), randn(6, 5, 3, seed=3), randn(6, 5, 3, seed=4)
    log_snr_s = torch.tensor([13.3, 9.0, 4.0, 0.1, -1.0, -4.99], dtype=torch.float64)
    log_snr_t = torch.tensor([13.2, -5.0, 3.0, 0.0, -4.0, -5.0], dtype=torch.float64)
    z_t = diffuse(x, eps, log_snr_t, path=path)
    (mean, variance), (mean_hat, _) = (posterior(z_t, v, log_snr_t, log_snr_s, path=path) for v in (x, x_hat))
    variance = variance.reshape(-1, 1, 1)
    kl = gaussian_kl(mean, variance, mean_hat, variance).flatten(1).sum(1)
    alpha, sigma = (v.reshape(-1, 1, 1) for v in alpha_sigma(log_snr_t, path))
    eps_hat = (z_t - alpha * x_hat) / sigma
    by_x = discrete_weight_x(log_snr_s, log_snr_t) * squared_error(x, x_hat)
    by_eps = discrete_weight(log_snr_s, log_snr_t) * squared_error(eps, eps_hat)
    torch.testing.assert_close(by_x, kl, rtol=1e-9, atol=0)
    torch.testing.assert_close(by_eps, kl, rtol=1e-9, atol=0)
    coefficients = posterior_coefficients(log_snr_t, log_snr_s, path=path)
    by_variance = step_kl(squared_error(x, x_hat), coefficients.x, coefficients.variance, coefficients.variance, 15)
    torch.testing.assert_close(by_variance, kl, rtol=1e-9, atol=0)


def test_discrete_weights_against_mpmath():
    log_snr = log_snr_from_betas(make_betas("linear", 1000))
    log_snr = torch.cat([log_snr, torch.tensor([-12.0, -math.inf], dtype=torch.float64)])
    by_eps, by_x = discrete_weight(log_snr[:-1], log_snr[1:]), discrete_weight_x(log_snr[:-1], log_snr[1:])
    with mp.workdps(50):
        for i, (s, t) in enumerate(itertools.pairwise(log_snr.tolist())):
            snr_s, snr_t = mp.exp(mp.mpf(s)), mp.exp(mp.mpf(t))
            assert float(abs(mp.mpf(float(by_x[i])) - (snr_s - snr_t) / 2) / snr_s) < 1e-14
            if snr_t:
                exact = (snr_s / snr_t - 1) / 2
                assert float(abs(mp.mpf(float(by_eps[i])) - exact) / exact) < 1e-14
    assert float(discrete_weight(-12.0, -math.inf)) == math.inf
    assert float(discrete_weight_x(1.0, 1.0)) == 0.0


@pytest.mark.parametrize("schedule", [LinearLogSNRSchedule(), CosineSchedule()], ids=["linear", "cosine"])
def test_continuous_weight_is_the_limit_of_many_steps(schedule):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    T = 1e6
    many = T * discrete_weight(schedule.log_snr(t - 0.5 / T), schedule.log_snr(t + 0.5 / T))
    torch.testing.assert_close(many, continuous_weight(schedule.derivative(t)), rtol=1e-4, atol=0)


def test_step_kl_of_any_variance_and_its_minimiser():
    x, x_hat, z_t = randn(7, 5, 3, seed=5), randn(7, 5, 3, seed=6), randn(7, 5, 3, seed=7)
    log_snr_t, log_snr_s = -1.0, 0.4
    coefficients = posterior_coefficients(log_snr_t, log_snr_s)
    (mean, _), (mean_hat, _) = posterior(z_t, x, log_snr_t, log_snr_s), posterior(z_t, x_hat, log_snr_t, log_snr_s)
    error = squared_error(x, x_hat)
    for ratio in (1e-3, 0.5, 0.99, 1.0, 1.3, 40.0):
        variance = ratio * coefficients.variance
        kl = gaussian_kl(mean, coefficients.variance, mean_hat, variance).flatten(1).sum(1)
        got = step_kl(error, coefficients.x, coefficients.variance, variance, 15)
        torch.testing.assert_close(got, kl, rtol=1e-12, atol=0)

    def average(variance):
        return step_kl(error, coefficients.x, coefficients.variance, variance, 15).mean()

    best = coefficients.variance + coefficients.x**2 * error.mean() / 15
    argument = best.clone().requires_grad_()
    (slope,) = torch.autograd.grad(average(argument), argument)
    assert abs(float(slope * best)) < 1e-12  # stationary, and lower than everything around it
    assert all(float(average(best)) < float(average(best * r)) for r in (0.1, 0.9, 0.999, 1.001, 1.1, 10.0))
    # a variance for each image, and a float32 error
    each = coefficients.variance * torch.linspace(0.5, 3, 7).double()
    torch.testing.assert_close(
        step_kl(error.float(), coefficients.x, coefficients.variance, each, 15),
        torch.stack(
            [step_kl(e, coefficients.x, coefficients.variance, v, 15) for e, v in zip(error, each, strict=True)]
        ),
        rtol=1e-6,
        atol=0,
    )
    assert step_kl(torch.zeros(2), 1.0, 0.0, 0.1, 15).tolist() == [math.inf, math.inf]  # a point is no Gaussian


def test_units_and_sums():
    terms = [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([0.5, 0.25])]
    assert Bound(*terms).nats.tolist() == [11.5, 22.25]
    torch.testing.assert_close(bits_per_dim(torch.tensor([math.log(2) * 12]), 4), torch.tensor([3.0]).double())
    assert float(bits_per_dim(64 * math.log(256), 64)) == pytest.approx(8.0, rel=1e-15)


def test_squared_error_is_computed_in_float32_at_least_and_refuses_to_broadcast():
    a, b = randn(*SHAPE, seed=8, dtype=torch.bfloat16), randn(*SHAPE, seed=9, dtype=torch.bfloat16)
    exact = ((a.double() - b.double()) ** 2).flatten(1).sum(1)
    got = squared_error(a, b)
    assert got.dtype == torch.float32 and got.shape == (11,)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(squared_error(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])), torch.tensor([4.0, 0.0]))
    with pytest.raises(ValueError, match="same shape"):
        squared_error(torch.zeros(4, 1, 2, 2), torch.zeros(4, 3, 2, 2))


def test_gradients_reach_the_end_points():
    x = randn(3, 2, seed=10).requires_grad_()
    log_snr = torch.tensor([-5.0, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    for path in PATHS:
        assert torch.autograd.gradcheck(lambda x, v, path=path: prior_kl(x, v, path=path), (x, log_snr))
    for weight in (discrete_weight, discrete_weight_x):
        assert torch.autograd.gradcheck(lambda v, weight=weight: weight(v + 0.7, v), (log_snr,))
    compiled = torch.compile(
        lambda x, v: (prior_kl(x, v), discrete_weight_x(v + 1, v)), fullgraph=True, backend="eager"
    )
    for got, expected in zip(
        compiled(x, log_snr), (prior_kl(x, log_snr), discrete_weight_x(log_snr + 1, log_snr)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


# --- the whole, for Gaussian data: everything in closed form ---------------------------------------------------------

SCHEDULES = {
    "linear": LinearLogSNRSchedule(30.0, -30.0),
    "cosine": CosineSchedule(30.0, -30.0),
    "table": TabulatedNoiseSchedule(torch.tensor([30.0, 4.0, 1.5, -6.0, -30.0])),
}


def gaussian_errors(x, mean, variance, log_snr):
    """E|eps - eps_hat|^2 given x, of the exact denoiser of N(mean, variance I), at each log SNR: (B, T)."""
    snr = log_snr.exp()
    gain = snr * variance / (1 + snr * variance)  # x_hat = mean + gain (z / alpha - mean)
    square = ((x - mean) ** 2).flatten(1).sum(1)
    return snr * (1 - gain) ** 2 * square[:, None] + gain**2 * mean.numel()


@pytest.mark.parametrize("name", SCHEDULES)
def test_bound_of_gaussian_data_is_tight_for_every_image(name):
    # with an exact denoiser and ever wider end points the bound is -ln p(x) of each x, not only on average
    schedule, mean, variance = SCHEDULES[name], randn(2, 3, seed=11), 0.4
    data = GaussianMixture.gaussian(mean, variance)
    x = data.sample(5, torch.Generator().manual_seed(12))
    edges = schedule.inverse(torch.linspace(30, -30, 12_001, dtype=torch.float64))
    t = (edges[1:] + edges[:-1]) / 2
    errors = gaussian_errors(x, mean, variance, schedule.log_snr(t))
    diffusion = (continuous_weight(schedule.derivative(t)) * errors * edges.diff()).sum(1)  # the midpoint rule
    reconstruction = (
        6 / 2 * (math.log(2 * math.pi) - schedule.log_snr_max + 1)
    )  # E[-ln N(z_0 / alpha_0; x, 1 / SNR_0)]
    bound = Bound(prior_kl(x, schedule.log_snr_min), diffusion, torch.full((5,), reconstruction, dtype=torch.float64))
    torch.testing.assert_close(bound.nats, data.nats(x), rtol=0, atol=1e-4)


def test_discrete_bound_of_gaussian_data_falls_to_the_continuous_one():
    schedule, mean, variance = LinearLogSNRSchedule(), randn(2, 3, seed=13), 0.4
    x = GaussianMixture.gaussian(mean, variance).sample(4, torch.Generator().manual_seed(14))
    snr = [math.exp(v) for v in (schedule.log_snr_max, schedule.log_snr_min)]

    def kl_to_marginal(snr):  # KL(q(z_t|x) || q(z_t)), in units of x
        return gaussian_kl(x, 1 / snr, mean, variance + 1 / snr).flatten(1).sum(1)

    limit = kl_to_marginal(snr[0]) - kl_to_marginal(snr[1])  # I-MMSE, for every x
    gaps = []
    for T in (10, 20, 40, 80, 10_000):
        log_snr = schedule.log_snr(torch.arange(T + 1, dtype=torch.float64) / T)
        weight = discrete_weight(log_snr[:-1], log_snr[1:])
        gaps.append(((weight * gaussian_errors(x, mean, variance, log_snr[1:])).sum(1) - limit).mean())
    assert all(
        float(later) < float(earlier) / 1.7 for earlier, later in itertools.pairwise(gaps[:4])
    )  # first order in 1/T
    assert 0 < float(gaps[-1]) < 2 * float(gaps[3]) * 80 / 10_000


# --- the whole, for a data set of N images: Monte Carlo against ln N -------------------------------------------------


def point_data(n=8, num_levels=17, shape=(1, 2, 2)):
    levels = torch.randint(num_levels, (n, *shape), generator=torch.Generator().manual_seed(15))
    return levels, GaussianMixture.points(encode_pixels(levels, num_levels, dtype=torch.float64))


def diffusion_term(data, x, log_snr, weight, generator, path="vp"):
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    z_t = diffuse(x, noise, log_snr, path=path)
    return weight * squared_error(noise, data.predict(z_t, log_snr, "epsilon", path))


def mean_and_error(values):
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


@pytest.mark.parametrize("ends", [(13.3, -5.0), (5.0, -2.0)], ids=["vdm", "narrow"])
def test_continuous_bound_of_n_images(ends):
    levels, data = point_data()
    schedule, generator = LinearLogSNRSchedule(*ends), torch.Generator().manual_seed(16)
    x = data.means
    diffusion, reconstruction = [], []
    for _ in range(30):  # independent shifts give the error bar; every image has its own strata
        t = torch.cat([low_discrepancy(500, generator=generator) for _ in x])
        weight = continuous_weight(schedule.derivative(t))
        images = x.repeat_interleave(500, 0)
        diffusion.append(float(diffusion_term(data, images, schedule.log_snr(t), weight, generator).mean()))
        z_0 = diffuse(images, torch.randn(images.shape, generator=generator).double(), schedule.log_snr_max)
        k = levels.repeat_interleave(500, 0)
        reconstruction.append(-float(softmax_log_likelihood(k, z_0, schedule.log_snr_max, num_levels=17).mean()))
    prior = float(prior_kl(x, schedule.log_snr_min).mean())
    (diffusion, e1), (reconstruction, e2) = mean_and_error(diffusion), mean_and_error(reconstruction)
    (first, e3), (last, e4) = (data.information(v, 200_000, generator) for v in ends)
    error = math.sqrt(e1**2 + e2**2 + e3**2 + e4**2)
    truth = float(data.nats(x).mean())
    assert truth == pytest.approx(math.log(8), rel=1e-15) and error < 0.03
    if ends == (13.3, -5.0):
        assert first == pytest.approx(math.log(8), abs=1e-9)  # z_0 tells the eight images apart
    bound = prior + diffusion + reconstruction
    assert abs(bound - truth - (reconstruction + prior - last) - (first - truth)) < 5 * error
    assert bound > truth - 5 * error


def test_discrete_bound_of_n_images_approaches_from_above():
    _, data = point_data()
    schedule, generator = LinearLogSNRSchedule(), torch.Generator().manual_seed(17)
    results = []
    for T in (16, 64, 256):
        log_snr = schedule.log_snr(torch.arange(T + 1, dtype=torch.float64) / T)
        weight = discrete_weight(log_snr[:-1], log_snr[1:])
        values = []
        for _ in range(10):
            images = data.means.repeat_interleave(20 * T, 0)  # every step 20 times for each image
            step = torch.arange(T).repeat(len(data.means) * 20)
            terms = diffusion_term(data, images, log_snr[1:][step], T * weight[step], generator)
            values.append(float(terms.mean()))
        results.append(mean_and_error(values))
    first, last = (data.information(v, 100_000, generator)[0] for v in (13.3, -5.0))
    limit = first - last  # what the continuous one is
    for (coarse, e1), (fine, e2) in itertools.pairwise(results):
        assert coarse - fine > 5 * math.hypot(e1, e2)
    assert results[-1][0] > limit + 5 * results[-1][1]
    # first order in 1/T, once the steps are small: four times the steps leave about a quarter of the excess
    assert 1 / 5 < (results[-1][0] - limit) / (results[-2][0] - limit) < 1 / 3


def test_diffusion_term_is_the_same_on_every_path():
    _, data = point_data()
    schedule = LinearLogSNRSchedule()
    t = low_discrepancy(200, shift=0.3)
    x = data.means.repeat(25, 1, 1, 1)
    terms = [
        diffusion_term(
            data,
            x,
            schedule.log_snr(t),
            continuous_weight(schedule.derivative(t)),
            torch.Generator().manual_seed(18),
            path,
        )
        for path in PATHS
    ]
    for other in terms[1:]:
        torch.testing.assert_close(other, terms[0], rtol=1e-7, atol=1e-9)


# --- the exact models themselves -------------------------------------------------------------------------------------


def test_exact_denoiser_is_tweedies():
    # the score of the explicit marginal, by autograd, gives the mean of the explicit posterior
    mixture = GaussianMixture(
        randn(3, 2, 2, seed=19), torch.tensor([0.0, 0.3, 1.2]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    )
    log_snr = torch.tensor([-3.0, 0.0, 1.0, 4.0], dtype=torch.float64)
    for path in PATHS:
        z = randn(4, 2, 2, seed=20).requires_grad_()
        (score,) = torch.autograd.grad(mixture.log_marginal(z, log_snr, path).sum(), z)
        torch.testing.assert_close(mixture.predict(z.detach(), log_snr, "score", path), score, rtol=1e-9, atol=1e-10)


def test_exact_density_is_normalised():
    mixture = GaussianMixture(
        torch.tensor([[-1.0], [0.5]]).double(), torch.tensor([0.1, 0.6]).double(), torch.tensor([0.3, 0.7]).double()
    )
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)[:, None]
    assert float(torch.trapezoid((-mixture.nats(grid)).exp(), grid[:, 0])) == pytest.approx(1, abs=1e-9)
