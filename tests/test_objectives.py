"""Objectives on every prediction type against their definitions, written out by hand in float64."""

import math

import pytest
import torch

from vdm_diffusers.elbo import bits_per_dim, continuous_weight, discrete_weight
from vdm_diffusers.gaussian import alpha_sigma, diffuse, gaussian_kl, posterior
from vdm_diffusers.noise_schedules import (
    CosineSchedule,
    LinearLogSNRSchedule,
    ShiftedSchedule,
    log_snr_from_betas,
    make_betas,
)
from vdm_diffusers.objectives import OBJECTIVES, diffusion_loss, epsilon_weight, output_weight
from vdm_diffusers.prediction import PREDICTION_TYPES, prediction_target

PATHS = ["vp", "ve", "flow"]
SHAPE = (11, 7, 5, 3)
NUM_DIMS = 7 * 5 * 3
LOG_SNR = torch.tensor([-8.0, -5.0, -2.0, -0.5, 0.0, 0.7, 1.6, 1.7, 3.0, 8.0, 13.3], dtype=torch.float64)
WEIGHT = torch.linspace(0.3, 9.0, 11, dtype=torch.float64)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def per_sample(square):
    return square.flatten(1).sum(1)


def normal_density(value, mean, deviation):
    return torch.exp(-((value - mean) ** 2) / (2 * deviation**2)) / math.sqrt(2 * math.pi * deviation**2)


def x_and_eps(output, z_t, log_snr, prediction_type, path):
    """What an output says of x and eps: each type's two equations solved by hand."""
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in alpha_sigma(log_snr, path))
    if prediction_type == "sample":
        x = output
    elif prediction_type == "epsilon":
        x = (z_t - sigma * output) / alpha
    elif prediction_type == "score":
        x = (z_t + sigma**2 * output) / alpha
    elif prediction_type == "v_prediction":  # alpha z - sigma v = (alpha^2 + sigma^2) x
        x = (alpha * z_t - sigma * output) / (alpha**2 + sigma**2)
    else:  # z - sigma u = (alpha + sigma) x
        x = (z_t - sigma * output) / (alpha + sigma)
    return x, (z_t - alpha * x) / sigma


def by_hand(objective, output, x, eps, z_t, prediction_type, path, gamma, bias):
    x_hat, eps_hat = x_and_eps(output, z_t, LOG_SNR, prediction_type, path)
    error_x, error_eps = per_sample((x - x_hat) ** 2), per_sample((eps - eps_hat) ** 2)
    snr = LOG_SNR.exp()
    if objective == "elbo":
        return WEIGHT * error_eps / (NUM_DIMS * math.log(2))
    if objective == "mse":
        target = prediction_target(x, eps, LOG_SNR, prediction_type, path=path)
        return per_sample((output - target) ** 2) / NUM_DIMS
    return {
        "simple": lambda: error_eps,
        "min_snr": lambda: torch.minimum(snr, torch.tensor(gamma).double()) * error_x,
        "truncated_snr": lambda: torch.maximum(snr, torch.tensor(1.0).double()) * error_x,
        "sigmoid": lambda: WEIGHT / (1 + torch.exp(LOG_SNR - bias)) * error_eps,
        "edm": lambda: WEIGHT * normal_density(LOG_SNR, 2.4, 2.4) * (torch.exp(-LOG_SNR) + 0.5**2) * error_eps,
    }[objective]() / NUM_DIMS


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_its_definition(objective, prediction_type, path):
    x, eps = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    z_t = diffuse(x, eps, LOG_SNR, path=path)
    output = prediction_target(x, eps, LOG_SNR, prediction_type, path=path) + 0.3 * randn(*SHAPE, seed=3)
    settings = {"elbo_weight": WEIGHT, "min_snr_gamma": 3.0, "sigmoid_bias": -0.7}
    got = diffusion_loss(
        output, x, eps, LOG_SNR, prediction_type=prediction_type, objective=objective, path=path, **settings
    )
    expected = by_hand(objective, output, x, eps, z_t, prediction_type, path, 3.0, -0.7)
    assert got.shape == (11,) and got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)  # x and eps by hand cancel at the ends
    # and with one time for all, given as a number
    one = diffusion_loss(
        output,
        x,
        eps,
        0.7,
        prediction_type=prediction_type,
        objective=objective,
        path=path,
        elbo_weight=float(WEIGHT[5]),
        min_snr_gamma=3.0,
        sigmoid_bias=-0.7,
    )
    if prediction_type in ("sample", "epsilon"):  # whose targets do not depend on the time
        torch.testing.assert_close(one[5], got[5], rtol=1e-12, atol=0)
    assert one.shape == (11,)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_elbo_backpropagates_bits_per_dim(prediction_type):
    # a chain of T steps, one drawn: the gradient is that of T KL(q(z_s|z_t,x) || p(z_s|z_t)) in bits/dim
    T, steps = 50, torch.arange(1, 12)
    log_snr = CosineSchedule().log_snr(torch.arange(T + 1, dtype=torch.float64) / T)
    log_snr_s, log_snr_t = log_snr[steps * 4 - 1], log_snr[steps * 4]
    x, eps = randn(*SHAPE, seed=4), randn(*SHAPE, seed=5)
    z_t = diffuse(x, eps, log_snr_t)
    output = randn(*SHAPE, seed=6).requires_grad_()
    loss = diffusion_loss(
        output,
        x,
        eps,
        log_snr_t,
        prediction_type=prediction_type,
        elbo_weight=T * discrete_weight(log_snr_s, log_snr_t),
    )
    x_hat, _ = x_and_eps(output, z_t, log_snr_t, prediction_type, "vp")
    (mean, variance), (mean_hat, _) = (posterior(z_t, v, log_snr_t, log_snr_s) for v in (x, x_hat))
    variance = variance.reshape(-1, 1, 1, 1)
    bits = bits_per_dim(T * per_sample(gaussian_kl(mean, variance, mean_hat, variance)), NUM_DIMS)
    torch.testing.assert_close(loss, bits, rtol=1e-9, atol=0)
    (gradient,), (expected,) = (torch.autograd.grad(v.mean(), output) for v in (loss, bits))
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-12)


