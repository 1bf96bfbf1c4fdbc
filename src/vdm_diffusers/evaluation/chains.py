"""What is evaluated, seen from the scheduler: its log SNRs, the steps of a chain, the reverse variance, the
decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from vdm_diffusers.likelihood import Decoder, DensityDecoder, GaussianDecoder, SoftmaxDecoder
from vdm_diffusers.noise_schedules import NoiseSchedule
from vdm_diffusers.numerics import as_float64
from vdm_diffusers.reverse_variance import (
    VARIANCE_TYPES,
    OptimalVariance,
    ReverseVariance,
    forward_variance,
    posterior_variance,
)
from vdm_diffusers.schedulers.adoption import is_of_kind, other_model, table_of
from vdm_diffusers.schedulers.configuration import betas_of_log_snrs
from vdm_diffusers.schedulers.scheduling_flow import VDMFlowScheduler
from vdm_diffusers.schedulers.scheduling_sigma import VDMSigmaScheduler
from vdm_diffusers.schedulers.scheduling_vdm import VDMScheduler
from vdm_diffusers.step_grids import GRIDS, Grid, default_grid, place_steps

Scheduler = VDMScheduler | VDMFlowScheduler | VDMSigmaScheduler


def adopt(scheduler: Any) -> Scheduler:
    """A scheduler that knows its log SNRs: the given one, or the one of ours that is of a stock one's kind.

    A stock scheduler with betas becomes a `VDMScheduler` with the table that the object has; those of flow matching
    become a `VDMFlowScheduler`, EDM's a `VDMSigmaScheduler`. Those of these two kinds are samplers that may be
    deterministic: the bound is that of ancestral sampling.

    Raises:
        ValueError: a scheduler of another kind of model, which is named with the class that is right; deterministic
            sampling.
    """
    config = scheduler.config
    if not hasattr(scheduler, "timeline"):  # by name: a class from a checkpoint's own code is another one
        name = type(scheduler).__name__
        for cls in (VDMFlowScheduler, VDMSigmaScheduler):
            if is_of_kind(cls.__name__, name, config):
                shift = (
                    {"shift": float(scheduler.shift)} if hasattr(scheduler, "shift") else {}
                )  # which may have been set
                return cls.from_config({**config, "_class_name": name}, **shift)
        if (reason := other_model(name, config)) is not None:
            raise ValueError(reason)
        own = VDMScheduler.from_config({**config, "_class_name": name})
        if own.timeline.entries is not None:
            table = table_of(scheduler, own.timeline.entries)
            if not torch.equal(table, own.timeline.entries):
                betas = betas_of_log_snrs(table).tolist()
                own = VDMScheduler.from_config(
                    own.config, trained_betas=betas, num_train_timesteps=len(betas), rescale_betas_zero_snr=False
                )
        scheduler, config = own, own.config
    if config.get("stochasticity", 1.0) == 0 and scheduler.timeline.path == "vp":
        raise ValueError(
            "`scheduler` has stochasticity=0: deterministic sampling has no finite ELBO. Set stochasticity=1.0 in its "
            "config: the "
            "bound is that of ancestral sampling."
        )
    return cast(Scheduler, scheduler)


def reverse_variance_of(variance_type: str, is_chain: bool, num_steps: int | None, scheduler: Any) -> ReverseVariance:
    if variance_type not in VARIANCE_TYPES:
        raise ValueError(
            f"`variance_type` must be one of {', '.join(VARIANCE_TYPES)}, got {variance_type!r}: pass one of them."
        )
    kind = VARIANCE_TYPES[variance_type]
    if not kind.startswith("learned"):
        return kind
    if not is_chain:
        raise ValueError(
            f"variance_type={variance_type!r} cannot be used in continuous time, where no reverse variance remains. "
            "Take "
            "method='discrete', or variance_type='fixed_small' to leave the network's variance aside."
        )
    steps = scheduler.config.num_train_timesteps
    if kind == "learned" and num_steps not in (None, steps):
        raise ValueError(
            f"variance_type='learned' holds for the {steps} steps that the model was trained with, got "
            f"num_steps={num_steps}. Take "
            "'learned_range', or variance_type='fixed_small'."
        )
    return kind


def optimal_of(scheduler: Any) -> OptimalVariance:
    table = scheduler.config.get("optimal_variance")
    if table is None:
        raise ValueError(
            "variance_type='optimal' and grid='optimal' need the network's mean squared errors: put what "
            "estimate_optimal_variance(...) "
            "returns into the scheduler's config, VDMScheduler.from_config(scheduler.config, optimal_variance=...)."
        )
    return OptimalVariance.from_config(table)


def chain_log_snrs(
    scheduler: Any,
    num_steps: int | None = None,
    grid: Grid | Sequence[float] | Tensor | None = None,
    kind: ReverseVariance | None = None,
) -> Tensor:
    """The log SNRs of a chain, decreasing, float64: x_1 (or z_0) first, then one for each transition.

    The steps are where `set_timesteps(num_steps)` puts a sampler's (`step_grids`), but for two things. A bound's chain
    has both ends of a table of betas, its decoder's and its prior's, so that "time" is spaced like "linspace" there,
    and "trailing" in log SNR, whatever `timestep_spacing` is. And its z_0 is decoded, also where a sampler's last step
    returns x_hat instead.

    `num_steps` counts evaluations of the network: a chain of a table of betas needs one at x_1, so that it has
    `num_steps` entries; one of a log-SNR schedule has `num_steps + 1`. `kind` is the chain's reverse variance, by
    default the scheduler's. Other arguments and Raises: see `evaluate_likelihood`.
    """
    timeline, config = scheduler.timeline, scheduler.config
    trained, in_table = timeline.num_timesteps, timeline.entries is not None
    steps = trained if num_steps is None else num_steps
    if grid is not None and not isinstance(grid, str):
        return _own_grid(timeline.noise_schedule, grid, num_steps, in_table)
    if grid not in (*GRIDS, None):
        raise ValueError(f"`grid` must be 'time', 'log_snr', 'optimal' or log SNRs, got {grid!r}.")
    low, high = (min(2, trained), trained) if in_table else (1, 1 << 20)
    if not low <= steps <= high:
        table = ", the length of the scheduler's table" if in_table else ""
        raise ValueError(f"`num_steps` must lie in {low}..{high}{table}, got {steps}.")
    kind = kind or VARIANCE_TYPES.get(config.variance_type)
    place: Grid = grid or config.get("step_grid") or default_grid(timeline, steps, optimal_variance=kind == "optimal")
    chain = place_steps(
        timeline,
        steps,
        place,
        spacing="linspace" if in_table else "trailing",
        optimal=optimal_of(scheduler) if place == "optimal" else None,
        variance="posterior" if kind == "posterior" else "optimal",
        ends_at_mean=in_table or config.get("final_step") == "mean",
    ).log_snrs.flip(0)
    if in_table:
        return chain
    return torch.cat([as_float64([timeline.noise_schedule.log_snr_max]), chain])


def _own_grid(schedule: NoiseSchedule, grid: Any, num_steps: int | None, in_table: bool) -> Tensor:
    """Log SNRs that the user gives, checked."""
    log_snrs = torch.as_tensor(grid, dtype=torch.float64)
    if num_steps is not None and num_steps != len(log_snrs) - (not in_table):
        raise ValueError(f"`num_steps` and `grid` disagree: {num_steps}, and {len(log_snrs)} log SNRs.")
    ends = [schedule.log_snr_max, schedule.log_snr_min]
    if log_snrs.ndim != 1 or len(log_snrs) < 2 or log_snrs[[0, -1]].tolist() != ends:
        raise ValueError(f"`grid` must run from {ends[0]} to {ends[1]}, the schedule's own ends.")
    return log_snrs


def decoder_of(scheduler: Any, kind: ReverseVariance, num_levels: int | None) -> Decoder:
    if num_levels is None:
        return DensityDecoder(scheduler.noise_schedule.log_snr_max)
    if scheduler.timeline.entries is None:
        return SoftmaxDecoder(scheduler.noise_schedule.log_snr_max)
    first, second = scheduler.log_snr(torch.tensor([0.0, 1.0])).double()
    # also with optimal variances: a pixel's error at x_1 is nothing like a Gaussian of its mean square, which decodes
    # worse
    variance = posterior_variance(first, second)
    return GaussianDecoder(
        log_snr_1=float(first),
        variance=float(variance),
        upper_variance=float(forward_variance(torch.inf, first)),
        learned=kind if kind in ("learned", "learned_range") else None,
    )
