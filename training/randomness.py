"""Randomness as a function of where a number is used, not of what was drawn before.

Every random number of a training run is drawn from a generator seeded with the run's seed and the place of its use:
(seed, "noise", step, rows), (seed, "order", epoch). A resumed run is therefore the same run without any generator's
state being saved, evaluations and samples in between disturb nothing, and a global batch has the same images, times
and noise however it is divided into processes and micro-batches.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_BLOCK = 8  # rows of noise that share a seed


def seed_for(*place: int | str) -> int:
    """A 63-bit seed from a place such as (seed, "noise", step): equal places, equal seeds; others independent."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*place: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device`, seeded with `seed_for(*place)`."""
    return torch.Generator(device).manual_seed(seed_for(*place))


def row_noise(
    shape: tuple[int, ...], seed: int, step: int, first_row: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Standard normal noise for rows first_row.. of the global batch of an optimiser step: float32 of `shape`, on
    `device`.

    Rows are drawn in blocks with seeds of their own, so that a row's noise depends on its place in the global batch
    alone (for batches of any process that are multiples of 8, or else for equal batches).
    """
    block = math.gcd(_BLOCK, shape[0])
    noise = torch.empty(shape, device=device)
    for start in range(0, shape[0], block):
        generator.manual_seed(seed_for(seed, "noise", step, (first_row + start) // block))
        noise[start : start + block].normal_(generator=generator)
    return noise


def seed_dropout(device: torch.device, *place: int | str) -> None:
    """Seed the default generators, from which dropout draws, for a place in the run."""
    seed = seed_for(*place)
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would look at every device: half a millisecond
    else:
        torch.manual_seed(seed)


class DataOrder:
    """The order in which images are visited: one seeded permutation after another, as one endless stream."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed = num_images, seed
        self._epochs: dict[int, Tensor] = {}

    def indices(self, start: int, count: int) -> Tensor:
        """Images at places start..start+count-1 of the stream: (count,) int64."""
        place = torch.arange(start, start + count)
        epoch = place // self.num_images
        first, last = int(epoch[0]), int(epoch[-1])
        self._epochs = {
            e: self._epochs[e] if e in self._epochs else self._permutation(e) for e in range(first, last + 1)
        }
        if first == last:
            return self._epochs[first][place - first * self.num_images]
        return torch.cat([self._epochs[e][place[epoch == e] - e * self.num_images] for e in range(first, last + 1)])

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.num_images, generator=generator_for(self.seed, "order", epoch))
