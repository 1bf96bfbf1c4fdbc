"""Conversions between prediction types: truth, round trips, where they are undefined, weight ratios."""

import itertools
import math

import mpmath as mp
import pytest
import torch

from vdm_diffusers.gaussian import alpha_sigma, diffuse
from vdm_diffusers.prediction import (
    PREDICTION_TYPES,
    check_prediction_type,
    conversion_coefficients,
    convert,
    loss_weight_ratio,
    prediction_target,
    target_coefficients,
)

PATHS = ["vp", "ve", "flow"]
PAIRS = list(itertools.product(PREDICTION_TYPES, repeat=2))
SHAPE = (11, 7, 5, 3)
LOG_SNR = torch.tensor([-30.0, -13.3, -5.0, -1.0, -0.01, 0.0, 0.7, 3.0, 5.0, 13.3, 30.0], dtype=torch.float64)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def targets(x, eps, log_snr, path):
    """What each type means, written out one by one."""
    alpha, sigma = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in alpha_sigma(log_snr, path))
    return {
        "sample": x,
        "epsilon": eps,
        "v_prediction": alpha * eps - sigma * x,
        "score": -eps / sigma,
        "flow_prediction": eps - x,
    }


def rounding_scale(x, eps, log_snr, source, target, path):
    """|A z| + |B y| + |y'| with every sum replaced by that of its terms' sizes: what rounding errors are relative
    to.
    """
    shape = (-1, *[1] * (x.ndim - 1))

    def size(row):
        a, b = row
        return a.reshape(shape).abs() * x.abs() + b.reshape(shape).abs() * eps.abs()

    a, b = conversion_coefficients(log_snr, source=source, target=target, path=path)
    of_source, of_target = (size(target_coefficients(log_snr, t, path=path)) for t in (source, target))
    return a.reshape(shape).abs() * size(alpha_sigma(log_snr, path)) + b.reshape(shape).abs() * of_source + of_target


def test_there_are_five():
    assert PREDICTION_TYPES == ("sample", "epsilon", "v_prediction", "score", "flow_prediction")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("source, target", PAIRS)
def test_conversion_gives_the_target(source, target, path):
    x, eps = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    z_t = diffuse(x, eps, LOG_SNR, path=path)
    types = targets(x, eps, LOG_SNR, path)
    torch.testing.assert_close(
        prediction_target(x, eps, LOG_SNR, source, path=path), types[source], rtol=1e-13, atol=1e-15
    )
    got = convert(types[source], z_t, LOG_SNR, source=source, target=target, path=path)
    error = (got - types[target]).abs()
    assert bool((error <= 2e-15 * rounding_scale(x, eps, LOG_SNR, source, target, path)).all())
    moderate = slice(2, 9)  # |log SNR| <= 5
    torch.testing.assert_close(got[moderate], types[target][moderate], rtol=1e-11, atol=1e-12)
    # one log SNR for all, and the order of the batch
    one = convert(types[source][3], z_t[3], LOG_SNR[3], source=source, target=target, path=path)
    assert torch.equal(one, got[3])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("source, target", PAIRS)
