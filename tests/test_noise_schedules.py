"""Noise schedules: log SNR against mpmath, exact ends, derivative, inverse, errors."""

import math

import mpmath as mp
import pytest
import torch

from vdm_diffusers.noise_schedules import (
    CosineSchedule,
    LinearLogSNRSchedule,
    ShiftedSchedule,
    TabulatedNoiseSchedule,
    check_end_points,
    log_snr_from_betas,
    log_snr_from_timestep,
    make_betas,
    timestep_from_log_snr,
)

NAMES = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"]
SCHEDULES = {
    "linear": LinearLogSNRSchedule(),
    "linear_odd": LinearLogSNRSchedule(7.3, -9.1),
    "cosine": CosineSchedule(),
    "cosine_wide": CosineSchedule(40.0, -30.0),
    "cosine_unbounded": CosineSchedule(math.inf, -math.inf),
    "shifted": ShiftedSchedule(CosineSchedule(), -2 * math.log(4)),
    "ddpm": TabulatedNoiseSchedule.from_betas(make_betas("linear", 1000)),
    "two_entries": TabulatedNoiseSchedule(torch.tensor([3.0, -2.0])),
}


@pytest.fixture(autouse=True)
def _fifty_digits():
    with mp.workdps(50):
        yield


def reference_betas(name, T, beta_start=1e-4, beta_end=0.02):
    """The definitions, in 50 digits."""
    start, end = mp.mpf(beta_start), mp.mpf(beta_end)
    grid = [mp.mpf(i) / (T - 1) if T > 1 else mp.mpf(0) for i in range(T)]
    if name == "linear":
        return [start + u * (end - start) for u in grid]
    if name == "scaled_linear":
        return [(mp.sqrt(start) + u * (mp.sqrt(end) - mp.sqrt(start))) ** 2 for u in grid]
    if name == "sigmoid":
        return [(end - start) / (1 + mp.exp(6 - 12 * u)) + start for u in grid]
    if name == "squaredcos_cap_v2":
        shift = mp.mpf("0.008")
        alpha_bar = [mp.cos((mp.mpf(i) / T + shift) / (1 + shift) * mp.pi / 2) ** 2 for i in range(T + 1)]
    elif name == "exp":
        alpha_bar = [mp.exp(-12 * mp.mpf(i) / T) for i in range(T + 1)]
    else:
        alpha_bar = []
        for i in range(T + 1):
            t = mp.mpf(i) / T
            half = mp.mpf(1) / 2
            log_snr = -half * (1 if t <= half else -1) * mp.log(1 - 2 * abs(half - t) + mp.mpf("1e-6"))
            alpha_bar.append(mp.sqrt(mp.exp(log_snr) / (1 + mp.exp(log_snr))))
    return [min(1 - alpha_bar[i + 1] / alpha_bar[i], mp.mpf("0.999")) for i in range(T)]


def reference_log_snr(betas, zero_terminal_snr=False):
    alpha_bar, product = [], mp.mpf(1)
    for beta in betas:
        product *= 1 - beta
        alpha_bar.append(product)
    if not zero_terminal_snr:
        return [mp.log(a / (1 - a)) for a in alpha_bar]
    # Lin et al. 2024, algorithm 1
    roots = [mp.sqrt(a) for a in alpha_bar]
    roots = [(r - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for r in roots]
    return [mp.log(r**2 / (1 - r**2)) if r > 0 else -mp.inf for r in roots]


def worst_error(got, reference):
    """max |got - reference| / max(1, |reference|), computed in 50 digits."""
    worst = mp.mpf(0)
    for g, r in zip(got.tolist(), reference, strict=True):
        if mp.isinf(r):
            assert g == float(r)
        else:
            worst = max(worst, abs(mp.mpf(g) - r) / max(1, abs(r)))
    return float(worst)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [2, 10, 1000, pytest.param(4000, marks=pytest.mark.slow)])
def test_log_snr_of_the_named_tables(name, T, zero_terminal_snr):
    betas = make_betas(name, T)
    got = log_snr_from_betas(betas, zero_terminal_snr=zero_terminal_snr)
    assert got.dtype == torch.float64 and got.shape == (T,)
    bound = 5e-14 if zero_terminal_snr else 1e-15  # the rescaling subtracts the last entry from its neighbours
    # the product of the very betas, and the definition of the table end to end
    assert worst_error(got, reference_log_snr([mp.mpf(b) for b in betas.tolist()], zero_terminal_snr)) < bound
    assert worst_error(got, reference_log_snr(reference_betas(name, T), zero_terminal_snr)) < 1e-12
    assert bool((got.diff() < 0).all())


