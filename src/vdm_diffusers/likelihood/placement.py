"""Where the evaluations of each image are placed, and their noise: lattices, replicates and Latin hypercubes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..repetitions import mix_seed
from ..time_sampling import fold, latin_hypercube
from .reconstruction import Decoder, GaussianDecoder
from .terms import DiffusionTerm, Profile

_GROUPS = 32  # groups of images with shifts of their own: the degrees of freedom of the error bar
_NOISE_BLOCK = 16  # evaluations of one image whose noise comes from one seed
_STRATA = 4  # evaluations of one image, neighbours in log SNR, whose noises are stratified together


@dataclass(frozen=True, eq=False)
class Layout:
    """What each of an image's evaluations is for: (n,) its replicate, and whether it belongs to the decoder."""

    replicate: Tensor
    is_decoder: Tensor

    @property
    def num_replicates(self) -> int:
        return int(self.replicate[-1]) + 1

    @property
    def strata(self) -> Tensor:
        """(n,) the block that a column belongs to: up to `_STRATA` neighbours for the same use in the same replicate;
        ascending.
        """
        use = 2 * self.replicate + ~self.is_decoder
        columns = torch.arange(len(use))
        return use * len(use) + (columns - torch.searchsorted(use, use)) // _STRATA

    @classmethod
    def of(cls, num_images: int, num_samples: int, decoder: Decoder, share: float) -> Layout:
        least = fewest_samples(decoder)
        if num_samples < 2 * least:
            raise ValueError(
                f"`num_samples` must be at least {2 * least}, got {num_samples}: the error bar comes from two "
                "independent "
                f"estimates{', each with the network at x_1 and at another step' if least > 1 else ''}."
            )
        own = least - 1  # evaluations that the decoder needs in each replicate
        groups = math.ceil(num_images / group_size(num_images))
        replicates = max(2, min(8, math.ceil(16 / groups) + 1, num_samples // (2 * least)))
        sizes = [num_samples // replicates + (r < num_samples % replicates) for r in range(replicates)]
        decoders = [own * max(1, min(size - 1, round(share * size))) for size in sizes]
        replicate = torch.repeat_interleave(torch.arange(replicates), torch.tensor(sizes))
        is_decoder = torch.cat([torch.arange(size) < first for size, first in zip(sizes, decoders, strict=True)])
        return cls(replicate, is_decoder)

    def place(
        self, num_images: int, term: DiffusionTerm, profile: Profile | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Sites (m, n) of a group of images and the inverse of their density; 1 and 1 for the decoder's
        evaluations.
        """
        sites = torch.ones(num_images, len(self.replicate), dtype=torch.float64)
        inverse_density = torch.ones_like(sites)
        for r in range(self.num_replicates):
            columns = ((self.replicate == r) & ~self.is_decoder).nonzero()[:, 0]
            n = len(columns)
            # one lattice over all images of the group, dealt to them at random
            order = torch.randperm(num_images, generator=generator)
            shift = torch.rand((), generator=generator, dtype=torch.float64)
            lattice = (order[:, None] + num_images * torch.arange(n)).double()
            u = fold((lattice / (num_images * n) + shift) % 1.0)
            sites[:, columns], inverse_density[:, columns] = term.place(u, profile)
        return sites, inverse_density


def fewest_samples(decoder: Decoder) -> int:
    """Evaluations that one replicate needs."""
    return 2 if isinstance(decoder, GaussianDecoder) else 1


def round_sizes(count: int, num_samples: int, decoder: Decoder, adaptive: bool) -> list[int]:
    """Evaluations of an image in the pilot and in the main round, or in the only one if there is nothing to learn."""
    least = 2 * fewest_samples(decoder)
    pilot = max(least, num_samples // 8, min(num_samples // 4, math.ceil(512 / count)))
    if not adaptive or pilot * count < 192 or num_samples - pilot < least:
        return [num_samples]
    return [pilot, num_samples - pilot]


def group_size(num_images: int) -> int:
    """Images that share their lattices: few enough for about `_GROUPS` independent groups, and no more than useful."""
    return min(_GROUPS, math.ceil(num_images / _GROUPS))


def noise_of(
    index: Tensor, column: Tensor, shape: torch.Size, seed: int, number: int, strata: Tensor | None = None
) -> Tensor:
    """Standard normal noise of a round's evaluations (image, column), whatever batch they are in: (M, *shape) float32.

    Arguments:
        strata: (n,) ascending, of all columns: those with the same number share a Latin hypercube. None: independent
            noise.
    """
    if strata is None:
        block, place = column // _NOISE_BLOCK, column % _NOISE_BLOCK
    else:
        block, place = strata[column], column - torch.searchsorted(strata, strata[column])
    noise = torch.empty(len(index), *shape)
    keys, inverse = torch.stack([index, block]).unique(dim=1, return_inverse=True)
    for i, (image, part) in enumerate(keys.T.tolist()):
        generator = torch.Generator().manual_seed(mix_seed(seed, "noise", number, image, part))
        if strata is None:
            drawn = torch.randn(_NOISE_BLOCK, *shape, generator=generator)
        else:
            drawn = latin_hypercube(int((strata == part).sum()), shape, generator)
        mine = inverse == i
        noise[mine] = drawn[place[mine]]
    return noise


def draw_noise(generators: Sequence[torch.Generator], shape: torch.Size) -> Tensor:
    """Standard normal noise (M, *shape) float32, each row from a generator of its own."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])
