"""One training step's mathematics: from integer images to a loss for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from config import LOG_SNR_SCHEDULES, DiffusionArguments
from randomness import generator_for, row_noise
from torch import Tensor

from vdm_diffusers import VDMScheduler
from vdm_diffusers.decoders import encode_pixels
from vdm_diffusers.elbo import continuous_weight, discrete_weight
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.objectives import diffusion_loss
from vdm_diffusers.time_sampling import discretize, low_discrepancy, uniform

ELBO_WEIGHTED = ("elbo", "sigmoid", "edm")


@dataclass(frozen=True)
class Rows:
    """Where a micro-batch stands: rows first..first+count-1 of the `total` rows of an optimiser step's global batch."""

    step: int
    first: int
    count: int
    total: int


def make_scheduler(args: DiffusionArguments) -> VDMScheduler:
    """The scheduler that is trained with, and saved with the model."""
    return VDMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        prediction_type=args.prediction_type,
        log_snr_max=args.log_snr_max,
        log_snr_min=args.log_snr_min,
        log_snr_table=args.log_snr_table,
    )


def trains_in_discrete_time(args: DiffusionArguments) -> bool:
    """What --train_time auto means: DDPM's own steps for DDPM's own losses, continuous time for the rest."""
    if args.train_time == "auto":
        return args.ddpm_beta_schedule not in LOG_SNR_SCHEDULES and args.loss not in ELBO_WEIGHTED
    return args.train_time == "discrete"


class DiffusionTask:
    """The loss of a network on integer images; every random number is a function of (seed, step, row)."""

    def __init__(
        self,
        args: DiffusionArguments,
        scheduler: VDMScheduler,
        *,
        num_levels: int,
        seed: int,
        device: torch.device,
        random_flip: bool = False,
        num_classes: int | None = None,
        class_dropout: float = 0.0,
    ) -> None:
        self.args, self.scheduler, self.num_levels, self.seed, self.device = args, scheduler, num_levels, seed, device
        self.random_flip, self.num_classes, self.class_dropout = random_flip, num_classes, class_dropout
        self.schedule = scheduler.noise_schedule
        self.discrete = trains_in_discrete_time(args)
        self._generator = torch.Generator(device)

    def times(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log SNR, timestep for the network, and ELBO weight of each row: (count,) float64 on the CPU.

        The weight is None for a table of betas in discrete time, where the step to clean data has none.
        """
        generator = generator_for(self.seed, "time", rows.step)
        if self.args.time_sampling == "low_discrepancy":
            u = low_discrepancy(rows.count, offset=rows.first, total=rows.total, generator=generator)
        else:
            u = uniform(rows.total, generator=generator)[rows.first : rows.first + rows.count]
        schedule, num_steps = self.schedule, self.args.ddpm_num_steps
        if not self.discrete:
            log_snr = schedule.log_snr(u)
            return log_snr, self.scheduler.timestep_from_log_snr(log_snr), continuous_weight(schedule.derivative(u))
        step = discretize(u, num_steps)
        if not self.scheduler.is_log_snr_schedule:  # entry i = step - 1 of the table is x_step
            timestep = (step - 1).double()
            return self.scheduler.log_snr(timestep), timestep, None
        log_snr, log_snr_s = schedule.log_snr(step / num_steps), schedule.log_snr((step - 1) / num_steps)
        weight = num_steps * discrete_weight(log_snr_s, log_snr)
        return log_snr, self.scheduler.timestep_from_log_snr(log_snr), weight

    def losses(self, model: Any, levels: Tensor, labels: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """The loss of every row, (count,) on the device, and its log SNR, (count,) on the CPU.

        Arguments:
            levels: (count, C, H, W) integers. labels: (count,) classes, for a network that has them.
        """
        x = encode_pixels(levels.to(self.device, non_blocking=True), self.num_levels, self.args.pixel_encoding)
        if self.random_flip:
            flipped = self._draw(rows, "flip") < 0.5
            x = torch.where(flipped.to(self.device)[:, None, None, None], x.flip(-1), x)
        noise = row_noise(x.shape, self.seed, rows.step, rows.first, self._generator, self.device)
        log_snr, timestep, weight = self.times(rows)
        z_t = diffuse(x, noise, log_snr)
        conditioning = {}
        if self.num_classes is not None:
            labels = labels.to(self.device, non_blocking=True)
            if self.class_dropout:
                dropped = self._draw(rows, "class dropout") < self.class_dropout
                labels = torch.where(dropped.to(self.device), self.num_classes, labels)
            conditioning["class_labels"] = labels
        output = model(z_t, timestep.float().to(self.device), **conditioning, return_dict=False)[0]
        losses = diffusion_loss(
            output,
            x,
            noise,
            log_snr,
            prediction_type=self.args.prediction_type,
            objective=self.args.loss,
            elbo_weight=weight,
            min_snr_gamma=self.args.min_snr_gamma,
            sigmoid_bias=self.args.sigmoid_bias,
        )
        return losses, log_snr

    def _draw(self, rows: Rows, purpose: str) -> Tensor:
        u = torch.rand(rows.total, generator=generator_for(self.seed, purpose, rows.step))
        return u[rows.first : rows.first + rows.count]
