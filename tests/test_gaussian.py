"""Paths, marginals, transitions and posteriors against mpmath, Bayes' rule and the textbook's formulas."""

import itertools
import math

import mpmath as mp
import pytest
import torch

from vdm_diffusers.gaussian import (
    alpha_sigma,
    diffuse,
    gaussian_kl,
    marginal,
    posterior,
    posterior_coefficients,
    transition,
    transition_coefficients,
    variance_divergence,
)
from vdm_diffusers.noise_schedules import log_snr_from_betas, make_betas

PATHS = ["vp", "ve", "flow"]
SHAPE = (11, 7, 5, 3)


@pytest.fixture(autouse=True)
def _fifty_digits():
    with mp.workdps(50):
        yield


def reference_alpha_sigma(log_snr, path):
    """From the definition of each path, in 50 digits; infinities are limits."""
    if mp.isinf(log_snr):
        clean = log_snr > 0
        return (mp.mpf(1), mp.mpf(0)) if clean else (mp.mpf(0), mp.mpf(1))
    root = mp.exp(log_snr / 2)  # alpha / sigma
    if path == "vp":
        return root / mp.sqrt(1 + root**2), 1 / mp.sqrt(1 + root**2)
    if path == "flow":
        return root / (1 + root), 1 / (1 + root)
    return mp.mpf(1), 1 / root


def reference_posterior(alpha_s, sigma_s, alpha_t, sigma_t):
    """Bayes' rule: q(z_s|z_t,x) ~ q(z_t|z_s) q(z_s|x), a product of two Gaussians in z_s.

    -> coefficients of z_t, x, variance.
    """
    if sigma_s == 0:
        return mp.mpf(0), alpha_s, mp.mpf(0)
    scale = alpha_t / alpha_s
    variance_ts = sigma_t**2 - scale**2 * sigma_s**2
    precision = 1 / sigma_s**2 + scale**2 / variance_ts
    return scale / variance_ts / precision, alpha_s / sigma_s**2 / precision, 1 / precision


def relative_error(got, reference):
    return float(abs(mp.mpf(float(got)) - reference) / abs(reference)) if reference else abs(float(got))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("path", PATHS)
def test_alpha_and_sigma(path):
    values = [-600.0, -80.0, -13.3, -1e-9, 0.0, 0.3, 5.0, 40.0, 600.0, math.inf] + (
        [-math.inf] if path != "ve" else []
    )
    alpha, sigma = alpha_sigma(torch.tensor(values, dtype=torch.float64), path)
    for i, value in enumerate(values):
        a, s = reference_alpha_sigma(mp.mpf(value), path)
        assert relative_error(alpha[i], a) < 1e-15 and relative_error(sigma[i], s) < 2e-15
    # float32 input is taken at its value, and a float gives a scalar
    assert alpha_sigma(torch.tensor([0.1]), path)[0].dtype == torch.float64
    assert alpha_sigma(0.1, path)[1].shape == ()


def grids():
    """Decreasing log SNRs and whether they start at clean data."""
    for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"):
        yield name, log_snr_from_betas(make_betas(name, 1000))
    yield "zero_terminal", log_snr_from_betas(make_betas("scaled_linear", 1000), zero_terminal_snr=True)
    yield "log_snr_linear", torch.linspace(13.3, -5, 1001, dtype=torch.float64)


def check_coefficients(log_snr_s, log_snr_t, path):
    got = posterior_coefficients(log_snr_t, log_snr_s, path=path)
    worst = 0.0
    for i, (ls, lt) in enumerate(zip(log_snr_s.tolist(), log_snr_t.tolist(), strict=True)):
        s, t = reference_alpha_sigma(mp.mpf(ls), path), reference_alpha_sigma(mp.mpf(lt), path)
        for value, reference in zip((got.z[i], got.x[i], got.variance[i]), reference_posterior(*s, *t), strict=True):
            worst = max(worst, relative_error(value, reference))
    return worst


@pytest.mark.parametrize("name, log_snr", list(grids()), ids=lambda v: v if isinstance(v, str) else "")
def test_posterior_coefficients_at_every_step_and_respaced(name, log_snr):
    clean = torch.cat([torch.tensor([math.inf], dtype=torch.float64), log_snr])
    picks = torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))[:40].sort().values
    respaced = clean[[0, *picks[picks > 0].tolist()]]
    for path in PATHS if name == "linear" else ["vp", "flow"] if name == "log_snr_linear" else ["vp"]:
        assert check_coefficients(clean[:-1], clean[1:], path) < 1e-12
        assert check_coefficients(respaced[:-1], respaced[1:], path) < 1e-12
        if path == "vp":
            assert check_coefficients(clean[:1].expand(50), clean[-50:], path) < 1e-12  # from the noise to the data
            assert check_coefficients(clean[1:51], clean[-1:].expand(50), path) < 1e-12