def test_known_output_weights():
    snr = LOG_SNR.exp()
    close = {"rtol": 1e-12, "atol": 0.0}
    # Hang et al. 2023: min(SNR, gamma) on x, over SNR on eps, over SNR + 1 on v
    capped = snr.clamp(max=5.0)
    torch.testing.assert_close(output_weight(LOG_SNR, "min_snr", "sample"), capped, **close)
    torch.testing.assert_close(output_weight(LOG_SNR, "min_snr", "epsilon"), capped / snr, **close)
    torch.testing.assert_close(output_weight(LOG_SNR, "min_snr", "v_prediction"), capped / (snr + 1), **close)
    torch.testing.assert_close(epsilon_weight(LOG_SNR, "min_snr"), capped / snr, **close)
    # Salimans & Ho 2022: SNR + 1 on x is the plain error of v; truncated SNR is max(SNR, 1)
    torch.testing.assert_close(
        output_weight(LOG_SNR, "simple", "v_prediction") * (snr + 1), torch.sigmoid(LOG_SNR) * (snr + 1), **close
    )
    torch.testing.assert_close(output_weight(LOG_SNR, "truncated_snr", "sample"), snr.clamp(min=1.0), **close)
    torch.testing.assert_close(epsilon_weight(LOG_SNR, "truncated_snr"), snr.clamp(min=1.0) / snr, **close)
    for prediction_type in PREDICTION_TYPES:
        assert output_weight(LOG_SNR, "mse", prediction_type).tolist() == [1.0] * 11
    for objective in ("elbo", "sigmoid", "edm", "simple", "min_snr", "truncated_snr"):
        assert epsilon_weight(LOG_SNR, objective, elbo_weight=2.0).shape == LOG_SNR.shape


def test_zero_terminal_snr():
    log_snr = torch.cat(
        [torch.tensor([2.0]).double(), log_snr_from_betas(make_betas("linear", 9), zero_terminal_snr=True)[-1:]]
    )
    assert log_snr[-1] == -math.inf
    x, eps = randn(2, 3, seed=7), randn(2, 3, seed=8)
    for prediction_type in ("v_prediction", "sample", "flow_prediction"):
        output = randn(2, 3, seed=9)
        kinds = {"prediction_type": prediction_type}
        assert float(diffusion_loss(output, x, eps, log_snr, objective="min_snr", **kinds)[1]) == 0.0
        # alpha = 0: the output is -x, x or eps - x with eps known, so max(SNR, 1) = 1 leaves the plain error
        truncated = diffusion_loss(output, x, eps, log_snr, objective="truncated_snr", **kinds)[1]
        plain = diffusion_loss(output, x, eps, log_snr, objective="mse", **kinds)[1]
        torch.testing.assert_close(truncated, plain, rtol=1e-14, atol=0)
    for objective in ("min_snr", "truncated_snr"):
        with pytest.raises(ValueError, match="'epsilon' does not determine 'sample' at log_snr = -inf"):
            output_weight(log_snr, objective, "epsilon")


