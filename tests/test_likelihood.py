"""The estimators of the core against exact answers: data that are N known images, and quadrature in mpmath."""

import math

import mpmath
import pytest
import torch
from exact_models import GaussianMixture

from vdm_diffusers.decoders import decode_pixels, encode_pixels, level_values, softmax_log_likelihood
from vdm_diffusers.likelihood import (
    ContinuousTerm,
    DenoisingModel,
    DiscreteTerm,
    GaussianDecoder,
    SoftmaxDecoder,
    evaluate_bound,
    expected_softmax_nats,
)
from vdm_diffusers.likelihood.rounds import fit_controls
from vdm_diffusers.noise_schedules import TabulatedNoiseSchedule, make_betas
from vdm_diffusers.reverse_variance import forward_variance, posterior_variance

LOG_SNR_MAX, LOG_SNR_MIN = 13.3, -5.0


def known_images(count=24, shape=(2, 3, 4), num_levels=256, seed=0):
    """N images and the exact denoiser of data that are these with equal probability."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, num_levels, (count, *shape), generator=generator)
    return levels, GaussianMixture.points(encode_pixels(levels, num_levels, dtype=torch.float64))


def exact_model(data, prediction_type="epsilon", num_levels=256, **kwargs):
    def predict(z_t, log_snr, index):
        return data.predict(z_t, log_snr, prediction_type).float()

    return DenoisingModel(predict, prediction_type, num_levels=num_levels, **kwargs)


def mixture(count=32):
    """Four smooth images of 8x8 with noise: a mixture of Gaussians, and integers drawn from it."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64)
    means = 0.4 * torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bicubic")
    data = GaussianMixture(means, torch.full((4,), 0.05**2).double(), torch.full((4,), 0.25).double())
    return data, decode_pixels(data.sample(count, generator))


def bound(model, levels, term, decoder=None, **kwargs):
    decoder = SoftmaxDecoder(LOG_SNR_MAX) if decoder is None else decoder
    return evaluate_bound(model, levels, term, decoder, LOG_SNR_MIN, **kwargs)


def chain(num_steps, reverse_variance="posterior"):
    return DiscreteTerm(torch.linspace(LOG_SNR_MAX, LOG_SNR_MIN, num_steps + 1, dtype=torch.float64), reverse_variance)


# --- the reconstruction term -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log_snr_0", "num_levels", "level", "encoding"),
    [(13.3, 256, 0, "bin_center"), (13.3, 256, 100, "endpoint"), (4.0, 17, 16, "bin_center"), (9.0, 256, 3, "bin_center"),
     (30.0, 5, 2, "endpoint"), (-3.0, 2, 1, "bin_center"), (14.0, 65536, 7, "endpoint")],
)  # fmt: skip
def test_expected_softmax_nats_is_the_integral(log_snr_0, num_levels, level, encoding):
    reach, step = (3000, mpmath.mpf(1)) if num_levels > 1000 else (48, mpmath.mpf(1) / 32)
    levels = level_values(num_levels, encoding)
    own = mpmath.mpf(float(levels[level]))
    near = [mpmath.mpf(float(v)) for v in levels[max(0, level - reach) : level + reach]]  # farther ones have no mass

    with mpmath.workdps(20):
        snr = mpmath.exp(mpmath.mpf(log_snr_0))
        expected = mpmath.mpf(0)
        for i in range(-int(9 / step), int(9 / step) + 1):
            r = own + i * step / mpmath.sqrt(snr)
            logits = [-snr / 2 * ((r - v) ** 2 - (r - own) ** 2) for v in near]
            expected += mpmath.log(mpmath.fsum(map(mpmath.exp, logits))) * mpmath.npdf(i * step) * step
    tolerance = 1e-6 if num_levels > 1000 else 1e-11  # the trapezoidal rule of step 1 is good to 3e-9
    assert float(expected_softmax_nats(log_snr_0, num_levels, encoding)[level]) == pytest.approx(
        float(expected), rel=tolerance, abs=1e-12
    )


