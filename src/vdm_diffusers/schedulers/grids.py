"""Which timesteps a sampler visits: Diffusers' three spacings in exact integer arithmetic, and their fractional kin."""

from __future__ import annotations

import torch
from torch import Tensor

SPACINGS = ("linspace", "leading", "trailing")


def integer_timesteps(spacing: str, num_steps: int, num_train_timesteps: int, offset: int = 0) -> Tensor:
    """Exactly `num_steps` distinct integer timesteps in [0, T - 1], descending: (n,) int64.

    trailing: round(T i / n) - 1, from T - 1 on. linspace: both ends and equal spacing; one step alone starts at T - 1.
    leading: multiples of T // n plus `offset` (kept below T); where that ratio is 1 and n < T it would start pure noise in
    mid-schedule, and the steps are spread like linspace.

    Source: Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", table 2; rounding is half to even.
    """
    n, last = num_steps, num_train_timesteps - 1
    i = torch.arange(n - 1, -1, -1)
    if spacing == "trailing":
        return _rounded_ratio(num_train_timesteps * (i + 1), n) - 1
    ratio = num_train_timesteps // n
    if spacing == "leading" and ratio > 1:
        return i * ratio + min(offset, last - (n - 1) * ratio)
    return _rounded_ratio(last * i, n - 1) if n > 1 else torch.tensor([last])


def _rounded_ratio(numerator: Tensor, denominator: int) -> Tensor:
    """numerator / denominator to the nearest integer, ties to even, without floating point."""
    quotient, remainder = numerator // denominator, numerator % denominator
    up = (2 * remainder > denominator) | ((2 * remainder == denominator) & (quotient % 2 == 1))
    return quotient + up.long()


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
