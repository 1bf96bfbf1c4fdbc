"""What a run learns about time itself: a noise schedule, or a density of times.

Neither, with the default arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from arguments import DiffusionArguments
from diffusion import Losses
from safetensors.torch import load_file, save_file

from vdm_diffusers import LearnedNoiseSchedule, VDMFlowScheduler, VDMScheduler
from vdm_diffusers.adaptive_time_sampling import AdaptiveTimeSampler

_SCHEDULE, _OPTIMIZER, _SAMPLER = "schedule.safetensors", "schedule_optimizer.pt", "time_sampler.safetensors"


class TimeLearning:
    """The learned schedule with its optimiser, or the adaptive sampler; both are the same on every process.

    Attributes:
        schedule: for --learn_schedule, on the device.
        sampler: for --time_sampling adaptive.
    """

    def __init__(
        self, args: DiffusionArguments, scheduler: VDMScheduler | VDMFlowScheduler, device: torch.device
    ) -> None:
        self.args, self._scheduler = args, scheduler
        self.schedule: LearnedNoiseSchedule | None = None
        self.sampler: AdaptiveTimeSampler | None = None
        self._sums: torch.Tensor | None = None
        if args.learn_schedule:
            self.schedule = LearnedNoiseSchedule(
                args.log_snr_max, args.log_snr_min, learn_end_points=args.learn_end_points
            ).to(device)
            self._optimizer = torch.optim.Adam(self.schedule.parameters(), betas=(0.9, 0.99))
        if args.time_sampling == "adaptive":
            self.sampler = AdaptiveTimeSampler(scheduler.noise_schedule)

    def scheduler(self) -> VDMScheduler | VDMFlowScheduler:
        """The scheduler to save with the model: the schedule as it now is stands in its config."""
        table: dict[str, Any] = {} if self.schedule is None else {"log_snr_table": self.schedule.table()}
        return type(self._scheduler).from_config(self._scheduler.config, **table)

    def collect(self, accelerator: Accelerator, losses: Losses) -> None:
        """Take in a micro-batch, after its backward pass."""
        if losses.times is None:
            return
        if losses.times.cut is not None:
            scale = 1 / (len(losses.values) * accelerator.gradient_accumulation_steps)
            if accelerator.scaler is not None:
                scale *= accelerator.scaler.get_scale()
            losses.times.cut.backward(losses.values, scale=scale)
        if losses.ends is not None:  # apart from the network's loss, and so from its gradient scaling
            losses.ends.mean().backward()
        if self.sampler is not None:
            sums = self.sampler.sums(losses.times.t, losses.values)
            self._sums = sums if self._sums is None else self._sums + sums

    def step(self, accelerator: Accelerator, learning_rate_factor: float) -> None:
        """After the last micro-batch of an optimiser step: average over the processes, and move."""
        if self.schedule is not None:
            parameters = list(self.schedule.parameters())
            gradient = torch.cat([p.grad.flatten() for p in parameters])
            gradient = accelerator.reduce(gradient / accelerator.gradient_accumulation_steps, "mean")
            # float16's gradients overflow now and then: the network's own step is left out, and so is this
            if accelerator.scaler is None or bool(gradient.isfinite().all()):
                for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
                    parameter.grad = part.view_as(parameter)
                for group in self._optimizer.param_groups:
                    group["lr"] = self.args.schedule_learning_rate * learning_rate_factor
                self._optimizer.step()
            self._optimizer.zero_grad()
        if self.sampler is not None:
            self.sampler.update(accelerator.reduce(self._sums, "sum"))
            self._sums = None

    def skip(self) -> None:
        """Forget what was collected: the optimiser step is left out."""
        if self.schedule is not None:
            self._optimizer.zero_grad()
        self._sums = None

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs."""
        if self.schedule is not None:
            save_file(self.schedule.state_dict(), folder / _SCHEDULE)
            torch.save(self._optimizer.state_dict(), folder / _OPTIMIZER)
        if self.sampler is not None:
            save_file(self.sampler.state_dict(), folder / _SAMPLER)

    def load(self, folder: Path) -> None:
        """Go on from `save`. What an older run without it lacks starts anew."""
        if self.schedule is not None and (folder / _SCHEDULE).is_file():
            self.schedule.load_state_dict(load_file(folder / _SCHEDULE))
            self._optimizer.load_state_dict(torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True))
        if self.sampler is not None and (folder / _SAMPLER).is_file():
            self.sampler.load_state_dict(load_file(folder / _SAMPLER))