def test_expected_softmax_nats_is_the_mean_of_the_decoder():
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (200_000, 1), generator=generator)
    alpha, sigma = torch.sigmoid(torch.tensor(11.0)).sqrt(), torch.sigmoid(torch.tensor(-11.0)).sqrt()
    noise = torch.randn(levels.shape, generator=generator, dtype=torch.float64)
    z_0 = alpha * encode_pixels(levels, dtype=torch.float64) + sigma * noise
    drawn = -softmax_log_likelihood(levels, z_0, 11.0)
    difference = drawn - expected_softmax_nats(11.0, 256, "bin_center")[levels[:, 0]]
    assert abs(float(difference.mean())) < 5 * float(difference.std()) / math.sqrt(len(levels))


# --- the bound against the truth -------------------------------------------------------------------------------------


def expected_continuous(levels, data, report):
    """-ln p + reconstruction + prior - I(x; z_1), for the mean over all N images (I-MMSE: Guo, Shamai & Verdu
    2005).
    """
    information, error = data.information(LOG_SNR_MIN, 20_000, torch.Generator().manual_seed(1))
    nats = math.log(len(levels)) - information + float(report.prior.mean() + report.reconstruction.mean())
    scale = report.num_dims * math.log(2)
    return nats / scale, error / scale


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "score", "flow_prediction"])
def test_continuous_bound_is_the_truth_for_known_images(prediction_type):
    levels, data = known_images()
    report = bound(
        exact_model(data, prediction_type),
        levels,
        ContinuousTerm(LOG_SNR_MAX, LOG_SNR_MIN),
        num_samples=256,
        seed=3,
        batch_size=1024,
    )
    expected, error = expected_continuous(levels, data, report)
    assert report.standard_error < 0.02
    assert abs(report.bits_per_dim - expected) < 4 * math.hypot(report.standard_error, error)
    assert math.log2(len(levels)) / 24 < expected < math.log2(len(levels)) / 24 + 0.02
    assert report.num_model_evaluations == 24 * 256


@pytest.mark.slow
def test_standard_error_is_the_scatter_of_repetitions():
    levels, data = known_images(count=40)
    model = exact_model(data)
    for term in (ContinuousTerm(LOG_SNR_MAX, LOG_SNR_MIN), chain(50)):
        reports = [bound(model, levels, term, num_samples=16, seed=seed, batch_size=1024) for seed in range(200)]
        values = torch.tensor([r.bits_per_dim for r in reports])
        claimed = torch.tensor([r.standard_error for r in reports]).square().mean().sqrt()
        assert float(values.std() / claimed) == pytest.approx(1, abs=0.25)  # 200 repetitions: 5% each


def test_discrete_bound_falls_towards_the_continuous_one():
    levels, data = known_images()
    model = exact_model(data)
    reports = [bound(model, levels, chain(steps), num_samples=1600, batch_size=2048) for steps in (4, 16, 64)]
    expected, _ = expected_continuous(levels, data, reports[0])
    excess = [r.bits_per_dim - expected for r in reports]
    for i in range(2):
        assert excess[i] - excess[i + 1] > 4 * math.hypot(reports[i].standard_error, reports[i + 1].standard_error)
    assert excess[-1] > -4 * reports[-1].standard_error


@pytest.mark.parametrize("discrete", [False, True])
def test_variance_reduction_is_unbiased_and_reduces(discrete):
    """Smooth images, whose spectrum the linear denoiser knows; the truth is that of the mixture's continuous bound."""
    data, levels = mixture()
    model = exact_model(data)
    term = chain(60) if discrete else ContinuousTerm(LOG_SNR_MAX, LOG_SNR_MIN)
    plain = bound(model, levels, term, num_samples=480, variance_reduction=False, batch_size=2048)
    short = [bound(model, levels, term, num_samples=48, seed=seed, batch_size=2048) for seed in range(1, 7)]
    values = torch.tensor([r.bits_per_dim for r in short])
    error = math.sqrt(sum(r.standard_error**2 for r in short)) / 6
    assert error < plain.standard_error / 1.5  # from six tenths of the evaluations
    assert abs(float(values.mean()) - plain.bits_per_dim) < 4 * math.hypot(error, plain.standard_error)
    assert float(values.std()) < 2.5 * short[0].standard_error


