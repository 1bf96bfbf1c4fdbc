"""Times of a batch: uniform marginals, strata over the whole global batch, the fold, steps of a chain."""

import math

import pytest
import torch

from vdm_diffusers.time_sampling import discretize, fold, latin_hypercube, low_discrepancy, uniform


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def check_uniform(u, z=5.0):
    """Moments and a Kolmogorov-Smirnov distance, each within z standard errors."""
    n = u.numel()
    assert 0.0 <= float(u.min()) and float(u.max()) < 1.0
    assert abs(float(u.mean()) - 1 / 2) < z * math.sqrt(1 / 12 / n)
    assert abs(float((u**2).mean()) - 1 / 3) < z * math.sqrt(4 / 45 / n)
    distance = (u.flatten().sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert float(distance) < math.sqrt(-0.5 * math.log(1e-7 / 2) / n)


def test_uniform():
    u = uniform(20000, generator=generator())
    assert u.dtype == torch.float64 and u.shape == (20000,)
    check_uniform(u)
    assert torch.equal(u, uniform(20000, generator=generator()))
    assert uniform(0).shape == (0,)


def test_every_place_in_a_low_discrepancy_batch_is_uniform():
    rng = generator(1)
    batches = torch.stack([low_discrepancy(7, generator=rng) for _ in range(4000)])
    for i in range(7):
        check_uniform(batches[:, i])


@pytest.mark.parametrize("n", [1, 2, 7, 128, 1000])
def test_one_time_in_each_cell(n):
    for seed in range(20):
        t = low_discrepancy(n, generator=generator(seed))
        assert t.dtype == torch.float64 and t.shape == (n,) and 0 <= float(t.min()) and float(t.max()) < 1
        assert sorted((t * n).floor().long().tolist()) == list(range(n))
        spacing = t.sort().values.diff()
        torch.testing.assert_close(spacing, torch.full_like(spacing, 1 / n), rtol=0, atol=1e-15)


def test_strata_span_processes_and_micro_batches():
    whole = low_discrepancy(12, shift=0.35)
    parts = [low_discrepancy(n, shift=0.35, offset=o, total=12) for o, n in ((0, 5), (5, 4), (9, 3))]
    assert torch.equal(torch.cat(parts), whole)
    # every process draws the shift from a generator that is seeded alike
    parts = [low_discrepancy(3, generator=generator(5), offset=3 * rank, total=12) for rank in range(4)]
    assert torch.equal(torch.cat(parts), low_discrepancy(12, generator=generator(5)))
    assert torch.equal(low_discrepancy(4, shift=torch.tensor(0.25)), torch.tensor([0.25, 0.5, 0.75, 0.0]).double())


def test_strata_take_out_the_variance_of_a_smooth_average():
    rng = generator(2)

    def averages(draw):
        return torch.stack([torch.exp(-3 * draw()).mean() for _ in range(400)])

    independent = averages(lambda: uniform(64, generator=rng))
    stratified = averages(lambda: low_discrepancy(64, generator=rng))
    folded = averages(lambda: fold(low_discrepancy(64, generator=rng)))
    exact = (1 - math.exp(-3)) / 3
    for values in (independent, stratified, folded):
        assert abs(float(values.mean()) - exact) < 5 * float(values.std()) / 20
    # 1/n against 1/n^2 against 1/n^4: each at least an order of magnitude below the other
    assert float(stratified.var()) < float(independent.var()) / 10
    assert float(folded.var()) < float(stratified.var()) / 100


def test_fold():
    u = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    torch.testing.assert_close(fold(u), torch.tensor([0.0, 0.2, 0.5, 1.0, 0.5, 0.2], dtype=torch.float64))
    assert float(fold(torch.tensor(1 - 2**-53, dtype=torch.float64))) == pytest.approx(
        0.0, abs=1e-15
    )  # no jump at the wrap
    folded = fold(uniform(20000, generator=generator(3)))
    check_uniform(folded.clamp(max=1 - 1e-16))


@pytest.mark.parametrize("T", [1, 2, 3, 10, 49, 1000, 4000])
def test_discretize(T):
    u = uniform(50 * T, generator=generator(4))
    steps = discretize(u, T)
    assert steps.dtype == torch.int64 and int(steps.min()) >= 1 and int(steps.max()) <= T
    assert bool(((steps.double() - 1) / T <= u + 1e-15).all()) and bool((u < steps.double() / T + 1e-15).all())
    below_one = 1 - 2**-53
    edges = torch.tensor([0.0, 1e-300, below_one], dtype=torch.float64)
    assert discretize(edges, T).tolist() == [1, 1, T]
    assert discretize(torch.tensor([0.0, 1 - 2**-24]), T).tolist() == [1, T]
    assert discretize(fold(torch.tensor([0.5])), T).tolist() == [T]  # the fold reaches 1 itself
    # a stratified batch of T times visits every step once
    assert sorted(discretize(low_discrepancy(T, shift=0.5 / T), T).tolist()) == list(range(1, T + 1))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_samples": 4, "total": 3},
        {"num_samples": 4, "offset": 1},
        {"num_samples": 4, "offset": -1, "total": 8},
        {"num_samples": -1, "total": 8},
    ],
)
def test_a_part_outside_the_global_batch_is_refused(arguments):
    with pytest.raises(ValueError, match="do not lie in a global batch of"):
        low_discrepancy(**arguments)


@pytest.mark.parametrize("num_samples", [1, 4, 7])
def test_latin_hypercube(num_samples):
    noise = torch.stack([latin_hypercube(num_samples, (3, 5), generator(seed)) for seed in range(2000)])
    assert noise.shape == (2000, num_samples, 3, 5) and noise.dtype == torch.float32
    u = torch.special.ndtr(noise.double())
    # one value of every coordinate in each cell
    cells = (u * num_samples).floor().sort(dim=1).values
    assert torch.equal(cells, torch.arange(num_samples).double()[None, :, None, None].expand_as(cells))
    for row in range(num_samples):  # each noise alone is standard normal, and its coordinates are independent
        check_uniform(u[:, row])
        product = (noise[:, row, :, :-1] * noise[:, row, :, 1:]).mean((0, 2))
        assert bool((product.abs() < 5 / math.sqrt(2000 * 4)).all())


def test_latin_hypercube_leaves_little_of_an_additive_function():
    def spread(noise):
        return float((noise**2 + 2 * noise).flatten(2).sum(2).mean(1).var())

    stratified = torch.stack([latin_hypercube(8, (6,), generator(seed)) for seed in range(500)])
    independent = torch.randn(500, 8, 6, generator=generator())
    assert spread(stratified) < 0.25 * spread(independent)
