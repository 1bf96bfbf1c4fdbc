"""Drawing the times of a training batch, and noise that is spread evenly.

The ELBO is an expectation over t ~ U[0, 1]. A stratified batch has one time in each of its n equal cells, which takes
most of the variance out of the average at no cost (Kingma et al. 2021, appendix I.1). It helps as far as the strata
reach, so they span the global batch: all processes and all micro-batches of one optimiser step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Independent times t ~ U[0, 1): (num_samples,) float64 on the CPU."""
    return torch.rand(num_samples, generator=generator, dtype=torch.float64)


def low_discrepancy(
    num_samples: int,
    *,
    shift: Tensor | float | None = None,
    offset: int = 0,
    total: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """t_i = mod(u_0 + i / n, 1): (num_samples,) float64 on the CPU, each of them uniform, one in each cell of width
    1/n.

    Arguments:
        num_samples: how many of the n times to return.
        shift: u_0 in [0, 1). All processes and micro-batches of one optimiser step must use the same: draw it from a
            generator that is seeded alike everywhere, or pass it. Default: drawn from `generator`.
        offset: index of the first time, e.g. process_index * num_samples.
        total: n, the size of the global batch. Default: num_samples.
    Raises:
        ValueError: a part that does not lie inside the global batch.
    Source: Kingma et al. 2021, appendix I.1.
    """
    total = num_samples if total is None else total
    if not (0 <= offset and num_samples >= 0 and offset + num_samples <= total):
        raise ValueError(
            f"times {offset} to {offset + num_samples - 1} do not lie in a global batch of {total}: `total` counts "
            "the samples "
            "of all processes and micro-batches."
        )
    if shift is None:
        shift = uniform(1, generator=generator)[0]
    index = torch.arange(offset, offset + num_samples, dtype=torch.float64)
    return (index / total + torch.as_tensor(shift, dtype=torch.float64).cpu()) % 1.0


def fold(u: Tensor) -> Tensor:
    """u -> 1 - |2 u - 1|, which keeps U[0, 1] uniform and removes the jump of a stratified average where u wraps
    around.

    A function of the time need not agree at its two ends; its composition with the fold does, and a shifted lattice
    rule then converges with the square of its size. Source: Hickernell 2002, "Obtaining O(N^{-2+eps}) convergence for
    lattice quadrature rules" (the baker's transform).
    """
    return 1 - (2 * u - 1).abs()


def latin_hypercube(num_samples: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Noises of which each is standard normal, and which have in every coordinate one value in each n-th of the
    distribution.

    A function's average over them has the variance of independent noises less that of its additive part, sum_i
    g_i(eps_i), for n large.

    Returns:
        (num_samples, *shape) float32 on the CPU.
    Source: McKay, Beckman & Conover 1979; Stein 1987.
    """
    rank = torch.rand(num_samples, *shape, generator=generator).argsort(0)
    u = (rank + torch.rand(num_samples, *shape, generator=generator, dtype=torch.float64)) / num_samples
    noise: Tensor = torch.special.ndtri(u.clamp(2.0**-53, 1 - 2.0**-53))
    return noise.float()


def discretize(u: Tensor, num_steps: int) -> Tensor:
    """The step index in 1..T of a time in [0, 1]: floor(u T) + 1, whose time is t = index / T and s = (index - 1) / T.

    u = 1, which `fold` can reach, belongs to the last step. (ceil(u T) would hit t = 0 at u = 0.)
    """
    return ((u * num_steps).floor().long() + 1).clamp(1, num_steps)
