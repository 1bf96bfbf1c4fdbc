"""What is evaluated, seen from the scheduler: its log SNRs, the steps of a chain, the reverse variance, the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from vdm_diffusers.likelihood import Decoder, DensityDecoder, GaussianDecoder, SoftmaxDecoder
from vdm_diffusers.reverse_variance import (
    OptimalVariance,
    ReverseVariance,
    forward_variance,
    optimal_grid,
    posterior_variance,
)
from vdm_diffusers.schedulers.grids import even_entries
from vdm_diffusers.schedulers.scheduling_vdm import VDMScheduler

Grid = Literal["time", "log_snr", "optimal"]

REVERSE_VARIANCES: dict[str, ReverseVariance] = {
    "fixed_small": "posterior",
    "fixed_small_log": "posterior",
    "fixed_large": "forward",
    "fixed_large_log": "forward",
    "optimal": "optimal",
    "learned": "learned",
    "learned_range": "learned_range",
}


def adopt(scheduler: Any) -> Any:
    """A scheduler that knows its log SNRs: the given one, or a `VDMScheduler` with a stock scheduler's table of betas."""
    config = scheduler.config
    if not hasattr(scheduler, "is_log_snr_schedule"):  # by name: a class from a checkpoint's own code is another one
        missing = [key for key in ("beta_schedule", "num_train_timesteps") if key not in config]
        if missing:
            raise ValueError(
                f"`scheduler`, a {type(scheduler).__name__}, has no table of betas (no `{missing[0]}` in its config), which "
                "the bound is computed from. Pass a VDMScheduler that says what the model was trained with."
            )
        scheduler = VDMScheduler.from_config(config)
        config = scheduler.config
    if config.get("stochasticity", 1.0) == 0:
        raise ValueError(
            "`scheduler` has stochasticity=0: deterministic sampling has no finite ELBO. Set stochasticity=1.0 in its config: the "
            "bound is that of ancestral sampling."
        )
    return scheduler


def reverse_variance_of(variance_type: str, is_chain: bool, num_steps: int | None, scheduler: Any) -> ReverseVariance:
    if variance_type not in REVERSE_VARIANCES:
        raise ValueError(
            f"`variance_type` must be one of {', '.join(REVERSE_VARIANCES)}, got {variance_type!r}: pass one of them."
        )
    kind = REVERSE_VARIANCES[variance_type]
    if not kind.startswith("learned"):
        return kind
    if not is_chain:
        raise ValueError(
            f"variance_type={variance_type!r} cannot be used in continuous time, where no reverse variance remains. Take "
            "method='discrete', or variance_type='fixed_small' to leave the network's variance aside."
        )
    steps = scheduler.config.num_train_timesteps
    if kind == "learned" and num_steps not in (None, steps):
        raise ValueError(
            f"variance_type='learned' holds for the {steps} steps that the model was trained with, got num_steps={num_steps}. Take "
            "'learned_range', or variance_type='fixed_small'."
        )
    return kind


def optimal_of(scheduler: Any) -> OptimalVariance:
    table = scheduler.config.get("optimal_variance")
    if table is None:
        raise ValueError(
            "variance_type='optimal' and grid='optimal' need the network's mean squared errors: put what estimate_optimal_variance(...) "
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

    `num_steps` counts evaluations of the network: a chain of a table of betas needs one at x_1, so that it has `num_steps` entries;
    one of a log-SNR schedule has `num_steps + 1`. `kind` is the chain's reverse variance, by default the scheduler's. Other arguments
    and Raises: see `evaluate_likelihood`.
    """
    schedule, trained = scheduler.noise_schedule, scheduler.config.num_train_timesteps
    is_table = not scheduler.is_log_snr_schedule
    steps = trained if num_steps is None else num_steps
    if grid is not None and not isinstance(grid, str):
        log_snrs = torch.as_tensor(grid, dtype=torch.float64)
        if num_steps is not None and num_steps != len(log_snrs) - (not is_table):
            raise ValueError(f"`num_steps` and `grid` disagree: {num_steps}, and {len(log_snrs)} log SNRs.")
        ends = [schedule.log_snr_max, schedule.log_snr_min]
        if log_snrs.ndim != 1 or len(log_snrs) < 2 or log_snrs[[0, -1]].tolist() != ends:
            raise ValueError(f"`grid` must run from {ends[0]} to {ends[1]}, the schedule's own ends.")
        return log_snrs
    if grid not in (None, "time", "log_snr", "optimal"):
        raise ValueError(f"`grid` must be 'time', 'log_snr', 'optimal' or log SNRs, got {grid!r}.")
    low, high = (2, trained) if is_table else (1, 1 << 20)
    if not low <= steps <= high:
        table = ", the length of the scheduler's table" if is_table else ""
        raise ValueError(f"`num_steps` must lie in {low}..{high}{table}, got {steps}.")
    kind = kind or REVERSE_VARIANCES.get(scheduler.config.variance_type)
    if grid is None:
        grid = cast("Grid | None", scheduler.config.get("step_grid"))
    if grid is None:
        grid = "time" if kind != "optimal" else "optimal" if steps < trained else "log_snr"
    entries = scheduler.log_snr(torch.arange(trained)).double()
    if is_table and (grid == "time" or steps == trained):
        return entries[torch.linspace(0, trained - 1, steps, dtype=torch.float64).round().long()]
    if grid == "optimal":
        candidates = entries if is_table else _between(schedule, max(1024, 2 * steps))
        variance: Literal["posterior", "optimal"] = "posterior" if kind == "posterior" else "optimal"
        return optimal_grid(optimal_of(scheduler), steps - is_table, candidates, variance=variance)
    if not is_table:
        uniform = torch.arange(steps + 1, dtype=torch.float64) / steps
        return schedule.log_snr(uniform) if grid == "time" else _between(schedule, steps)
    if not bool(entries.isfinite().all()):
        raise ValueError("grid='log_snr' needs a finite log SNR at both ends: take 'time' with zero terminal SNR.")
    return entries[even_entries(entries, steps)]


def _between(schedule: Any, num_steps: int) -> Tensor:
    """Log SNRs equally spaced from one end of a schedule to the other, both exact: (num_steps + 1,)."""
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return (1 - t) * schedule.log_snr_max + t * schedule.log_snr_min


def decoder_of(scheduler: Any, kind: ReverseVariance, num_levels: int | None) -> Decoder:
    if num_levels is None:
        return DensityDecoder(scheduler.noise_schedule.log_snr_max)
    if scheduler.is_log_snr_schedule:
        return SoftmaxDecoder(scheduler.noise_schedule.log_snr_max)
    first, second = scheduler.log_snr(torch.tensor([0.0, 1.0])).double()
    variance = posterior_variance(first, second)
    if kind == "optimal":  # E|x - x_hat|^2 / D at x_1, which is zero for an exact network of a few known images
        variance = optimal_of(scheduler).overall.at(first).clamp(min=1e-12)
    return GaussianDecoder(
        log_snr_1=float(first),
        variance=float(variance),
        upper_variance=float(forward_variance(torch.inf, first)),
        learned=kind if kind in ("learned", "learned_range") else None,
    )