def test_edm_weighting_is_edms_own_loss():
    # Karras et al. 2022: ln sigma ~ N(-1.2, 1.2^2), loss (sigma^2 + 1/4) / (sigma / 2)^2 |x - x_hat|^2. In log SNR
    # (ve) the elbo's 1/2 |eps - eps_hat|^2 d log_snr times our weighting is the same integrand up to one constant
    log_sigma = torch.linspace(-6, 5, 50, dtype=torch.float64)
    sigma, log_snr = log_sigma.exp(), -2 * log_sigma
    edm = normal_density(log_sigma, -1.2, 1.2) * (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    ours = epsilon_weight(log_snr, "edm", elbo_weight=0.5) / sigma**2 * 2  # |d log_snr / d log_sigma| = 2
    torch.testing.assert_close(edm / ours, torch.full_like(edm, 8.0), rtol=1e-12, atol=0)


def test_sigmoid_weighting_is_monotone_and_edm_is_not():
    # Kingma & Gao 2023: a weighting of the elbo that does not rise with log SNR is an elbo of augmented data
    log_snr = torch.linspace(-12, 12, 500, dtype=torch.float64)
    for bias in (-3.0, 0.0, 2.0):
        weight = epsilon_weight(log_snr, "sigmoid", elbo_weight=1.0, sigmoid_bias=bias)
        assert bool((weight.diff() < 0).all()) and 0 < float(weight.min()) and float(weight.max()) < 1
        at_bias = epsilon_weight(bias, "sigmoid", elbo_weight=1.0, sigmoid_bias=bias)
        assert float(at_bias) == 0.5
    edm = epsilon_weight(log_snr, "edm", elbo_weight=1.0)
    assert bool((edm.diff() > 0).any()) and bool((edm.diff() < 0).any())


@pytest.mark.parametrize("objective", ["elbo", "sigmoid", "edm"])
def test_expectation_does_not_depend_on_the_schedule_between_its_ends(objective):
    variance = 0.4  # exact denoiser of N(0, variance): E|eps - eps_hat|^2 per dimension
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    averages = []
    for schedule in (
        LinearLogSNRSchedule(6.0, -6.0),
        CosineSchedule(6.0, -6.0),
        ShiftedSchedule(CosineSchedule(4.0, -8.0), 2.0),
    ):
        log_snr = schedule.log_snr(t)
        error = log_snr.exp() * variance / (1 + log_snr.exp() * variance)
        weight = epsilon_weight(log_snr, objective, elbo_weight=continuous_weight(schedule.derivative(t)))
        averages.append((weight * error).mean())
    for other in averages[1:]:
        torch.testing.assert_close(other, averages[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_outputs_are_weighed_in_float32(dtype):
    x, eps = randn(*SHAPE, seed=10, dtype=torch.float32), randn(*SHAPE, seed=11, dtype=torch.float32)
    output = (eps + 0.1 * randn(*SHAPE, seed=12)).to(dtype)
    loss = diffusion_loss(output, x, eps, LOG_SNR, prediction_type="epsilon", objective="simple")
    assert loss.dtype == torch.float32
    exact = per_sample((output.double() - eps.double()) ** 2) / NUM_DIMS
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_gradients_reach_the_schedule_and_it_compiles():
    x, eps = randn(3, 2, seed=13), randn(3, 2, seed=14)
    output = randn(3, 2, seed=15).requires_grad_()
    log_snr = torch.tensor([-1.0, 0.4, 3.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)

    def loss(output, log_snr, weight, prediction_type="v_prediction", objective="elbo"):
        return diffusion_loss(
            output, x, eps, log_snr, prediction_type=prediction_type, objective=objective, elbo_weight=weight
        )

    assert torch.autograd.gradcheck(loss, (output, log_snr, weight))
    for objective in OBJECTIVES:
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        got = compiled(output, log_snr, weight, objective=objective)
        torch.testing.assert_close(got, loss(output, log_snr, weight, objective=objective), rtol=1e-13, atol=0)


def call(output=None, log_snr=0.0, prediction_type="epsilon", objective="simple", **kinds):
    x = torch.zeros(4, 3, 2, 2)
    output = x if output is None else output
    return diffusion_loss(output, x, x, log_snr, prediction_type=prediction_type, objective=objective, **kinds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "l2"}, "`objective` must be one of elbo, .*got 'l2'"),
        ({"objective": "elbo"}, "'elbo' needs `elbo_weight`: pass"),
        ({"objective": "sigmoid"}, "needs `elbo_weight`"),
        ({"objective": "edm"}, "needs `elbo_weight`"),
        ({"objective": "min_snr", "min_snr_gamma": 0.0}, "`min_snr_gamma` must be positive, got 0.0"),
        ({"prediction_type": "x0"}, "got 'x0'"),
        ({"path": "sub"}, "`path` must be"),
        ({"output": torch.zeros(4, 6, 2, 2)}, "same shape"),
        ({"output": torch.zeros(4, 1, 2, 2)}, "same shape"),
        ({"log_snr": torch.zeros(3)}, "does not go with"),
        ({"log_snr": torch.zeros(4, 1, 1, 1)}, "does not go with"),
        ({"log_snr": -math.inf, "prediction_type": "epsilon", "objective": "min_snr"}, "does not determine"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_epsilon_weight_errors():
    with pytest.raises(ValueError, match="mse has no weight"):
        epsilon_weight(0.0, "mse")
    with pytest.raises(ValueError, match="`min_snr_gamma` must be positive, got -1"):
        epsilon_weight(0.0, "min_snr", min_snr_gamma=-1)
