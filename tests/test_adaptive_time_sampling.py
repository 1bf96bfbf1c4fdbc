"""Adaptive importance sampling of t: the density it arrives at, that nothing is biased, and that a state carries on
exactly.
"""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from vdm_diffusers.adaptive_time_sampling import AdaptiveTimeSampler
from vdm_diffusers.elbo import continuous_weight, squared_error
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.noise_schedules import CosineSchedule, LinearLogSNRSchedule, TabulatedNoiseSchedule
from vdm_diffusers.time_sampling import low_discrepancy, uniform

MIDPOINTS = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def taught(schedule=None, losses=None, **options) -> AdaptiveTimeSampler:
    """A sampler that has seen the loss `losses(t)` once at 20 equally spaced times in each bin."""
    sampler = AdaptiveTimeSampler(schedule or LinearLogSNRSchedule(6.0, -2.0), **{"num_bins": 8} | options)
    inside = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    left, width = sampler.edges[:-1], sampler.edges.diff()
    t = (left[:, None] + inside * width[:, None]).flatten()
    sampler.update(sampler.sums(t, (losses or (lambda t: 0.1 + t**2))(t)))
    return sampler


@pytest.mark.parametrize("schedule", [LinearLogSNRSchedule(6.0, -2.0), CosineSchedule(9.0, -7.0)])
def test_density_is_the_root_of_the_bins_mean_square(schedule):
    sampler = taught(schedule, losses=lambda t: 0.1 + t**2, uniform_share=1e-9)
    log_snr = schedule.log_snr(sampler.edges)
    torch.testing.assert_close(log_snr.diff(), log_snr.diff().mean().expand(8), rtol=1e-9, atol=0)
    inside = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    roots = []
    for left, right in zip(sampler.edges.tolist()[:-1], sampler.edges.tolist()[1:], strict=True):
        values = 0.1 + (left + (right - left) * inside) ** 2
        roots.append(math.sqrt(float((values**2).mean())))
    mass = sum(r * float(w) for r, w in zip(roots, sampler.edges.diff(), strict=True))
    torch.testing.assert_close(sampler.density, torch.tensor(roots).double() / mass, rtol=1e-6, atol=0)