def test_target_standard_error_and_its_limit():
    data, levels = mixture()
    model, term = exact_model(data), ContinuousTerm(LOG_SNR_MAX, LOG_SNR_MIN)
    report = bound(model, levels, term, target_standard_error=0.01, batch_size=2048)
    assert 0.003 < report.standard_error <= 0.0125  # another part of the evaluations decides
    limited = bound(
        model, levels, term, target_standard_error=1e-4, max_model_evaluations=20 * len(levels), batch_size=2048
    )
    assert limited.standard_error > 1e-4 and limited.num_model_evaluations == 20 * len(levels)


def test_a_subset_of_steps_is_unbiased():
    levels, data = known_images()
    model = exact_model(data)
    whole = bound(model, levels, chain(40), num_samples=400, seed=1, batch_size=1024)
    subset = bound(model, levels, chain(40), num_samples=39, seed=2, batch_size=1024)
    assert abs(whole.bits_per_dim - subset.bits_per_dim) < 4 * math.hypot(whole.standard_error, subset.standard_error)


def test_more_evaluations_never_make_it_worse():
    """No cliff where there is an evaluation for every step: the scatter falls like the root of their number."""
    levels, data = known_images(count=4, shape=(1, 2, 2))
    model = exact_model(data)
    scatter = []
    for number in (15, 30, 60, 120):
        reports = [
            bound(model, levels, chain(30), num_samples=number, seed=seed, batch_size=2048) for seed in range(16)
        ]
        assert {r.num_model_evaluations for r in reports} == {4 * number}
        scatter.append(float(torch.tensor([r.bits_per_dim for r in reports]).std()))
        claimed = torch.tensor([r.standard_error for r in reports]).square().mean().sqrt()
        assert 0.5 < scatter[-1] / claimed < 1.7  # 16 repetitions: 18%
    assert scatter[3] < scatter[2] * 1.4 < scatter[1] * 1.96 < scatter[0] * 2.744
    assert scatter[3] < scatter[0] / 1.7


