"""Pixel encodings and decoders: round trips, likelihoods against mpmath, chunks, normalisation."""

import math

import mpmath as mp
import pytest
import torch

from vdm_diffusers import decoders
from vdm_diffusers.decoders import (
    PIXEL_ENCODINGS,
    bin_width,
    decode_pixels,
    discretized_gaussian_log_likelihood,
    encode_pixels,
    level_values,
    log_normal_mass,
    softmax_log_likelihood,
)
from vdm_diffusers.gaussian import alpha_sigma, diffuse

LEVELS = [2, 3, 17, 256, 65536]
SHAPE = (11, 7, 5, 3)


@pytest.fixture(autouse=True)
def _fifty_digits():
    with mp.workdps(50):
        yield


def random_levels(num_levels, shape=SHAPE, seed=0):
    return torch.randint(num_levels, shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def x_of(k, num_levels, pixel_encoding):
    k = mp.mpf(k)
    return 2 * (k + mp.mpf(1) / 2) / num_levels - 1 if pixel_encoding == "bin_center" else 2 * k / (num_levels - 1) - 1


@pytest.mark.parametrize("pixel_encoding", PIXEL_ENCODINGS)
@pytest.mark.parametrize("num_levels", LEVELS)
def test_round_trip_of_every_level(num_levels, pixel_encoding):
    k = torch.arange(num_levels)
    dtypes = [torch.float64, torch.float32]
    dtypes += [torch.float16] if num_levels <= 2048 else []
    dtypes += [torch.bfloat16] if num_levels <= 256 else []
    for dtype in dtypes:
        x = encode_pixels(k, num_levels, pixel_encoding, dtype)
        assert x.dtype == dtype and torch.equal(decode_pixels(x, num_levels, pixel_encoding), k)
        picks = [*k[:: max(1, num_levels // 257)].tolist(), num_levels - 1]
        for i in picks:
            exact = x_of(i, num_levels, pixel_encoding)
            assert abs(mp.mpf(float(x[i])) - exact) <= torch.finfo(dtype).eps / 2 * abs(exact)  # rounded once
    assert float(level_values(num_levels, pixel_encoding).diff().mean()) == pytest.approx(
        bin_width(num_levels, pixel_encoding), rel=1e-12
    )
    half = 0.49 * bin_width(num_levels, pixel_encoding)
    values = level_values(num_levels, pixel_encoding)
    for shift in (-half, half):
        assert torch.equal(decode_pixels(values + shift, num_levels, pixel_encoding), k)
    if num_levels <= 256:
        assert torch.equal(
            encode_pixels(k.to(torch.uint8), num_levels, pixel_encoding), encode_pixels(k, num_levels, pixel_encoding)
        )


def test_the_two_encodings_are_vdms_and_diffusers():
    k = torch.arange(256)
    torch.testing.assert_close(encode_pixels(k, 256, "bin_center", torch.float64), 2 * ((k.double() + 0.5) / 256) - 1)
    torch.testing.assert_close(encode_pixels(k, 256, "endpoint", torch.float64), k.double() / 127.5 - 1)
    assert level_values(256, "endpoint")[[0, -1]].tolist() == [-1.0, 1.0]
    assert decode_pixels(torch.tensor([-7.0, 7.0]), 17, "bin_center").tolist() == [0, 16]
    assert decode_pixels(torch.tensor([-7.0, 7.0]), 17, "endpoint").tolist() == [0, 16]


@pytest.mark.parametrize("path", ["vp", "ve", "flow"])
@pytest.mark.parametrize("pixel_encoding", PIXEL_ENCODINGS)
@pytest.mark.parametrize("num_levels", [2, 3, 17, 256])
def test_softmax_decoder_against_mpmath(num_levels, pixel_encoding, path):
    log_snr = torch.tensor([13.3, 4.0, -1.0], dtype=torch.float64)
    k = random_levels(num_levels, (3, 2, 2), seed=1)
    z = diffuse(
        encode_pixels(k, num_levels, pixel_encoding, torch.float64), randn(3, 2, 2, seed=2), log_snr, path=path
    )
    z[0, 0, 0] = -z[0, 0, 0] - 0.5  # a far tail
    got = softmax_log_likelihood(k, z, log_snr, num_levels=num_levels, pixel_encoding=pixel_encoding, path=path)
    assert got.shape == (3,) and got.dtype == torch.float64
    alpha, _ = alpha_sigma(log_snr, path)
    for b in range(3):
        total, size = mp.mpf(0), mp.mpf(0)
        for i in range(4):
            ratio = mp.mpf(float(z[b].flatten()[i])) / mp.mpf(float(alpha[b]))
            snr = mp.exp(mp.mpf(float(log_snr[b])))
            logits = [-snr / 2 * (ratio - x_of(j, num_levels, pixel_encoding)) ** 2 for j in range(num_levels)]
            largest = max(logits)
            log_z = largest + mp.log(mp.fsum(mp.exp(v - largest) for v in logits))
            value = logits[int(k[b].flatten()[i])] - log_z
            total, size = total + value, size + abs(value)
        assert abs(mp.mpf(float(got[b])) - total) <= 1e-13 * (size + 4)


@pytest.mark.parametrize("pixel_encoding", PIXEL_ENCODINGS)
@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_both_decoders_are_distributions(num_levels, pixel_encoding):
    z = torch.tensor([-3.0, -0.97, -0.2, 0.001, 1.0, 40.0], dtype=torch.float64)
    k = torch.arange(num_levels)
    kinds = {"num_levels": num_levels, "pixel_encoding": pixel_encoding}
    for value in z:
        spread = value.expand(num_levels)
        for log_snr in (13.3, 2.0, -5.0):
            assert float(softmax_log_likelihood(k, spread, log_snr, **kinds).exp().sum()) == pytest.approx(
                1, abs=1e-12
            )
        for variance in (1e-7, 1e-4, 0.02, 3.0):
            mass = discretized_gaussian_log_likelihood(k, spread, variance, **kinds).exp()
            assert float(mass.sum()) == pytest.approx(1, abs=1e-12)


def test_softmax_of_many_levels():
    k = random_levels(65536, (2, 3), seed=3)
    z = diffuse(encode_pixels(k, 65536, dtype=torch.float64), randn(2, 3, seed=4), 20.0)
    got = softmax_log_likelihood(k, z, 20.0, num_levels=65536)
    values = level_values(65536)
    alpha, sigma = alpha_sigma(20.0)
    log_probability = (-0.5 * ((z[..., None] - alpha * values) / sigma) ** 2).log_softmax(-1)
    torch.testing.assert_close(got, log_probability.gather(-1, k[..., None])[..., 0].sum(1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("chunk", [1, 600, 3000])
def test_chunks_change_nothing(chunk, monkeypatch):
    shape = (11, 5, 3)
    k = random_levels(17, shape, seed=5)
    z, log_snr = (
        encode_pixels(k, 17, dtype=torch.float64) + 0.1 * randn(*shape, seed=6),
        torch.linspace(-3, 9, 11).double(),
    )

    def value_and_gradients():
        inputs = z.clone().requires_grad_(), log_snr.clone().requires_grad_()
        value = softmax_log_likelihood(k, inputs[0], inputs[1], num_levels=17)
        return value.detach(), *torch.autograd.grad(value.square().sum(), inputs)

    whole = value_and_gradients()
    monkeypatch.setattr(decoders, "_CHUNK", chunk)
    for got, expected in zip(value_and_gradients(), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(softmax_log_likelihood(k[:0], z[:0], 1.0, num_levels=17), torch.zeros(0).double())


def reference_mass(lower, upper):
    """ln [Phi(upper) - Phi(lower)] by the complementary error function on the side where both are small."""
    lower, upper = mp.mpf(lower), mp.mpf(upper)
    if lower + upper > 0:
        lower, upper = -upper, -lower
    root = mp.sqrt(2)
    return mp.log((mp.erfc(-upper / root) - mp.erfc(-lower / root)) / 2)


def test_log_normal_mass_in_the_tails_and_of_narrow_intervals():
    for width, bound in ((1e-6, 1e-10), (1e-4, 1e-12), (1e-2, 1e-13), (0.3, 1e-13), (5.0, 1e-13), (100.0, 1e-13)):
        for middle in (0.0, 1e-3, 0.4, -1.0, 3.0, -7.0, 20.0, -40.0, 300.0, 1e5):
            lower, upper = middle - width / 2, middle + width / 2
            got = log_normal_mass(torch.tensor(lower, dtype=torch.float64), torch.tensor(upper, dtype=torch.float64))
            exact = reference_mass(lower, upper)
            assert abs(mp.mpf(float(got)) - exact) <= bound * max(1, abs(exact)), (width, middle)
    infinity = torch.tensor(math.inf, dtype=torch.float64)
    for value in (-40.0, -1.0, 0.0, 2.0, 9.0):
        edge = torch.tensor(value, dtype=torch.float64)
        exact = float(mp.log(mp.erfc(-mp.mpf(value) / mp.sqrt(2)) / 2))
        assert float(log_normal_mass(-infinity, edge)) == pytest.approx(exact, rel=1e-13)
        assert float(log_normal_mass(-edge, infinity)) == pytest.approx(exact, rel=1e-13)
    assert float(log_normal_mass(-infinity, infinity)) == 0.0


@pytest.mark.parametrize("pixel_encoding", PIXEL_ENCODINGS)
@pytest.mark.parametrize("num_levels", [2, 17, 256, 65536])
def test_discretized_gaussian_against_mpmath(num_levels, pixel_encoding):
    k = torch.tensor([[0, num_levels - 1, num_levels // 2], [num_levels // 3, 0, num_levels - 1]])
    mean = torch.tensor([[-0.9, 0.2, 0.6], [-0.3, 1.3, -1.4]], dtype=torch.float64)
    half = mp.mpf(1) / num_levels if pixel_encoding == "bin_center" else mp.mpf(1) / (num_levels - 1)
    for variance in (
        torch.tensor(0.3),
        torch.tensor([1e-4, 0.02]),
        torch.tensor([[1e-3, 1.0, 0.1], [2.0, 1e-2, 4e-4]]),
    ):
        variance = variance.double()
        got = discretized_gaussian_log_likelihood(
            k, mean, variance, num_levels=num_levels, pixel_encoding=pixel_encoding
        )
        each = variance if variance.ndim == 2 else variance.reshape(-1, 1).expand(2, 3)
        for b in range(2):
            total = mp.mpf(0)
            for i in range(3):
                level, center = int(k[b, i]), x_of(int(k[b, i]), num_levels, pixel_encoding)
                deviation = mp.sqrt(mp.mpf(float(each[b, i])))
                lower = -mp.inf if level == 0 else (center - half - mp.mpf(float(mean[b, i]))) / deviation
                upper = mp.inf if level == num_levels - 1 else (center + half - mp.mpf(float(mean[b, i]))) / deviation
                total += reference_mass(lower, upper)
            assert float(got[b]) == pytest.approx(float(total), rel=1e-10)


def test_discretized_gaussian_in_far_tails_stays_finite_with_its_gradient():
    k = torch.tensor([[0, 255, 128]])
    mean = torch.tensor([[1.0, -1.0, 0.9]], dtype=torch.float64, requires_grad=True)
    value = discretized_gaussian_log_likelihood(k, mean, 1e-10)
    (gradient,) = torch.autograd.grad(value.sum(), mean)
    assert bool(value.isfinite().all()) and float(value.detach()) < -1e9
    assert bool(gradient.isfinite().all()) and [float(v) for v in gradient.sign()[0]] == [-1.0, 1.0, -1.0]


def test_low_precision_data_and_gradients():
    k = random_levels(17, (3, 2), seed=7)
    z = (encode_pixels(k, 17, dtype=torch.float64) + 0.05 * randn(3, 2, seed=8)).to(torch.bfloat16)
    exact = softmax_log_likelihood(k, z.double(), 5.0, num_levels=17)
    assert torch.equal(softmax_log_likelihood(k, z, 5.0, num_levels=17), exact)  # computed in float64 whatever z is
    z = z.double().requires_grad_()
    log_snr = torch.tensor([5.0, 1.0, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z, log_snr: softmax_log_likelihood(k, z, log_snr, num_levels=17), (z, log_snr)
    )
    variance = torch.tensor([0.3, 0.02, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m, v: discretized_gaussian_log_likelihood(k, m, v, num_levels=17), (z, variance)
    )


def test_compiles_whole():
    k, z, log_snr = random_levels(17, (3, 2), seed=9), randn(3, 2, seed=10), torch.tensor([5.0, 1.0, -2.0]).double()

    def both(k, z, log_snr):
        x = encode_pixels(decode_pixels(z, 17), 17)
        softmax = softmax_log_likelihood(k, z, log_snr, num_levels=17)
        return x, softmax, discretized_gaussian_log_likelihood(k, z, torch.exp(-log_snr), num_levels=17)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(k, z, log_snr), both(k, z, log_snr), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k, z: encode_pixels(z), "must hold integers 0..255, got dtype torch.float64"),
        (lambda k, z: encode_pixels(k > 3), "got dtype torch.bool"),
        (lambda k, z: encode_pixels(k, 3), r"`levels` must lie in 0..2, got 0..16. Is `num_levels` right"),
        (lambda k, z: encode_pixels(k - 1, 17), "got -1..15"),
        (lambda k, z: encode_pixels(k, 1), "at least 2, got 1"),
        (lambda k, z: encode_pixels(k, 17, "centre"), "must be one of bin_center, endpoint, got 'centre'"),
        (lambda k, z: bin_width(17, "centre"), "got 'centre'"),
        (lambda k, z: decode_pixels(z / 0, 17), "not finite"),
        (lambda k, z: decode_pixels(z, 17, "centre"), "got 'centre'"),
        (lambda k, z: softmax_log_likelihood(k, z[:1], 1.0, num_levels=17), r"data's shape \(1, 17\), got \(2, 17\)"),
        (lambda k, z: softmax_log_likelihood(z, z, 1.0, num_levels=17), "likelihoods are of integers"),
        (lambda k, z: softmax_log_likelihood(k, z, 1.0, num_levels=16), "must lie in 0..15"),
        (lambda k, z: softmax_log_likelihood(k, z, math.inf, num_levels=17), "`log_snr_0` must be finite"),
        (lambda k, z: softmax_log_likelihood(k, z, torch.zeros(3), num_levels=17), "does not go with"),
        (lambda k, z: discretized_gaussian_log_likelihood(k, z, 0.0, num_levels=17), "`variance` must be positive"),
        (lambda k, z: discretized_gaussian_log_likelihood(k, z, 1.0, num_levels=4), "must lie in 0..3"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.arange(17).repeat(2, 1), torch.ones(2, 17, dtype=torch.float64))