def test_variance_leaves_aside_what_strata_remove():
    # +-s(bin) around a mean that grows: the density follows s, not the mean
    sampler = AdaptiveTimeSampler(LinearLogSNRSchedule(), num_bins=4, statistic="variance", uniform_share=1e-9)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9]).double().repeat(40)
    spread = torch.tensor([3.0, 1.0, 0.5, 1.5]).double().repeat(40)
    sign = torch.tensor([1.0, -1.0]).double().repeat_interleave(80)
    sampler.update(sampler.sums(t, 100 * t + sign * spread))
    torch.testing.assert_close(sampler.density, torch.tensor([3.0, 1.0, 0.5, 1.5]).double() / 1.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_nothing_is_biased(share):
    sampler = taught(CosineSchedule(9.0, -5.0), uniform_share=share)
    t, weight = sampler.place(MIDPOINTS)
    for function in (torch.ones_like, torch.exp, lambda t: (t > 0.3).double(), lambda t: torch.sin(20 * t)):
        mean = float((weight * function(t)).mean())
        assert mean == pytest.approx(float(function(MIDPOINTS).mean()), abs=2e-5)
    assert float(weight.max()) <= 1 / share + 1e-12
    assert bool((t.diff() >= 0).all()) and 0 <= float(t.min()) and float(t.max()) <= 1


def test_narrow_bins_are_sought_out_before_they_are_known():
    # the first bin of a cosine schedule is 0.0011 wide: uniform times would hardly ever find it
    sampler = AdaptiveTimeSampler(CosineSchedule(13.3, -5.0), num_bins=12)
    width = sampler.edges.diff()
    assert float(width[0]) < 2e-3
    assert float((sampler.density * width)[0]) == pytest.approx(0.5 / 12 + 0.5 * float(width[0]), rel=1e-12)
    t, weight = sampler.place(MIDPOINTS)
    assert float((weight * t).mean()) == pytest.approx(0.5, abs=1e-5) and float(weight.max()) <= 2


def test_uniform_until_every_bin_is_known():
    sampler = AdaptiveTimeSampler(LinearLogSNRSchedule(), num_bins=4, warmup=3)
    u = uniform(50, generator=torch.Generator().manual_seed(0))
    for t in (torch.tensor([0.1, 0.1, 0.1, 0.4, 0.4, 0.4, 0.6, 0.6, 0.6, 0.9]), torch.tensor([0.9])):
        torch.testing.assert_close(sampler.place(u)[1], torch.ones(50).double(), rtol=1e-14, atol=0)
        torch.testing.assert_close(sampler.place(u)[0], u, rtol=1e-14, atol=0)
        sampler.update(sampler.sums(t, t))
    sampler.update(sampler.sums(torch.tensor([0.99]), torch.tensor([1.0])))
    assert float(sampler.density[3]) > float(sampler.density[0])


def test_the_history_forgets():
    sampler = AdaptiveTimeSampler(LinearLogSNRSchedule(), num_bins=2, decay=0.5, uniform_share=1e-9, warmup=1)
    t = torch.tensor([0.25, 0.75])
    sampler.update(sampler.sums(t, torch.tensor([4.0, 1.0])))
    sampler.update(sampler.sums(t, torch.tensor([1.0, 1.0])))
    # mean square of the first bin: (16 / 2 + 1) / (1 / 2 + 1) = 6
    assert float(sampler.density[0] / sampler.density[1]) == pytest.approx(math.sqrt(6), rel=1e-6)


def test_two_processes_are_one():
    sampler = AdaptiveTimeSampler(LinearLogSNRSchedule(), num_bins=5)
    t = uniform(64, generator=torch.Generator().manual_seed(1))
    losses = t**2 + 1
    together = sampler.sums(t[:24], losses[:24]) + sampler.sums(t[24:], losses[24:])
    torch.testing.assert_close(together, sampler.sums(t, losses), rtol=1e-15, atol=0)
    assert float(together[0].sum()) == 64 and float(together[1].sum()) == pytest.approx(float(losses.sum()))


def test_a_saved_state_goes_on_as_if_never_saved(tmp_path):
    one, other = (AdaptiveTimeSampler(CosineSchedule(), num_bins=6, warmup=2) for _ in range(2))
    generator = torch.Generator().manual_seed(2)

    def step(sampler, shift):
        t, weight = sampler.place(low_discrepancy(32, shift=shift))
        sampler.update(sampler.sums(t, torch.exp(-3 * t)))
        return t, weight

    shifts = uniform(20, generator=generator)
    for shift in shifts[:10]:
        step(one, shift)
    save_file(one.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for shift in shifts[10:]:
        for a, b in zip(step(one, shift), step(other, shift), strict=True):
            assert torch.equal(a, b)
    assert float(one.density.max()) > 1.5
    with pytest.raises(ValueError, match="6 bins, this sampler 7"):
        AdaptiveTimeSampler(CosineSchedule(), num_bins=7).load_state_dict(one.state_dict())


def test_it_removes_the_variance_that_theory_says():
    # Exact denoiser of N(0, v I): f = w D sigmoid(l + ln v) chi^2 / D. With E[f^2 | t] = m(t), the second moment falls
    # from the mean of m to the square of the mean of sqrt(m), but for the width of the bins.
    variance, num_dims = 0.01, 16
    schedule = LinearLogSNRSchedule(9.0, -5.0)
    sampler = AdaptiveTimeSampler(schedule, num_bins=24, decay=0.98, uniform_share=0.01)
    generator = torch.Generator().manual_seed(3)

    def losses(t):
        log_snr = schedule.log_snr(t)
        x, noise = torch.randn(2, len(t), num_dims, generator=generator, dtype=torch.float64)
        alpha_square, sigma_square = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
        gain = sigma_square.sqrt() / (alpha_square * variance + sigma_square)
        eps_hat = gain[:, None] * diffuse(x * variance**0.5, noise, log_snr)
        return continuous_weight(schedule.derivative(t)) * squared_error(noise, eps_hat)

    for _ in range(150):
        t, _ = sampler.place(low_discrepancy(128, generator=generator))
        sampler.update(sampler.sums(t, losses(t)))
    t, weight = sampler.place(uniform(40_000, generator=generator))
    adaptive = weight * losses(t)
    plain = losses(uniform(40_000, generator=generator))
    error = math.sqrt(float(adaptive.var() + plain.var()) / 40_000)
    assert abs(float(adaptive.mean() - plain.mean())) < 5 * error
    root = torch.sigmoid(schedule.log_snr(MIDPOINTS) + math.log(variance))
    best = float(root.mean() ** 2 / (root**2).mean())
    assert float((adaptive**2).mean() / (plain**2).mean()) == pytest.approx(best, rel=0.1)
    assert best < 0.45


def test_a_range_that_ends_in_pure_noise():
    table = TabulatedNoiseSchedule(torch.tensor([5.0, 1.0, -3.0, -math.inf]))
    sampler = AdaptiveTimeSampler(table, num_bins=5)
    assert bool(sampler.edges.isfinite().all()) and sampler.edges[-1] == 1
    t, weight = sampler.place(MIDPOINTS[::100])
    assert bool(t.isfinite().all()) and float(weight.max()) <= 2


def test_invalid_arguments_are_named():
    schedule = LinearLogSNRSchedule()
    for options, message in [
        ({"num_bins": 0}, "num_bins"),
        ({"warmup": 0}, "warmup"),
        ({"statistic": "mean"}, "statistic"),
        ({"decay": 1.0}, "decay"),
        ({"uniform_share": 0.0}, "uniform_share"),
    ]:
        with pytest.raises(ValueError, match=message):
            AdaptiveTimeSampler(schedule, **options)
    sampler = AdaptiveTimeSampler(schedule, num_bins=3)
    with pytest.raises(ValueError, match="was a loss infinite"):
        sampler.update(sampler.sums(torch.tensor([0.5]), torch.tensor([math.inf])))
    with pytest.raises(ValueError, match=r"shape \(3, 3\)"):
        sampler.update(torch.zeros(3, 4))