@pytest.mark.parametrize("path", PATHS)
def test_posterior_coefficients_of_tiny_and_of_huge_steps(path):
    for log_snr in (-7.0, 0.25, 11.0):
        for step in (2**-40, 2**-25, 1e-3, 20.0, 60.0):
            s, t = (torch.tensor([v], dtype=torch.float64) for v in (log_snr + step, log_snr))
            assert check_coefficients(s, t, path) < 1e-14 * (1 + step)
            scale, variance = transition_coefficients(s, t, path=path)
            (alpha_s, _), (alpha_t, sigma_t) = (reference_alpha_sigma(mp.mpf(float(v)), path) for v in (s, t))
            assert relative_error(scale, alpha_t / alpha_s) < 1e-14
            exact = sigma_t**2 * -mp.expm1(mp.mpf(float(t)) - mp.mpf(float(s)))
            assert relative_error(variance, exact) < 1e-14


def test_posterior_of_neighbours_is_that_of_the_exact_betas():
    # the same against the betas themselves (Ho et al. 2020, equations 6 and 7): log SNR adds no error that counts
    betas = make_betas("linear", 1000)
    log_snr = torch.cat([torch.tensor([math.inf], dtype=torch.float64), log_snr_from_betas(betas)])
    got = posterior_coefficients(log_snr[1:], log_snr[:-1])
    before = mp.mpf(1)
    for i, beta in enumerate(betas.tolist()):
        beta = mp.mpf(beta)
        after = before * (1 - beta)
        if i:
            assert relative_error(got.variance[i], (1 - before) / (1 - after) * beta) < 1e-12
            assert relative_error(got.x[i], mp.sqrt(before) * beta / (1 - after)) < 1e-12
            assert relative_error(got.z[i], mp.sqrt(1 - beta) * (1 - before) / (1 - after)) < 1e-12
        before = after


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
def test_posterior_mean_is_rounded_once(dtype, path):
    z_t, x = randn(*SHAPE, seed=1, dtype=dtype), randn(*SHAPE, seed=2, dtype=dtype)
    log_snr_s = torch.tensor([math.inf, 13.3, 10.0, 9.99, 4.0, 1.0, 0.01, -1.0, -2.0, -4.9, -5.0], dtype=torch.float64)
    log_snr_t = torch.tensor([13.3, 13.29, 3.0, 9.98, -5.0, 0.9, 0.0, -4.0, -2.2, -5.0, -12.0], dtype=torch.float64)
    mean, variance = posterior(z_t, x, log_snr_t, log_snr_s, path=path)
    assert mean.dtype == dtype and mean.shape == SHAPE and variance.dtype == torch.float64 and variance.shape == (11,)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    for i in range(len(log_snr_s)):
        s = reference_alpha_sigma(mp.mpf(float(log_snr_s[i])), path)
        t = reference_alpha_sigma(mp.mpf(float(log_snr_t[i])), path)
        a, b, v = reference_posterior(*s, *t)
        assert relative_error(variance[i], v) < 1e-12
        for z, value, m in zip(
            z_t[i, :3, 0, 0].tolist(), x[i, :3, 0, 0].tolist(), mean[i, :3, 0, 0].tolist(), strict=True
        ):
            exact = a * mp.mpf(z) + b * mp.mpf(value)
            size = abs(a * mp.mpf(z)) + abs(b * mp.mpf(value))
            bound = 1e-12 * size if dtype == torch.float64 else 2 * torch.finfo(working).eps * size
            if dtype != working:  # the final rounding
                bound += torch.finfo(dtype).eps / 2 * abs(exact) + torch.finfo(dtype).smallest_normal
            assert abs(mp.mpf(m) - exact) <= bound