@pytest.mark.parametrize(
    ("count", "term", "options"),
    [
        (1, "continuous", {"target_standard_error": 0.1}),
        (2, "discrete", {"num_samples": 30}),
        pytest.param(1, "discrete", {"target_standard_error": 0.05}, marks=pytest.mark.slow),
        pytest.param(8, "continuous", {"target_standard_error": 0.03}, marks=pytest.mark.slow),
        pytest.param(1, "continuous", {"num_samples": 64}, marks=pytest.mark.slow),
        pytest.param(2, "discrete", {"num_samples": 2}, marks=pytest.mark.slow),
        pytest.param(2, "discrete", {"num_samples": 60}, marks=pytest.mark.slow),
    ],
)
def test_neither_stopping_nor_the_merging_of_rounds_moves_the_bound(count, term, options):
    """z scores over repetitions.

    Rounds that were merged by their own errors lay 13 standard errors below the truth.
    """
    levels, data = known_images(count=8, shape=(1, 2, 2))
    model = exact_model(data)
    chosen = ContinuousTerm(LOG_SNR_MAX, LOG_SNR_MIN) if term == "continuous" else chain(30)
    truth = bound(model, levels[:count], chosen, num_samples=20_000 // count, seed=10**6, batch_size=4096)
    reports = [bound(model, levels[:count], chosen, seed=seed, batch_size=2048, **options) for seed in range(32)]
    values = torch.tensor([r.bits_per_dim for r in reports], dtype=torch.float64)
    error = math.hypot(float(values.std()) / math.sqrt(32), truth.standard_error)
    assert abs(float(values.mean()) - truth.bits_per_dim) < 5 * error
    claimed = torch.tensor([r.standard_error for r in reports]).square().mean().sqrt()
    assert 0.6 < float(values.std() / claimed) < 1.5


def test_the_known_integral_is_exact_where_the_denoiser_by_pixels_sets_in():
    """With 256 levels its mean jumps inside the range; an interval of the quadrature must not cross the jump."""
    levels, data = known_images(count=2, shape=(1, 4, 4))
    model = exact_model(data)
    term = ContinuousTerm(LOG_SNR_MAX, LOG_SNR_MIN)
    controls = fit_controls(model, levels, term)
    (jump,) = controls.jumps.tolist()
    assert term.log_snr_min < jump < term.log_snr_max

    def known(log_snr, weight):
        means = torch.zeros(len(log_snr), controls.num_means, dtype=torch.float64)
        means[:, 2] = weight
        return controls.known_sum(model.encode(levels), levels, log_snr, means)

    fine = torch.linspace(jump, term.log_snr_max, 40_001, dtype=torch.float64)  # Simpson's rule, above the jump alone
    simpson = torch.ones(len(fine), dtype=torch.float64)
    simpson[1:-1:2], simpson[2:-1:2] = 4, 2
    expected = known(fine, simpson * float(fine[1] - fine[0]) / 3)
    torch.testing.assert_close(known(*term.quadrature(controls.jumps)), expected, rtol=1e-6, atol=1e-6)


# --- DDPM's chain ----------------------------------------------------------------------------------------------------


def ddpm(data, learned=None, steps=1000, num_levels=256, fraction=0.0):
    table = TabulatedNoiseSchedule.from_betas(make_betas("linear", steps)).table
    low, high = float(posterior_variance(table[0], table[1])), float(forward_variance(math.inf, table[0]))
    decoder = GaussianDecoder(float(table[0]), low, high, learned)

    def predict(z_t, log_snr, index):
        eps = data.predict(z_t, log_snr, "epsilon").float()
        return eps if learned is None else torch.cat([eps, torch.full_like(eps, fraction)], dim=1)

    model = DenoisingModel(predict, "epsilon", num_levels, "endpoint", learned_variance=learned)
    return model, table, decoder


def known_endpoint_images():
    levels, _ = known_images(count=16, shape=(1, 4, 3))
    return levels, GaussianMixture.points(encode_pixels(levels, 256, "endpoint", torch.float64))


def test_ddpm_chain_bounds_the_truth_and_its_subset_is_unbiased():
    levels, data = known_endpoint_images()
    model, table, decoder = ddpm(data)
    whole, subset = (
        evaluate_bound(model, levels, DiscreteTerm(table), decoder, float(table[-1]), num_samples=n, batch_size=2048)
        for n in (2000, 200)
    )
    assert whole.bits_per_dim > math.log2(16) / 12
    assert abs(whole.bits_per_dim - subset.bits_per_dim) < 4 * math.hypot(whole.standard_error, subset.standard_error)
    for report in (whole, subset):
        torch.testing.assert_close(report.nats, report.prior + report.diffusion + report.reconstruction)
    # the decoder's own term, from its definition: x_hat at x_1 is the image itself here
    sd, half = math.sqrt(decoder.variance), 1 / 255
    inner = -math.log(math.erf(half / sd / math.sqrt(2)))
    outer = -math.log(0.5 + 0.5 * math.erf(half / sd / math.sqrt(2)))
    at_edge = ((levels == 0) | (levels == 255)).flatten(1).sum(1)
    expected = at_edge * outer + (12 - at_edge) * inner
    torch.testing.assert_close(whole.reconstruction, expected.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("fraction", "fixed"), [(-1.0, "posterior"), (1.0, "forward")])
def test_the_ends_of_a_learned_range_are_the_fixed_variances(fraction, fixed):
    _, table, _ = ddpm(known_endpoint_images()[1], steps=60)
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(60, 1, 4, 3, generator=generator, dtype=torch.float64)
    to_x = torch.rand(60, generator=generator, dtype=torch.float64)
    site = torch.arange(1.0, 60, dtype=torch.float64)
    own, learned = (
        DiscreteTerm(table, kind).nats(site, error[1:], to_x[1:], torch.full_like(error[1:], fraction))
        for kind in (fixed, "learned_range")
    )
    torch.testing.assert_close(own, learned, rtol=1e-9, atol=1e-12)


# --- accounting ------------------------------------------------------------------------------------------------------


def test_the_result_does_not_depend_on_the_batch_size():
    levels, data = known_images(count=70, shape=(1, 2, 3))
    model = exact_model(data)
    term = ContinuousTerm(LOG_SNR_MAX, LOG_SNR_MIN)
    done = []
    a = bound(model, levels, term, num_samples=7, seed=5, batch_size=3, progress=done.append)
    b = bound(model, levels, term, num_samples=7, seed=5, batch_size=1000)
    torch.testing.assert_close(a.nats, b.nats, rtol=1e-5, atol=1e-5)
    assert a.standard_error == pytest.approx(b.standard_error, rel=1e-4)
    assert sum(done) == a.num_model_evaluations == 70 * 7
    assert not torch.equal(a.nats, bound(model, levels, term, num_samples=7, seed=6).nats)


def test_one_image():
    levels, data = known_images()
    report = bound(exact_model(data), levels[:1], ContinuousTerm(LOG_SNR_MAX, LOG_SNR_MIN), num_samples=64)
    assert math.isnan(report.sampling_error)
    assert report.to_dict()["sampling_error"] is None
    assert 0 < report.standard_error < 0.3
    assert abs(report.bits_per_dim - math.log2(24) / 24) < 5 * report.standard_error + 0.02


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, k: bound(m, k[:0], chain(5)), "holds no image"),
        (lambda m, k: bound(m, k + 256, chain(5)), "levels in 0..255, got 2"),
        (lambda m, k: bound(m, k, chain(5), target_standard_error=0.0), "must be positive"),
        (lambda m, k: bound(m, k, chain(5), max_model_evaluations=10), "16 x 3 = 48, got 10"),
        (lambda m, k: bound(m, k, chain(5), num_samples=1), "at least 2, got 1"),
        (lambda m, k: bound(m, k, chain(5), GaussianDecoder(9.0, 1e-5), num_samples=3), "at least 4, got 3"),
        (lambda m, k: ContinuousTerm(10.0, -math.inf), "zero terminal SNR"),
        (lambda m, k: DiscreteTerm(torch.tensor([-5.0, 5.0])), "decreasing"),
    ],
)
def test_refusals(call, message):
    levels, data = known_images(count=3)
    with pytest.raises(ValueError, match=message):
        call(exact_model(data), levels)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda z: z[:, :1], "the sample's shape"),
        (lambda z: z * math.nan, "not finite"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(output, message):
    levels, _ = known_images(count=3)
    with pytest.raises(ValueError, match=message):
        bound(DenoisingModel(lambda z, log_snr, index: output(z), "epsilon"), levels, chain(5))


def test_bands_and_errors_of_single_images():
    """Octaves add up to the diffusion term, and an image's own error is the scatter of many seeds."""
    data, levels = mixture(24)
    model, term = exact_model(data), ContinuousTerm(LOG_SNR_MAX, LOG_SNR_MIN)
    runs = [bound(model, levels, term, num_samples=16, seed=seed) for seed in range(20)]
    edges = runs[0].log_snr_edges
    assert float(edges.diff().max()) == pytest.approx(2 * math.log(2))
    assert float(edges[0]) < -3.5 and float(edges[-1]) > 12
    plain = bound(model, levels, term, num_samples=16, variance_reduction=False)
    torch.testing.assert_close(plain.nats_by_log_snr.sum(1), plain.diffusion, atol=1e-9, rtol=0)
    scatter = torch.stack([r.nats for r in runs]).var(0).mean().sqrt()
    stated = torch.stack([r.nats_error for r in runs]).square().mean().sqrt()
    assert float(stated / scatter) == pytest.approx(1, abs=0.35)
