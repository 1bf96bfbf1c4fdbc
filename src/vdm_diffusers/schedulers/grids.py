"""Which timesteps a sampler visits: Diffusers' three spacings, with the right number of steps, their fractional kin, and others in log SNR."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SPACINGS = ("linspace", "leading", "trailing")


def integer_timesteps(spacing: str, num_steps: int, num_train_timesteps: int, offset: int = 0) -> Tensor:
    """Exactly `num_steps` distinct integer timesteps in [0, T - 1], descending: (n,) int64, n <= T.

    trailing: round(T i / n) - 1, from T - 1 on. linspace: both ends and equal spacing; one step alone starts at T - 1.
    leading: multiples of T // n plus `offset` (kept below T); where that ratio is 1 and n < T it would start pure noise in
    mid-schedule, and the steps are spread like linspace.

    Source: Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", table 2. In floating point like
    Diffusers, so that ties are rounded to the same side; what Diffusers gets wrong is the number of steps, which is given here.
    """
    n, last = num_steps, num_train_timesteps - 1
    ratio = num_train_timesteps // n
    if spacing == "trailing":
        grid = np.arange(num_train_timesteps, 0, -num_train_timesteps / n)[:n].round() - 1
    elif spacing == "leading" and ratio > 1:
        grid = np.arange(n - 1, -1, -1) * ratio + min(offset, last - (n - 1) * ratio)
    else:
        grid = np.linspace(0, last, n).round()[::-1] if n > 1 else np.array([last])
    return torch.from_numpy(grid.astype(np.int64))


def fractional_times(spacing: str, num_steps: int, num_train_timesteps: int, offset: int = 0) -> Tensor:
    """`num_steps` times in (0, 1], descending, uniform in t: (n,) float64; any number of steps.

    trailing: i / n, from 1 down to 1/n. linspace: from 1 down to 1/T. leading: i / n from 0 on, moved up by (1 + offset) / T.
    """
    n = num_steps
    i = torch.arange(n - 1, -1, -1, dtype=torch.float64)
    smallest = min(1 / num_train_timesteps, 1 / n)
    if spacing == "linspace" and n > 1:
        return smallest + (1 - smallest) * i / (n - 1)
    if spacing == "leading":
        return i / n + min((1 + offset) / num_train_timesteps, 1 / n)
    return (i + 1) / n


def even_entries(log_snrs: Tensor, num_steps: int) -> Tensor:
    """Which `num_steps` entries of a decreasing table are about evenly spaced in log SNR: increasing indices, both ends included.

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