@pytest.mark.parametrize("path", PATHS)
def test_transitions_compose_to_the_marginal(path):
    x = randn(4, 3, 2, seed=3)
    log_snr = [math.inf, 9.0, 1.5, 1.49, -3.0]
    mean, variance = x, torch.zeros((), dtype=torch.float64)
    for s, t in itertools.pairwise(log_snr):
        scale, added = transition_coefficients(s, t, path=path)
        mean, _ = transition(mean, s, t, path=path)
        variance = scale**2 * variance + added
        expected, expected_variance = marginal(x, t, path=path)
        torch.testing.assert_close(mean, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(variance, expected_variance, rtol=1e-13, atol=0)


def test_zero_terminal_snr_in_both_transitions():
    x, z_t = randn(2, 3, seed=4), randn(2, 3, seed=5)
    for path in ("vp", "flow"):
        scale, variance = transition_coefficients(2.0, -math.inf, path=path)
        assert float(scale) == 0.0 and float(variance) == 1.0
        alpha, sigma = alpha_sigma(2.0, path)
        mean, variance = posterior(z_t, x, -math.inf, 2.0, path=path)
        torch.testing.assert_close(mean, alpha * x, rtol=1e-15, atol=0)  # pure noise says nothing of z_s
        torch.testing.assert_close(variance, sigma**2, rtol=1e-15, atol=0)
        mean, variance = posterior(z_t, x, -math.inf, math.inf, path=path)
        assert torch.equal(mean, x) and float(variance) == 0.0


@pytest.mark.parametrize("path", PATHS)
def test_bayes_rule_on_a_grid(path):
    # log q(z_s|z_t,x) - log q(z_t|z_s) - log q(z_s|x) is a constant, -log q(z_t|x), whatever z_s
    log_snr_s, log_snr_t, x, z_t = 1.7, -0.6, torch.tensor([0.3]), torch.tensor([-1.1])
    x, z_t = x.double(), z_t.double()
    z_s = torch.linspace(-4, 4, 41, dtype=torch.float64)

    def log_density(value, mean, variance):
        return -0.5 * ((value - mean) ** 2 / variance + torch.log(2 * math.pi * variance))

    posterior_term = log_density(z_s, *posterior(z_t, x, log_snr_t, log_snr_s, path=path))
    forward_mean, forward_variance = transition(z_s, log_snr_s, log_snr_t, path=path)
    joint = log_density(z_t, forward_mean, forward_variance) + log_density(z_s, *marginal(x, log_snr_s, path=path))
    evidence = log_density(z_t, *marginal(x, log_snr_t, path=path))
    torch.testing.assert_close(posterior_term, joint - evidence, rtol=1e-12, atol=1e-12)


def test_the_three_textbook_forms_of_the_posterior_mean():
    # Luo 2022, "Understanding Diffusion Models: A Unified Perspective", equations 84, 125 and 143, for a chain of
    # betas
    betas = make_betas("linear", 1000)
    log_snr = log_snr_from_betas(betas)
    i = torch.tensor([1, 2, 10, 400, 998, 999])
    a = 1 - betas[i]  # Luo's alpha_t
    bar = torch.cumprod(1 - betas, 0)
    bar_t, bar_s = bar[i], bar[i - 1]
    x, eps = randn(6, 5, seed=6), randn(6, 5, seed=7)
    z_t = diffuse(x, eps, log_snr[i])
    mean, variance = posterior(z_t, x, log_snr[i], log_snr[i - 1])
    score = -eps / (1 - bar_t).sqrt()[:, None]

    def column(v):
        return v[:, None]

    from_x = column(a.sqrt() * (1 - bar_s) / (1 - bar_t)) * z_t + column(bar_s.sqrt() * (1 - a) / (1 - bar_t)) * x
    from_eps = z_t / column(a.sqrt()) - column((1 - a) / ((1 - bar_t).sqrt() * a.sqrt())) * eps
    from_score = z_t / column(a.sqrt()) + column((1 - a) / a.sqrt()) * score
    for formula in (from_x, from_eps, from_score):
        torch.testing.assert_close(
            mean, formula, rtol=1e-9, atol=1e-11
        )  # the formulas cancel; the coefficients do not
    torch.testing.assert_close(variance, (1 - a) * (1 - bar_s) / (1 - bar_t), rtol=1e-10, atol=0)


def test_marginal_and_diffuse():
    x, eps = randn(*SHAPE, seed=8, dtype=torch.float32), randn(*SHAPE, seed=9, dtype=torch.float32)
    log_snr = torch.linspace(-6, 14, 11)
    for path in PATHS:
        alpha, sigma = alpha_sigma(log_snr, path)
        mean, variance = marginal(x, log_snr, path=path)
        expected = alpha.reshape(-1, 1, 1, 1) * x.double()
        torch.testing.assert_close(mean.double(), expected, rtol=2e-7, atol=0)
        assert torch.equal(variance, sigma**2) and mean.dtype == torch.float32
        z = diffuse(x, eps, log_snr, path=path)
        expected = expected + sigma.reshape(-1, 1, 1, 1) * eps.double()
        assert z.dtype == torch.float32 and bool(((z - expected).abs() <= 3e-7 * (x.abs() + 25 * eps.abs())).all())
        assert diffuse(x, eps, 2.0, path=path).shape == SHAPE  # one log SNR for all
    half = diffuse(x.half(), eps.half(), log_snr)
    exact = diffuse(x.half().double(), eps.half().double(), log_snr)
    assert half.dtype == torch.float16 and bool(((half - exact).abs() <= 2**-11 * exact.abs() + 1e-6).all())


def test_gaussian_kl_against_quadrature_and_at_extreme_ratios():
    for mean_q, variance_q, mean_p, variance_p in [(0.3, 0.5, -1.0, 2.0), (0.0, 1.0, 0.0, 1.0), (2.0, 3.0, 1.9, 0.01)]:
        deviation = mp.sqrt(variance_q)

        def integrand(u, mean_q=mean_q, deviation=deviation, mean_p=mean_p, variance_p=variance_p):
            z = mean_q + deviation * u
            log_ratio = (
                -(u**2) / 2 - mp.log(deviation) + (z - mean_p) ** 2 / (2 * mp.mpf(variance_p)) + mp.log(variance_p) / 2
            )
            return mp.npdf(u) * log_ratio

        with mp.workdps(20):
            reference = mp.quad(integrand, [-12, -4, 0, 4, 12])
        assert float(gaussian_kl(mean_q, variance_q, mean_p, variance_p)) == pytest.approx(
            float(reference), rel=1e-13, abs=1e-15
        )
    for ratio in (1e-300, 1e-20, 1e-10, 0.3, 0.5, 0.7, 0.999999, 1.0, 1.5, 1.6, 1e10, 1e300):
        exact = mp.mpf(ratio) - 1 - mp.log(ratio)
        got = variance_divergence(torch.tensor(ratio, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
        assert abs(mp.mpf(float(got)) - exact) <= 1e-15 * max(exact, abs(mp.mpf(ratio) - 1))
    # equal variances: the means' term, exactly
    assert float(gaussian_kl(1.5, 1e-30, 1.0, 1e-30)) == 0.5 * (0.5**2 / 1e-30)
    variance = torch.tensor([0.2, 1.0, 7.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(gaussian_kl(0.0, variance, 0.0, 1.0).sum(), variance)
    torch.testing.assert_close(gradient, 0.5 * (1 - 1 / variance.detach()), rtol=1e-14, atol=1e-16)


def test_gradients_reach_data_and_log_snr():
    x, z_t = randn(3, 2, seed=10).requires_grad_(), randn(3, 2, seed=11).requires_grad_()
    log_snr_t = torch.tensor([0.1, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    log_snr_s = torch.tensor([1.0, 5.0, 3.2], dtype=torch.float64, requires_grad=True)
    for path in PATHS:
        for function in (
            lambda x, z, t, s, path=path: posterior(z, x, t, s, path=path),
            lambda x, z, t, s, path=path: transition(z, s, t, path=path),
            lambda x, z, t, s, path=path: (diffuse(x, z, t, path=path), *marginal(x, s, path=path)),
        ):
            assert torch.autograd.gradcheck(function, (x, z_t, log_snr_t, log_snr_s))


@pytest.mark.parametrize("path", PATHS)
def test_compiles_whole(path):
    x, noise = randn(4, 3, 2, seed=12), randn(4, 3, 2, seed=13)
    log_snr_t, log_snr_s = torch.tensor([-3.0, 0.0, 1.0, 2.0]), torch.tensor([1.0, 0.5, 7.0, math.inf])

    def step(x, noise, log_snr_t, log_snr_s):
        return posterior(diffuse(x, noise, log_snr_t, path=path), x, log_snr_t, log_snr_s, path=path)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for got, expected in zip(
        compiled(x, noise, log_snr_t, log_snr_s), step(x, noise, log_snr_t, log_snr_s), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: alpha_sigma(1.0, "cosine"), "`path` must be 'vp', 've' or 'flow', got 'cosine'"),
        (lambda x: alpha_sigma(-math.inf, "ve"), "use vp or flow"),
        (lambda x: posterior(x, x, 1.0, 0.0), "Are the two swapped"),
        (lambda x: posterior(x, x, math.nan, 0.0), "s must come before t"),
        (lambda x: posterior(x, x, -math.inf, -math.inf), "same infinity"),
        (lambda x: transition(x, math.inf, math.inf), "same infinity"),
        (lambda x: posterior(x, x[:, :1], 0.0, 1.0), "same shape"),
        (lambda x: diffuse(x, x[:2], 0.0), "same shape"),
        (lambda x: diffuse(x, x, torch.zeros(3)), r"shape \(3,\) does not go with .*\(4, 3, 2\)"),
        (lambda x: diffuse(x, x, torch.zeros(4, 3, 2, 1)), "does not go with"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 3, 2))