@pytest.mark.parametrize("T", [10, 1000, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_betas_against_their_definitions(name, T):
    reference = reference_betas(name, T)
    error = max(abs(mp.mpf(b) - r) / r for b, r in zip(make_betas(name, T).tolist(), reference, strict=True))
    assert float(error) < 1e-15 * max(T, 1000)  # laplace and exp: differences of rounded logarithms


@pytest.mark.parametrize("name", NAMES[:5])
def test_the_names_mean_what_they_mean_in_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule=name, beta_start=1e-3, beta_end=0.03).betas
    torch.testing.assert_close(make_betas(name, 100, 1e-3, 0.03).float(), theirs, rtol=2e-5, atol=1e-7)


def test_a_list_of_betas_a_single_one_and_a_last_one_of_one():
    assert worst_error(log_snr_from_betas([0.3]), [mp.log(mp.mpf(0.7) / mp.mpf(0.3))]) < 1e-15
    got = log_snr_from_betas([1e-18, 1e-12, 0.5, 1.0])
    assert got[0] == pytest.approx(18 * math.log(10), rel=1e-15)  # 1 - 1e-18 rounds to 1
    assert got[-1] == -math.inf
    torch.testing.assert_close(
        log_snr_from_betas(torch.tensor([0.1, 0.5])), log_snr_from_betas([0.1, 0.5]), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_ends_are_exact(name):
    schedule = SCHEDULES[name]
    assert float(schedule.log_snr(0.0)) == schedule.log_snr_max
    assert float(schedule.log_snr(1.0)) == schedule.log_snr_min
    assert float(schedule.inverse(schedule.log_snr_max)) == 0.0
    assert float(schedule.inverse(schedule.log_snr_min)) == 1.0
    assert float(schedule.inverse(schedule.log_snr_max + 1)) == 0.0
    assert float(schedule.inverse(schedule.log_snr_min - 1)) == 1.0
    declared = {
        "linear": (13.3, -5.0),
        "cosine": (13.3, -5.0),
        "cosine_wide": (40.0, -30.0),
        "two_entries": (3.0, -2.0),
    }
    if name in declared:
        assert (schedule.log_snr_max, schedule.log_snr_min) == declared[name]


@pytest.mark.parametrize("name", SCHEDULES)
def test_monotone_invertible_and_of_the_arguments_shape(name):
    schedule = SCHEDULES[name]
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)[1:-1]
    log_snr = schedule.log_snr(t)
    assert bool((log_snr.diff() < 0).all()) and log_snr.dtype == torch.float64
    torch.testing.assert_close(schedule.inverse(log_snr), t, rtol=0, atol=1e-13)
    grid = t[:3996:37].reshape(2, 9, 6)
    for function in (schedule.log_snr, schedule.derivative, schedule.inverse):
        assert function(grid.float()).shape == grid.shape and function(grid.float()).dtype == torch.float64
        assert function(0.25).shape == () and function(0.25).dtype == torch.float64


@pytest.mark.parametrize("name", SCHEDULES)
def test_derivative_is_autograds(name):
    schedule = SCHEDULES[name]
    t = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(schedule.log_snr(t).sum(), t)
    torch.testing.assert_close(schedule.derivative(t.detach()), gradient, rtol=1e-10, atol=0)
    if name not in ("cosine_unbounded", "cosine_wide"):  # whose slopes at the ends are infinite, or nearly
        # the slopes at the two ends, from inside
        for end, inside in ((0.0, 1e-7), (1.0, 1 - 1e-7)):
            slope = (float(schedule.log_snr(end)) - float(schedule.log_snr(inside))) / (end - inside)
            assert float(schedule.derivative(end)) == pytest.approx(slope, rel=2e-3)


@pytest.mark.parametrize("log_snr_max, log_snr_min", [(13.3, -5.0), (60.0, -60.0), (2.0, 1.0), (math.inf, -math.inf)])
def test_cosine_against_mpmath(log_snr_max, log_snr_min):
    schedule = CosineSchedule(log_snr_max, log_snr_min)
    t = [1e-9, 1e-3, 0.1, 0.3, 0.49999, 0.5, 0.77, 0.999, 1 - 1e-9]
    low, high = (mp.atan(mp.exp(-mp.mpf(v) / 2)) for v in (log_snr_max, log_snr_min))
    reference = []
    for value in t:
        phi = low + mp.mpf(value) * (high - low)
        reference.append(mp.log((mp.cos(phi) / mp.sin(phi)) ** 2))
    got = schedule.log_snr(torch.tensor(t, dtype=torch.float64))
    assert worst_error(got, reference) < 1e-12


def test_unbounded_cosine_is_nichol_and_dhariwals_without_offset():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    alpha_bar = torch.cos(math.pi * t / 2) ** 2
    torch.testing.assert_close(
        torch.sigmoid(CosineSchedule(math.inf, -math.inf).log_snr(t)), alpha_bar, rtol=1e-13, atol=0
    )


def test_table_is_hit_at_its_entries_and_linear_between():
    for n in (2, 3, 7, 10, 50, 333, 1000, 4000):
        table = -torch.linspace(-9, 11, n, dtype=torch.float64) + 0.3 * torch.sin(torch.arange(n)) / n
        schedule = TabulatedNoiseSchedule(table)
        i = torch.arange(n, dtype=torch.float64)
        assert torch.equal(schedule.log_snr(i / (n - 1)), table)
        torch.testing.assert_close(schedule.inverse(table), i / (n - 1), rtol=0, atol=1e-15)
    schedule = TabulatedNoiseSchedule(torch.tensor([4.0, 3.0, -1.0]))
    assert float(schedule.log_snr(0.25)) == 3.5 and float(schedule.log_snr(0.75)) == 1.0
    assert float(schedule.derivative(0.25)) == -2.0 and float(schedule.derivative(0.75)) == -8.0


def test_table_with_zero_terminal_snr():
    schedule = TabulatedNoiseSchedule(log_snr_from_betas(make_betas("linear", 50), zero_terminal_snr=True))
    assert schedule.log_snr_min == -math.inf and float(schedule.inverse(-math.inf)) == 1.0
    entries = schedule.log_snr(torch.arange(50, dtype=torch.float64) / 49)
    assert torch.equal(entries, schedule.table) and bool(entries[:-1].isfinite().all())
    assert float(schedule.log_snr(0.995)) == -math.inf


def test_zero_terminal_snr_keeps_the_first_entry():
    betas = make_betas("scaled_linear", 1000)
    torch.testing.assert_close(
        log_snr_from_betas(betas, zero_terminal_snr=True)[0], log_snr_from_betas(betas)[0], rtol=1e-15, atol=0
    )


def test_shift_for_a_resolution():
    base = CosineSchedule()
    assert ShiftedSchedule.for_resolution(base, 128).shift == pytest.approx(-2 * math.log(2))
    schedule = ShiftedSchedule.for_resolution(base, 128, 64)
    # averaging 2x2 pixels quarters the noise variance: what a 64 x 64 image had is had again after pooling
    pooled = schedule.log_snr(0.4) + math.log(4)
    torch.testing.assert_close(pooled, base.log_snr(0.4), rtol=1e-14, atol=0)
    assert float(schedule.derivative(0.4)) == float(base.derivative(0.4))
    assert schedule.log_snr_max == base.log_snr_max - 2 * math.log(2)


def test_timestep_coordinate():
    T, high, low = 1000, 13.3, -5.0
    assert float(timestep_from_log_snr(high, T, high, low)) == -1.0
    assert float(timestep_from_log_snr(low, T, high, low)) == T - 1.0
    assert float(log_snr_from_timestep(-1, T, high, low)) == high
    assert float(log_snr_from_timestep(T - 1, T, high, low)) == low
    tau = torch.tensor([[-1.0, -0.25, 0.0], [17.3, 500.5, 999.0]], dtype=torch.float64)
    log_snr = log_snr_from_timestep(tau, T, high, low)
    assert log_snr.shape == tau.shape
    torch.testing.assert_close(timestep_from_log_snr(log_snr, T, high, low), tau, rtol=0, atol=1e-12 * T)
    for value in (-0.25, 17.3, 500.5):
        exact = mp.mpf(high) - (mp.mpf(value) + 1) / T * (mp.mpf(high) - mp.mpf(low))
        assert abs(mp.mpf(float(log_snr_from_timestep(value, T, high, low))) - exact) < 1e-14
    # integers are the T steps of a chain uniform in log SNR
    steps = log_snr_from_timestep(torch.arange(-1, T), T, high, low)
    torch.testing.assert_close(steps, LinearLogSNRSchedule().log_snr(torch.arange(T + 1) / T), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearLogSNRSchedule(-13.3, 5.0), "Did you pass gamma"),
        (lambda: LinearLogSNRSchedule(math.inf, -5.0), "must be finite"),
        (lambda: CosineSchedule(1.0, 1.0), "`log_snr_max` must exceed `log_snr_min`, got 1.0 <= 1.0"),
        (lambda: CosineSchedule(math.nan, 1.0), "must exceed"),
        (lambda: check_end_points(0.0, math.nan), "must exceed"),
        (lambda: TabulatedNoiseSchedule(torch.tensor([1.0])), "at least two"),
        (lambda: TabulatedNoiseSchedule(torch.zeros(3, 2)), "at least two"),
        (lambda: TabulatedNoiseSchedule(torch.tensor([1.0, 2.0, 0.0])), "got 1.0 then 2.0 at entry 0.*gamma"),
        (lambda: TabulatedNoiseSchedule(torch.tensor([2.0, 1.0, 1.0])), "at entry 1"),
        (lambda: TabulatedNoiseSchedule(torch.tensor([math.inf, 1.0])), "finite log SNRs"),
        (lambda: TabulatedNoiseSchedule(torch.tensor([2.0, -math.inf, -math.inf])), "finite log SNRs"),
        (lambda: TabulatedNoiseSchedule(torch.tensor([2.0, math.nan])), "finite log SNRs"),
        (lambda: TabulatedNoiseSchedule.from_betas([0.1, 1.2, 0.1]), "finite log SNRs"),
        (lambda: make_betas("cosine", 10), "must be one of linear, .*got 'cosine'"),
        (lambda: make_betas("linear", 0), "at least 1"),
        (lambda: log_snr_from_betas([]), "`betas`"),
        (lambda: log_snr_from_betas(torch.ones(2, 2) / 2), "`betas`"),
        (lambda: log_snr_from_betas([0.1], zero_terminal_snr=True), "at least two betas"),
        (lambda: ShiftedSchedule.for_resolution(CosineSchedule(), 0), "positive"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
