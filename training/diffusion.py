"""One training step's mathematics: from integer images to a loss for each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from arguments import DiffusionArguments, trains_in_discrete_time
from data import UNLABELLED
from randomness import generator_for, row_noise, seed_for
from torch import Tensor

from vdm_diffusers import LearnedNoiseSchedule, VDMFlowScheduler, VDMScheduler
from vdm_diffusers.adaptive_time_sampling import AdaptiveTimeSampler
from vdm_diffusers.decoders import encode_pixels, softmax_log_likelihood
from vdm_diffusers.elbo import bits_per_dim, continuous_weight, discrete_weight, prior_kl
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.learned_variance import decoder_bound, split_variance, variance_bound
from vdm_diffusers.models.learned_noise_schedule import ScheduleCut
from vdm_diffusers.objectives import diffusion_loss
from vdm_diffusers.time_sampling import discretize, low_discrepancy, uniform


@dataclass(frozen=True)
class Rows:
    """Where a micro-batch stands: rows first..first+count-1 of the `total` rows of an optimiser step's global
    batch.
    """

    step: int
    first: int
    count: int
    total: int


def make_scheduler(args: DiffusionArguments) -> VDMScheduler | VDMFlowScheduler:
    """The scheduler that is trained with, and saved with the model."""
    if args.path == "flow":
        return VDMFlowScheduler(
            num_train_timesteps=args.ddpm_num_steps, shift=args.flow_shift, stochasticity=args.stochasticity or 0.0
        )
    return VDMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        prediction_type=args.prediction_type,
        log_snr_max=args.log_snr_max,
        log_snr_min=args.log_snr_min,
        variance_type=args.variance_type,
        log_snr_table=args.log_snr_table,
        stochasticity=1.0 if args.stochasticity is None else args.stochasticity,
    )


def schedule_name(args: DiffusionArguments) -> str:
    """The noise schedule in words."""
    return f"of a flow, shift {args.flow_shift:g}" if args.path == "flow" else args.ddpm_beta_schedule


@dataclass(frozen=True)
class Times:
    """The times of a micro-batch, float64 on the CPU (log SNR and weight of a learned schedule: on its device).

    Attributes:
        t: (count,) in [0, 1].
        log_snr: (count,).
        timestep: (count,) for the network.
        elbo_weight: (count,); None for a table of betas in discrete time, where the step to clean data has none.
        importance: (count,) 1 / p(t), the weights of the losses; None: all are 1.
        step: (count,) the step 1..T in discrete time, else None.
        cut: where they come from a learned schedule.
    """

    t: Tensor
    log_snr: Tensor
    timestep: Tensor
    elbo_weight: Tensor | None
    importance: Tensor | None = None
    step: Tensor | None = None
    cut: ScheduleCut | None = None


@dataclass(frozen=True)
class Losses:
    """The losses of a micro-batch.

    Attributes:
        values: (count,) on the device, as under uniform times.
        times: where they were taken; None for a model without times.
        ends: (count,) bits/dim of prior and reconstruction, where the end points are learned; else None.
    """

    values: Tensor
    times: Times | None
    ends: Tensor | None = None

    @property
    def weighted(self) -> Tensor:
        """(count,) what is averaged and backpropagated: an unbiased estimate, however the times were drawn."""
        importance = None if self.times is None else self.times.importance
        return self.values if importance is None else self.values * importance.to(self.values)


class DiffusionTask:
    """The loss of a network on integer images; every random number is a function of (seed, step, row)."""

    def __init__(
        self,
        args: DiffusionArguments,
        scheduler: VDMScheduler | VDMFlowScheduler,
        *,
        num_levels: int,
        seed: int,
        device: torch.device,
        random_flip: bool = False,
        num_classes: int | None = None,
        class_dropout: float = 0.0,
        dropped_label: int | None = None,
        learned_schedule: LearnedNoiseSchedule | None = None,
        sampler: AdaptiveTimeSampler | None = None,
    ) -> None:
        self.args, self.scheduler, self.num_levels, self.seed, self.device = args, scheduler, num_levels, seed, device
        self.random_flip, self.num_classes, self.class_dropout = random_flip, num_classes, class_dropout
        self.schedule = scheduler.noise_schedule
        self.dropped_label = num_classes if dropped_label is None else dropped_label
        self.learned_schedule, self.sampler = learned_schedule, sampler
        self.discrete = trains_in_discrete_time(args)
        self._generator = torch.Generator(device)
        # of x_1, x_2, ...: looked up, not computed, at every step
        every = torch.arange(args.ddpm_num_steps, dtype=torch.float64)
        self.path = scheduler.timeline.path
        in_table = scheduler.timeline.entries is not None
        self._table = scheduler.log_snr(every) if in_table and self.discrete else None

    def times(self, rows: Rows) -> Times:
        """The times of each row."""
        generator, importance = generator_for(self.seed, "time", rows.step), None
        if self.args.time_sampling == "uniform":
            u = uniform(rows.total, generator=generator)[rows.first : rows.first + rows.count]
        else:
            u = low_discrepancy(rows.count, offset=rows.first, total=rows.total, generator=generator)
        if self.sampler is not None:
            u, importance = self.sampler.place(u)
        if self.learned_schedule is not None:
            cut = self.learned_schedule.cut(u)
            timestep = self.scheduler.timestep_from_log_snr(cut.log_snr)
            return Times(u, cut.log_snr, timestep, cut.elbo_weight, cut=cut)
        schedule, num_steps = self.schedule, self.args.ddpm_num_steps
        if not self.discrete:
            log_snr, weight = schedule.log_snr(u), continuous_weight(schedule.derivative(u))
            return Times(u, log_snr, self.scheduler.timestep_from_log_snr(log_snr), weight, importance)
        step = discretize(u, num_steps)
        if self._table is not None:  # entry i = step - 1 of the table is x_step
            return Times(u, self._table[step - 1], (step - 1).double(), None, importance, step)
        log_snr, log_snr_s = schedule.log_snr(step / num_steps), schedule.log_snr((step - 1) / num_steps)
        weight = num_steps * discrete_weight(log_snr_s, log_snr)
        return Times(u, log_snr, self.scheduler.timestep_from_log_snr(log_snr), weight, importance, step)

    def losses(self, model: Any, levels: Tensor, labels: Tensor | None, rows: Rows) -> Losses:
        """The loss of every row.

        Arguments:
            levels: (count, C, H, W) integers. labels: (count,) classes, for a network that has them; None: "no class".
        """
        args = self.args
        levels = levels.to(self.device, non_blocking=True)
        if self.random_flip:
            flipped = (self._draw(rows, "flip") < 0.5).to(self.device)[:, None, None, None]
            levels = torch.where(flipped, levels.flip(-1), levels)
        x = encode_pixels(levels, self.num_levels, args.pixel_encoding)
        noise = row_noise(x.shape, self.seed, rows.step, rows.first, self._generator, self.device)
        times = self.times(rows)
        z_t = diffuse(x, noise, times.log_snr, path=self.path)
        conditioning = {}
        if self.num_classes is not None:
            assert self.dropped_label is not None  # it is `num_classes` where nothing else was said
            if labels is None:
                labels = torch.full((rows.count,), self.dropped_label)
            labels = labels.to(self.device, non_blocking=True)
            labels = torch.where(labels == UNLABELLED, self.dropped_label, labels)
            if self.class_dropout:
                dropped = self._draw(rows, "class dropout") < self.class_dropout
                labels = torch.where(dropped.to(self.device), self.dropped_label, labels)
            conditioning["class_labels"] = labels
        output = model(z_t, times.timestep.float().to(self.device), **conditioning, return_dict=False)[0]
        learns_variance = args.variance_type != "fixed_small"
        values = diffusion_loss(
            split_variance(output, x.shape[1])[0] if learns_variance else output,
            x,
            noise,
            times.log_snr,
            prediction_type=args.prediction_type,
            objective=args.loss,
            elbo_weight=times.elbo_weight,
            path=self.path,
            min_snr_gamma=args.min_snr_gamma,
            sigmoid_bias=args.sigmoid_bias,
        )
        if learns_variance:
            scale = args.vlb_weight * args.ddpm_num_steps / (x[0].numel() * math.log(2))
            values = values + scale * self._variance_bound(output, x, noise, levels, times).to(values)
        ends = None
        if self.learned_schedule is not None and args.learn_end_points:
            ends = self._end_terms(levels, x, rows)
        return Losses(values, times, ends)

    def _variance_bound(self, output: Tensor, x: Tensor, noise: Tensor, levels: Tensor, times: Times) -> Tensor:
        """(count,) nats: the bound of each row's step as a function of the predicted variance."""
        assert times.step is not None
        kinds: dict[str, Any] = {
            "prediction_type": self.args.prediction_type,
            "variance_type": self.args.variance_type,
        }
        if self.scheduler.timeline.entries is None:
            log_snr_s = self.schedule.log_snr((times.step - 1) / self.args.ddpm_num_steps)
            return variance_bound(output, x, noise, log_snr_s, times.log_snr, **kinds)
        bound = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        first = times.step == 1  # the step from x_1 to clean data is the decoder's
        for rows in (first.nonzero()[:, 0], (~first).nonzero()[:, 0]):
            if not len(rows):
                continue
            here = rows.to(x.device)
            if bool(first[rows[0]]):
                ends = self.scheduler.log_snr(torch.tensor([0.0, 1.0]))
                data: dict[str, Any] = {"num_levels": self.num_levels, "pixel_encoding": self.args.pixel_encoding}
                terms = decoder_bound(
                    output[here], x[here], noise[here], levels[here].long(), ends[0], ends[1], **kinds, **data
                )
            else:
                log_snr_s = self.scheduler.log_snr((times.step[rows] - 2).double())
                terms = variance_bound(output[here], x[here], noise[here], log_snr_s, times.log_snr[rows], **kinds)
            bound = bound.index_add(0, here, terms.to(bound))
        return bound

    def _end_terms(self, levels: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """(count,) bits/dim: prior and reconstruction as functions of the learned end points."""
        assert self.learned_schedule is not None
        highest, lowest = self.learned_schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
        noise = row_noise(x.shape, seed_for(self.seed, "z_0"), rows.step, rows.first, self._generator, self.device)
        log_likelihood = softmax_log_likelihood(
            levels,
            diffuse(x, noise, highest),
            highest,
            num_levels=self.num_levels,
            pixel_encoding=self.args.pixel_encoding,
        )
        return bits_per_dim(prior_kl(x, lowest) - log_likelihood, x[0].numel())

    def _draw(self, rows: Rows, purpose: str) -> Tensor:
        u = torch.rand(rows.total, generator=generator_for(self.seed, purpose, rows.step))
        return u[rows.first : rows.first + rows.count]