def test_round_trip(source, target, path):
    # of any value: a network's output is no target
    value, z_t = randn(*SHAPE, seed=3), randn(*SHAPE, seed=4)
    there = convert(value, z_t, LOG_SNR, source=source, target=target, path=path)
    back = convert(there, z_t, LOG_SNR, source=target, target=source, path=path)
    a, b = (
        c.reshape(-1, 1, 1, 1).abs() for c in conversion_coefficients(LOG_SNR, source=source, target=target, path=path)
    )
    c, d = (
        c.reshape(-1, 1, 1, 1).abs() for c in conversion_coefficients(LOG_SNR, source=target, target=source, path=path)
    )
    bound = 8e-16 * (c * z_t.abs() + d * (a * z_t.abs() + b * value.abs()) + value.abs())
    assert bool(((back - value).abs() <= 4 * bound).all())
    if source == target:
        assert there is value


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("source, target", PAIRS)
def test_coefficients_against_mpmath(source, target, path):
    with mp.workdps(60):
        got = conversion_coefficients(LOG_SNR, source=source, target=target, path=path)
        for i, log_snr in enumerate(LOG_SNR.tolist()):
            root = mp.exp(mp.mpf(log_snr) / 2)
            alpha, sigma = {
                "vp": lambda r: (r / mp.sqrt(1 + r**2), 1 / mp.sqrt(1 + r**2)),
                "ve": lambda r: (mp.mpf(1), 1 / r),
                "flow": lambda r: (r / (1 + r), 1 / (1 + r)),
            }[path](root)
            rows = {
                "sample": (1, 0),
                "epsilon": (0, 1),
                "v_prediction": (-sigma, alpha),
                "score": (0, -1 / sigma),
                "flow_prediction": (-1, 1),
            }
            # solve A (alpha, sigma) + B (a, b) = (a', b')
            system = mp.matrix([[alpha, rows[source][0]], [sigma, rows[source][1]]])
            reference = mp.lu_solve(system, mp.matrix(rows[target]))
            for value, exact in zip((got[0][i], got[1][i]), reference, strict=True):
                # between v and flow the first coefficient is a difference of alpha and sigma, and zero where they are
                # equal
                scale = max(abs(exact), abs(rows[target][0]) if path == "vp" else 0, mp.mpf(10) ** -40)
                assert abs(mp.mpf(float(value)) - exact) <= 2e-15 * max(scale, abs(reference[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    value, z_t = randn(*SHAPE, seed=5, dtype=dtype), randn(*SHAPE, seed=6, dtype=dtype)
    log_snr = LOG_SNR.clamp(-5, 5)
    for source, target in PAIRS:
        got = convert(value, z_t, log_snr, source=source, target=target)
        exact = convert(value.double(), z_t.double(), log_snr, source=source, target=target)
        a, b = (c.reshape(-1, 1, 1, 1).abs() for c in conversion_coefficients(log_snr, source=source, target=target))
        size = a * z_t.double().abs() + b * value.double().abs()
        bound = 2 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps / 2 * exact.abs()
        assert got.dtype == dtype and bool(
            ((got.double() - exact).abs() <= bound + torch.finfo(dtype).smallest_normal).all()
        )


# (log_snr, source) -> the targets that it does not determine
UNDEFINED = {
    (-math.inf, "sample"): set(),
    (-math.inf, "epsilon"): {"sample", "v_prediction", "flow_prediction"},
    (-math.inf, "v_prediction"): set(),
    (-math.inf, "score"): {"sample", "v_prediction", "flow_prediction"},
    (-math.inf, "flow_prediction"): set(),
    (math.inf, "sample"): {"epsilon", "v_prediction", "score", "flow_prediction"},
    (math.inf, "epsilon"): {"score"},
    (math.inf, "v_prediction"): {"score"},
    (math.inf, "score"): {"epsilon", "v_prediction", "flow_prediction"},
    (math.inf, "flow_prediction"): {"score"},
}


@pytest.mark.parametrize("path", ["vp", "flow"])
@pytest.mark.parametrize("log_snr, source", UNDEFINED)
def test_the_two_ends(log_snr, source, path):
    x, eps = randn(2, 3, seed=7), randn(2, 3, seed=8)
    clean = log_snr > 0
    alpha, sigma = (1.0, 0.0) if clean else (0.0, 1.0)
    z_t = alpha * x + sigma * eps
    truth = {"sample": x, "epsilon": eps, "v_prediction": alpha * eps - sigma * x, "flow_prediction": eps - x}
    truth["score"] = torch.full_like(x, math.nan) if clean else -eps
    value = torch.zeros_like(x) if source == "score" and clean else truth[source]
    for target in PREDICTION_TYPES:
        if target == source:
            assert convert(value, z_t, log_snr, source=source, target=target, path=path) is value
            assert float(loss_weight_ratio(log_snr, source=source, target=target, path=path)) == 1.0
        elif target in UNDEFINED[log_snr, source]:
            end = r"\+inf" if clean else "-inf"
            with pytest.raises(ValueError, match=f"'{source}' does not determine '{target}' at log_snr = {end}"):
                convert(value, z_t, log_snr, source=source, target=target, path=path)
            mixed = torch.tensor([0.0, log_snr])  # one of a batch suffices
            with pytest.raises(ValueError, match="does not determine"):
                loss_weight_ratio(mixed, source=source, target=target, path=path)
        else:
            got = convert(value, z_t, log_snr, source=source, target=target, path=path)
            torch.testing.assert_close(got, truth[target], rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("source, target", PAIRS)
def test_loss_weight_ratio_is_the_ratio_of_the_errors(source, target, path):
    log_snr = LOG_SNR.clamp(-8, 8)
    x, eps = randn(*SHAPE, seed=9), randn(*SHAPE, seed=10)
    z_t = diffuse(x, eps, log_snr, path=path)
    types = targets(x, eps, log_snr, path)
    output = types[source] + randn(*SHAPE, seed=11)
    read = convert(output, z_t, log_snr, source=source, target=target, path=path)
    actual = ((read - types[target]) ** 2).flatten(1).sum(1) / ((output - types[source]) ** 2).flatten(1).sum(1)
    torch.testing.assert_close(
        loss_weight_ratio(log_snr, source=source, target=target, path=path), actual, rtol=1e-9, atol=0
    )


def test_known_ratios():
    snr = LOG_SNR.exp()
    for path in PATHS:
        ratio = loss_weight_ratio(LOG_SNR, source="epsilon", target="sample", path=path)
        torch.testing.assert_close(ratio, 1 / snr, rtol=1e-13, atol=0)
    ratio = loss_weight_ratio(LOG_SNR, source="v_prediction", target="sample")
    torch.testing.assert_close(ratio, 1 / (1 + snr), rtol=1e-13, atol=0)


def test_gradients_and_compilation():
    value, z_t = randn(3, 2, seed=12).requires_grad_(), randn(3, 2, seed=13).requires_grad_()
    log_snr = torch.tensor([-2.0, 0.3, 4.0], dtype=torch.float64, requires_grad=True)
    for path in PATHS:
        for source, target in PAIRS:

            def function(value, z_t, log_snr, source=source, target=target, path=path):
                return convert(value, z_t, log_snr, source=source, target=target, path=path)

            if source != target:
                assert torch.autograd.gradcheck(function, (value, z_t, log_snr))
    torch._dynamo.reset()

    def all_types(value, z_t, log_snr):
        return [convert(value, z_t, log_snr, source="v_prediction", target=target) for target in PREDICTION_TYPES]

    compiled = torch.compile(all_types, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(value, z_t, log_snr), all_types(value, z_t, log_snr), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: convert(y, y, 0.0, source="eps", target="sample"), "must be one of sample, .*got 'eps'"),
        (lambda y: convert(y, y, 0.0, source="eps", target="eps"), "got 'eps'"),
        (lambda y: convert(y, y, 0.0, source="sample", target="x"), "got 'x'"),
        (lambda y: convert(y, y, 0.0, source="sample", target="epsilon", path="sub-vp"), "`path` must be"),
        (lambda y: convert(y, y[:, :1], 0.0, source="sample", target="epsilon"), "same shape"),
        (lambda y: convert(y, y, torch.zeros(5), source="sample", target="epsilon"), "does not go with"),
        (lambda y: target_coefficients(0.0, "noise"), "got 'noise'"),
        (lambda y: check_prediction_type("noise"), "got 'noise'"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 3, 2))
