"""SamplingGrid: the timesteps of one sampling run, the coefficients of their steps, and how far the run has come."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..frequency import RadialBands
from ..numerics import as_float64, compute_dtype, on_cpu, on_host, shown, take
from ..timelines import Timeline
from .coefficients import LEARNED, StepCoefficients, StepNumbers, StepSettings, step_coefficients, step_numbers
from .updates import multistep_weights, velocity_weights


class SamplingGrid:
    """The steps of a sampling run, each from one entry of `timesteps` to the next, the last to the timeline's end.

    Coefficients are made from log SNR in float64, and belong to the timesteps as the network is fed them, after any
    rounding to float32. Lists of numbers, which take long for long grids, are made when they are first needed.

    Arguments:
        timeline: what the timesteps mean.
        timesteps: (n,) descending, on the CPU, in the dtype in which the network is fed them.
        settings: what the steps are like.
        device: where `timesteps` goes.
        log_snrs: (n + 1,) ascending float64, of the steps and of the end of the last. None: what the timeline says of
            `timesteps`.
        chosen: whether somebody chose these timesteps. The training chain, which stands for them before, also takes
            fractional ones, which step down by one.
    """

    @on_cpu  # what is kept here may be used in training later
    def __init__(
        self,
        timeline: Timeline,
        timesteps: Tensor,
        settings: StepSettings,
        *,
        device: str | torch.device | None = None,
        log_snrs: Tensor | None = None,
        chosen: bool = True,
    ):
        self.own_log_snrs = log_snrs
        self.timeline, self.settings, self.chosen = timeline, settings, chosen
        self.custom = False  # whether the timesteps were chosen one by one
        self.counted = False  # whether steps are counted from the first one on, and timesteps place that one alone
        self.host, self.length = timesteps.cpu(), len(timesteps)
        self.timesteps = timesteps.to(device)
        self.terminal = timeline.terminal_timestep
        self.optimal = settings.optimal if settings.variance_type == "optimal" else None
        # read in every step
        self.clip = settings.clip_sample_range if settings.clip_sample and not settings.thresholding else None
        self.limits, self.through_x_hat = settings.limits, settings.through_x_hat(timeline)
        self.multistep, self.deterministic = settings.multistep_order == 2, settings.stochasticity == 0
        self.learned = settings.variance_type in LEARNED
        self.ascending = torch.cat([as_float64([self.terminal]), self.host.double().flip(0)])  # (n + 1,)
        self.coefficients = self._of_all_steps()  # float64 on the CPU
        self.packed = self.coefficients.packed()  # (n, 8)
        self.packed_on_device = self.packed.to(self.timesteps.device, torch.float32)
        self.undefined = frozenset((~self.coefficients.defined).nonzero().flatten().tolist())
        self.radial_bands: RadialBands | None = None  # between which the noise's deviation differs, if it does
        self._band_dtype = torch.float64 if self.timesteps.device.type == "cpu" else torch.float32
        if self.optimal is not None and self.optimal.shape is not None:
            self.radial_bands = self.optimal.bands.to(self.timesteps.device, self._band_dtype)
        # how far the run has come
        self.begin_index: int | None = None
        self.step_index: int | None = None
        self.history: tuple[int, Tensor] | None = (
            None  # the last step's index and x_hat, or the network's output there
        )

    def remade(self, timeline: Timeline, settings: StepSettings) -> SamplingGrid:
        """The same run, as far as it has come, on another timeline or with other settings from here on."""
        grid = SamplingGrid(
            timeline, self.host, settings, device=self.timesteps.device, log_snrs=self.own_log_snrs, chosen=self.chosen
        )
        grid.timesteps = self.timesteps  # the very tensor whose elements pipelines hold
        grid.custom, grid.counted = self.custom, self.counted
        grid.begin_index, grid.step_index, grid.history = self.begin_index, self.step_index, self.history
        return grid

    # --- the timesteps -----------------------------------------------------------------------------------------------

    @cached_property
    def values(self) -> list[float]:
        """The timesteps as numbers."""
        return self.host.tolist()

    @cached_property
    def places(self) -> dict[float, int]:
        """The index of each timestep."""
        return {value: index for index, value in enumerate(self.values)}

    def locate(self, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`timestep` as floats, its place in the ascending grid, and whether it is there; all on its device, nothing
        read.
        """
        values = as_float64(timestep).contiguous()
        grid = self.ascending[1:].to(values)
        place = torch.searchsorted(grid, values).clamp(max=len(grid) - 1)
        return values, place, take(grid, place) == values

    def previous(self, timestep: Tensor | float) -> Tensor | float:
        """Where a step from `timestep` ends: the next entry of the grid if it is on it, else one step of the training
        chain down.
        """
        if not isinstance(timestep, Tensor):
            index = self.places.get(timestep)
            if index is None:
                return type(timestep)(float(self.timeline.below(as_float64(timestep))))
            return self.values[index + 1] if index + 1 < len(self.values) else self.terminal
        values, place, on_grid = self.locate(timestep)
        return torch.where(on_grid, take(self.ascending.to(values), place), self.timeline.below(values)).to(
            timestep.dtype
        )

    def index_of(self, timestep: Tensor | float) -> int | None:
        """The place of `timestep` on the grid; None for one off the training chain's whole steps.

        Never waits for a device.
        """
        if self.counted and (place := self.begin_index if self.step_index is None else self.step_index) is not None:
            return self._in_range(place)
        if isinstance(timestep, Tensor):
            if timestep.device.type != "cpu":
                return self._index_of_device_tensor(timestep)
            timestep = timestep.item()
        index = self.places.get(timestep)
        if index is None:
            index = self.places.get(float(np.float32(timestep)))  # fractional timesteps are rounded to float32
            if index is None:
                self._refuse_off_grid(as_float64(timestep))
        return index

    def _index_of_device_tensor(self, timestep: Tensor) -> int | None:
        grid = self.timesteps
        if timestep.dtype == grid.dtype and timestep.device == grid.device:
            # an element of `timesteps`, or of a slice of it, shares its memory: its offset says which it is
            index = int(timestep.storage_offset()) - int(grid.storage_offset())
            if timestep.untyped_storage().data_ptr() == grid.untyped_storage().data_ptr():
                return index
        counted = self.begin_index if self.step_index is None else self.step_index
        if (
            counted is None
        ):  # once for each grid: a tensor from elsewhere, and nothing was said of where sampling begins
            return self.index_of(timestep.cpu())
        return self._in_range(counted)

    def _in_range(self, place: int) -> int:
        if place >= self.length:
            raise ValueError(
                f"all {self.length} steps are taken: call `set_timesteps` (or `set_begin_index`) before the next "
                "sample."
            )
        return place

    def _refuse_off_grid(self, timestep: Tensor) -> None:
        self.timeline.check(timestep)  # names the range if that is what is wrong
        if self.chosen or bool((timestep <= self.terminal).any()):
            raise ValueError(
                f"timestep {shown(timestep.flatten())} is not one of the {len(self.host)} of `set_timesteps`: pass "
                "one of "
                "`scheduler.timesteps`, or choose your own with `set_timesteps(timesteps=...)`."
            )

    # --- their coefficients ------------------------------------------------------------------------------------------

    def _of_all_steps(self) -> StepCoefficients:
        log_snrs = self.own_log_snrs
        if log_snrs is None:
            log_snrs = torch.cat([self.timeline.log_snr(self.host), self._log_snr_of_target(self.ascending[:1])])
        c = step_coefficients(log_snrs[:-1], log_snrs[1:], self.settings, self.optimal, self.timeline)
        if self.multistep:
            weights = multistep_weights if self.through_x_hat else velocity_weights
            c = c._replace(multistep=weights(log_snrs))
        # At clean data the posterior has no variance, and the range of learned ones ends at the last step's before it.
        low = c.log_variance_low
        if len(low) > 1 and not bool(low[-1].isfinite()):
            c = c._replace(log_variance_low=torch.cat([low[:-1], low[-2:-1]]))
        return c

    @cached_property
    def numbers(self) -> list[StepNumbers]:
        """The coefficients of each step as numbers."""
        return self._numbers(self.coefficients)

    @on_cpu
    def _numbers(self, coefficients: StepCoefficients) -> list[StepNumbers]:
        bands = coefficients.bands
        if bands is not None:
            coefficients = coefficients._replace(bands=bands.to(self.timesteps.device, self._band_dtype))
        return step_numbers(coefficients)

    def numbers_off_grid(self, timestep: Tensor | float) -> StepNumbers:
        """Of the step from a fractional timestep of the training chain to the one a step below it."""
        return self._numbers(self._checked(self._off_grid(as_float64(timestep).reshape(1))))[0]

    def coefficients_at(self, timestep: Tensor, sample: Tensor) -> StepCoefficients:
        """For `timestep` of shape () or (B,), on the sample's device."""
        values, place, on_grid = self.locate(timestep)
        index = len(self.host) - 1 - place
        bands = self.coefficients.bands
        if on_host(timestep):
            if bool(on_grid.all()):
                return self._checked(StepCoefficients.unpacked(take(self.packed, index), _rows(bands, index)))
            self._refuse_off_grid(values[~on_grid])
            return self._checked(self._off_grid(values))
        packed = self.packed_on_device
        if sample.dtype == torch.float64 or packed.device != sample.device:
            packed = self.packed.to(device=sample.device, dtype=compute_dtype(sample))
        index = index.to(sample.device)
        return StepCoefficients.unpacked(
            take(packed, index), _rows(None if bands is None else bands.to(packed), index)
        )

    def _off_grid(self, timestep: Tensor) -> StepCoefficients:
        end = self._log_snr_of_target(torch.as_tensor(self.previous(timestep)))
        return step_coefficients(self.timeline.log_snr(timestep), end, self.settings, self.optimal, self.timeline)

    def _log_snr_of_target(self, timesteps: Tensor) -> Tensor:
        """Log SNR at the end of a step; +inf, which makes it end at x_hat, for the last one with final_step="mean"."""
        log_snr = self.timeline.log_snr(timesteps)
        if self.settings.final_step == "mean":
            log_snr = torch.where(timesteps <= self.terminal, math.inf, log_snr)
        return log_snr

    def _checked(self, coefficients: StepCoefficients) -> StepCoefficients:
        if not bool(coefficients.defined.all()):
            self.raise_undefined(None)
        return coefficients

    def raise_undefined(self, index: int | None) -> None:
        """Say why the step `index` (None: some step) is not defined."""
        where = "" if index is None else f" at timestep {self.values[index]:g}"
        entries = self.timeline.entries
        if self.settings.prediction_type in ("epsilon", "score") and entries is not None and entries[-1] == -math.inf:
            raise ValueError(
                f"the step{where} is undefined: at zero terminal SNR a prediction of type "
                f"{self.settings.prediction_type!r} says "
                "nothing about the data. Use a model that predicts v, flow or the sample, or timesteps that leave T - "
                "1 out."
            )
        raise ValueError(f"the step{where} is undefined: its coefficients are not finite. Check the betas.")


def _rows(bands: Tensor | None, index: Tensor) -> Tensor | None:
    return None if bands is None else take(bands, index)
