"""Timelines: timestep to log SNR and back, where chains begin and end, what a network is fed, what is refused."""

import math

import pytest
import torch

from vdm_diffusers.noise_schedules import (
    CosineSchedule,
    LinearLogSNRSchedule,
    TabulatedNoiseSchedule,
    log_snr_from_betas,
    make_betas,
)
from vdm_diffusers.timelines import BetaTableTimeline, LogSNRTimeline

TABLE = log_snr_from_betas(make_betas("linear", 1000))
LEARNED = TabulatedNoiseSchedule(torch.tensor([13.0, 9.0, 2.0, -4.5]))
TIMELINES = {
    "betas": BetaTableTimeline(TABLE),
    "zero terminal SNR": BetaTableTimeline(log_snr_from_betas(make_betas("linear", 50), zero_terminal_snr=True)),
    "linear": LogSNRTimeline(1000, 13.3, -5.0, LinearLogSNRSchedule()),
    "cosine": LogSNRTimeline(128, 9.0, -9.0, CosineSchedule(9.0, -9.0)),
    "learned": LogSNRTimeline(1000, 13.3, -5.0, LEARNED),
}


@pytest.fixture(params=TIMELINES.values(), ids=TIMELINES)
def timeline(request):
    return request.param


def test_there_and_back(timeline):
    t = torch.linspace(0, timeline.last_timestep - 1, 37, dtype=torch.float64).reshape(37, 1)
    log_snr = timeline.log_snr(t)
    assert log_snr.shape == t.shape and log_snr.dtype == torch.float64
    assert bool((log_snr[1:] < log_snr[:-1]).all())
    torch.testing.assert_close(timeline.timestep(log_snr), t, rtol=0, atol=1e-9)
    assert timeline.log_snr(3).shape == () and timeline.log_snr([3, 4.5]).shape == (2,)


def test_both_ends_are_those_of_the_noise_schedule(timeline):
    schedule = timeline.noise_schedule
    assert float(timeline.log_snr(timeline.noisiest_timestep)) == pytest.approx(schedule.log_snr_min, abs=1e-12)
    end = float(timeline.log_snr(timeline.terminal_timestep))
    assert end == math.inf if timeline.ends_at_data else end == pytest.approx(schedule.log_snr_max, abs=1e-12)
    assert timeline.noisiest_timestep <= timeline.last_timestep == timeline.num_timesteps - 1
    assert float(timeline.timestep(timeline.log_snr(timeline.terminal_timestep))) == pytest.approx(
        timeline.terminal_timestep, abs=1e-9
    )
    below = timeline.below(torch.tensor([0.0, 0.5, 1.0, 7.0]))
    assert below.tolist() == ([-1, -1, 0, 6] if timeline.ends_at_data else [-1, -0.5, 0, 6])


def test_a_table_is_what_a_chain_may_visit():
    timeline = TIMELINES["betas"]
    assert torch.equal(timeline.entries, timeline.log_snr(torch.arange(1000)))
    assert TIMELINES["linear"].entries is None
    assert timeline.fed(torch.tensor([3.0, 1.0])).dtype == torch.int64
    assert timeline.fed(torch.tensor([3.0, 0.5])).dtype == torch.float32
    assert TIMELINES["linear"].fed(torch.tensor([3.0, 1.0])).dtype == torch.float32


@pytest.mark.parametrize("wrong", [-2.0, -1.5, 1e4, math.nan])
def test_outside(timeline, wrong):
    for call in (timeline.log_snr, lambda t: timeline.check(torch.tensor([0.0, t]))):
        with pytest.raises(ValueError, match=f"timesteps must lie in .* got {wrong}"):
            call(wrong)
    with pytest.raises(ValueError, match="range of the schedule"):
        timeline.timestep(500.0)


def test_between_x_1_and_clean_data_nothing_is_defined():
    with pytest.raises(ValueError, match="or be -1, got -0.5"):
        TIMELINES["betas"].log_snr(-0.5)
    assert float(TIMELINES["linear"].log_snr(-0.5)) < 13.3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BetaTableTimeline(torch.zeros(0)), "at least one log SNR"),
        (lambda: BetaTableTimeline(log_snr_from_betas([0.1, 0.0, 0.2])).noise_schedule, "got 0 .* at entry 1"),
        (lambda: BetaTableTimeline(torch.zeros(1)).noise_schedule, "at least two entries"),
        (lambda: LogSNRTimeline(1000, -5.0, 13.3, LinearLogSNRSchedule()), "Did you pass gamma"),
        (lambda: LogSNRTimeline(1000, 5.0, -5.0, LinearLogSNRSchedule()), "must stay between"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_devices_without_values_are_not_read(timeline):
    t = torch.zeros(3, device="meta")
    assert timeline.log_snr(t).device.type == "meta"
    with torch.device("meta"):
        assert timeline.log_snr(3.0).device.type == "cpu"
