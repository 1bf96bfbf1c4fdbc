r"""Step grids: where the n steps of a chain are. One rule, for samplers and for the bounds of their chains.

A grid is one of three, and n of its steps are placed on any timeline:

    time       uniform in t: in a table's index, by Diffusers' spacings, or in the noise schedule's time
    log_snr    uniform in log SNR, or as nearly as the entries of a table allow
    optimal    by dynamic programming, where the chain's expected bound is smallest (`reverse_variance.optimal_grid`)

A step is where the network is evaluated. What follows the last one, clean data or z_0, is no step.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .reverse_variance import OptimalVariance, optimal_grid, shortest_path, step_costs
from .timelines import Timeline, whole

Grid = Literal["time", "log_snr", "optimal"]
Spacing = Literal["linspace", "leading", "trailing"]
GRIDS: tuple[str, ...] = get_args(Grid)
SPACINGS: tuple[str, ...] = get_args(Spacing)


class Steps(NamedTuple):
    """n steps of a chain in the order in which a sampler takes them: two (n,) float64 tensors on the CPU."""

    timesteps: Tensor  # descending
    log_snrs: Tensor  # ascending


def default_grid(timeline: Timeline, num_steps: int, *, optimal_variance: bool) -> Grid:
    """The grid that is used unless one is asked for.

    "time"; but with the optimal reverse variance, which is worth little on it, "optimal" below the number of steps
    that the network was trained on, and "log_snr", which is as good there, from it on.
    """
    if not optimal_variance:
        return "time"
    return "optimal" if num_steps < timeline.num_timesteps else "log_snr"


def place_steps(
    timeline: Timeline,
    num_steps: int,
    grid: Grid,
    *,
    spacing: Spacing = "trailing",
    offset: int = 0,
    optimal: OptimalVariance | None = None,
    variance: Literal["posterior", "optimal"] = "posterior",
    ends_at_mean: bool = False,
) -> Steps:
    """The `num_steps` steps of a chain on `timeline`.

    Arguments:
        num_steps: n >= 1; at most T where a chain may visit the T entries of a table alone, and then n = T is all of
            them.
        grid: see the module.
        spacing, offset: of the grid "time", see `integer_timesteps` and `fractional_times`.
        optimal, variance: of the grid "optimal": the network's mean squared errors, and the reverse variance whose
            bound counts.
        ends_at_mean: whether the last step returns x_hat, as it does in a table of betas. It then adds no noise, and
            the grid "optimal" puts it where little is left: at timestep 0 of a table, one training step above z_0
            elsewhere.
    Raises:
        ValueError: a number of steps out of range; an unknown grid; the grid "optimal" without `optimal`.
    """
    if grid not in GRIDS:
        raise ValueError(f"`grid` must be one of {', '.join(GRIDS)}, got {grid!r}.")
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
    if grid == "optimal" and optimal is None:
        raise ValueError(
            "the grid 'optimal' needs the network's mean squared errors: put what estimate_optimal_variance(...) "
            "returns "
            "into the scheduler's config, VDMScheduler.from_config(scheduler.config, optimal_variance=...)."
        )
    if timeline.entries is None:
        return _between_entries(timeline, num_steps, grid, spacing, offset, optimal, variance, ends_at_mean)
    return _among_entries(timeline.entries, num_steps, grid, spacing, offset, optimal, variance)


def _among_entries(
    entries: Tensor,
    num_steps: int,
    grid: Grid,
    spacing: Spacing,
    offset: int,
    optimal: OptimalVariance | None,
    variance: Literal["posterior", "optimal"],
) -> Steps:
    """Steps that are entries of a table."""
    total = len(entries)
    if num_steps > total:
        raise ValueError(
            f"`num_inference_steps` must not exceed the {total} timesteps that the model was trained on, got "
            f"{num_steps}."
        )
    if num_steps == total:
        index = torch.arange(total - 1, -1, -1)
    elif grid == "time":
        index = integer_timesteps(spacing, num_steps, total, offset)
    elif num_steps == 1:  # there is no room for the last step: what counts is to begin in the noise
        index = torch.tensor([total - 1])
    elif grid == "log_snr":
        index = even_entries(entries, num_steps).flip(0)
    else:
        assert optimal is not None
        index = shortest_path(step_costs(optimal, entries, variance), num_steps - 1).flip(0)
    return Steps(index.double(), entries[index])


def _between_entries(
    timeline: Timeline,
    num_steps: int,
    grid: Grid,
    spacing: Spacing,
    offset: int,
    optimal: OptimalVariance | None,
    variance: Literal["posterior", "optimal"],
    ends_at_mean: bool,
) -> Steps:
    """Steps anywhere on a timeline, from its noisiest timestep on."""
    schedule = timeline.noise_schedule
    high, low = schedule.log_snr_max, schedule.log_snr_min
    if grid == "time":
        log_snrs = schedule.log_snr(fractional_times(spacing, num_steps, timeline.num_timesteps, offset))
    elif grid == "log_snr":
        log_snrs = between(high, low, num_steps)[1:].flip(0)
    elif ends_at_mean and num_steps == 1:
        log_snrs = torch.tensor([low], dtype=torch.float64)
    else:
        assert optimal is not None
        if ends_at_mean and not timeline.ends_at_data:  # a schedule that ends at data begins a step above it
            high = float(timeline.log_snr(timeline.terminal_timestep + 1))
        candidates = between(high, low, max(1024, 2 * num_steps))
        chain = optimal_grid(optimal, num_steps - ends_at_mean, candidates, variance=variance)
        log_snrs = chain[not ends_at_mean :].flip(0)
    return Steps(whole(timeline.timestep(log_snrs)), log_snrs)


def integer_timesteps(spacing: str, num_steps: int, num_train_timesteps: int, offset: int = 0) -> Tensor:
    """Exactly `num_steps` distinct integer timesteps in [0, T - 1], descending: (n,) int64, n <= T.

    trailing: round(T i / n) - 1, from T - 1 on. linspace: both ends and equal spacing; one step alone starts at T - 1.
    leading: multiples of T // n plus `offset` (kept below T); where that ratio is 1 and n < T it would start pure
    noise in mid-schedule, and the steps are spread like linspace.

    Raises:
        ValueError: an unknown spacing.
    Source: Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", table 2. In NumPy's
        floating point, which Diffusers uses, so that ties are rounded to the same side; what Diffusers gets wrong is
        the number of steps.
    """
    n, last = num_steps, num_train_timesteps - 1
    ratio = num_train_timesteps // n
    i = torch.arange(n, dtype=torch.float64)
    if spacing == "trailing":
        delta = (num_train_timesteps - num_train_timesteps / n) - num_train_timesteps  # as numpy.arange has it
        grid = (num_train_timesteps + i * delta).round() - 1
    elif spacing == "leading" and ratio > 1:
        grid = i.flip(0) * ratio + min(offset, last - (n - 1) * ratio)
    elif spacing in ("leading", "linspace"):
        grid = (i.flip(0) * (last / (n - 1))).round() if n > 1 else i + last
    else:
        raise ValueError(f"`timestep_spacing` must be one of {', '.join(SPACINGS)}, got {spacing!r}.")
    return grid.long()


def fractional_times(spacing: str, num_steps: int, num_train_timesteps: int, offset: int = 0) -> Tensor:
    """`num_steps` times in (0, 1], descending, uniform in t: (n,) float64; any number of steps.

    trailing: i / n, from 1 down to 1/n. linspace: from 1 down to 1/T. leading: i / n from 0 on, moved up by (1 +
    offset) / T.

    Raises:
        ValueError: an unknown spacing.
    """
    n = num_steps
    i = torch.arange(n - 1, -1, -1, dtype=torch.float64)
    smallest = min(1 / num_train_timesteps, 1 / n)
    if spacing == "linspace" and n > 1:
        return smallest + (1 - smallest) * i / (n - 1)
    if spacing == "leading":
        return i / n + min((1 + offset) / num_train_timesteps, 1 / n)
    if spacing in ("trailing", "linspace"):
        return (i + 1) / n
    raise ValueError(f"`timestep_spacing` must be one of {', '.join(SPACINGS)}, got {spacing!r}.")


def even_entries(log_snrs: Tensor, num_steps: int) -> Tensor:
    """Which `num_steps` entries of a decreasing table are about evenly spaced in log SNR: increasing indices, both
    ends included.

    A last entry of -inf (zero terminal SNR) counts for itself: the others are spread over the finite ones.
    """
    if num_steps > 1 and log_snrs[-1] == -torch.inf:
        last = torch.tensor([len(log_snrs) - 1])
        return torch.cat([even_entries(log_snrs[:-1], num_steps - 1), last])
    if num_steps == 1:
        return torch.tensor([len(log_snrs) - 1])
    wanted = torch.linspace(float(log_snrs[0]), float(log_snrs[-1]), num_steps, dtype=torch.float64)
    nearest = (log_snrs - wanted[:, None]).abs().argmin(1)
    # where the table is coarser than the grid entries coincide: move up to keep them distinct, but not beyond the end
    number = torch.arange(num_steps)
    return torch.minimum((nearest - number).cummax(0).values + number, len(log_snrs) - num_steps + number)


def between(log_snr_max: float, log_snr_min: float, num_steps: int) -> Tensor:
    """Log SNRs equally spaced from one end to the other, both exact, decreasing: (num_steps + 1,) float64."""
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return (1 - t) * log_snr_max + t * log_snr_min
