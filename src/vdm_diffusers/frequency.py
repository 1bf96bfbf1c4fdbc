"""The cosine transform of images, and its coefficients gathered in radial bands: coordinates in which natural images
vary independently.

An image's power falls with frequency, whatever its direction. So what holds for one coefficient of the (orthonormal)
cosine transform holds about as well for the others of its distance from zero frequency, and a function of frequency
needs few numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_BANDS = 32


def cosine_transform(n: int) -> Tensor:
    """The orthonormal DCT-II matrix, (n, n) float64: row k holds cos(pi k (j + 1/2) / n)."""
    k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * k * (j + 0.5) / n) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


@dataclass(frozen=True, eq=False)
class RadialBands:
    """At most 32 bands of the frequencies of images of one size, and the transform to these frequencies.

    Frequency (i, j) of an H x W image has the radius sqrt((i / H)^2 + (j / W)^2). Zero is a band of its own; the
    others are intervals with the smallest ratio of their ends with which so few suffice. A small image has a band for
    every radius.

    Attributes:
        index: (H, W) the band of every frequency, int64.
        counts: (bands,) how many frequencies each holds, float64.
        rows, columns: (H, H) and (W, W), the cosine transform of either axis.
    """

    index: Tensor
    counts: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, height: int, width: int) -> RadialBands:
        """The bands of images of `height` x `width`."""
        i, j = torch.arange(height)[:, None] * width, torch.arange(width) * height
        radii, place = (i**2 + j**2).unique(return_inverse=True)  # in whole numbers: the same on every machine
        low, high = 1.0, float(max(height, width)) ** 4  # ratios of squared radii: one band each, and one for all
        first = _first_radii(radii, low)
        if len(first) > MAX_BANDS:
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if len(_first_radii(radii, middle)) > MAX_BANDS else (low, middle)
            first = _first_radii(radii, high)
        index = torch.searchsorted(first, torch.arange(len(radii)), right=True)[place] - 1
        counts = index.flatten().bincount(minlength=len(first)).double()
        return cls(index, counts, cosine_transform(height), cosine_transform(width))

    def to(self, device: torch.device, dtype: torch.dtype) -> RadialBands:
        """With the index and the transform where they are needed."""
        rows, columns = (matrix.to(device, dtype) for matrix in (self.rows, self.columns))
        return replace(self, index=self.index.to(device), rows=rows, columns=columns)

    def transform(self, x: Tensor) -> Tensor:
        """The coefficients (..., H, W) of images (..., H, W), in x's dtype."""
        return self.rows.to(x) @ x @ self.columns.to(x).T

    def inverse(self, coefficients: Tensor) -> Tensor:
        """The images of these coefficients."""
        return self.rows.to(coefficients).T @ coefficients @ self.columns.to(coefficients)

    def sums(self, values: Tensor) -> Tensor:
        """Values of frequencies (..., H, W), summed in each band: (..., bands)."""
        result = values.new_zeros(*values.shape[:-2], len(self.counts))
        return result.index_add_(-1, self.index.flatten().to(values.device), values.flatten(-2))

    def spread(self, values: Tensor) -> Tensor:
        """Values of bands (..., bands) as those of the frequencies, (..., H, W)."""
        return values[..., self.index.to(values.device)]


def _first_radii(radii: Tensor, ratio: float) -> Tensor:
    """Where the bands begin, in increasing radii whose first is 0, if each holds what is at most `ratio` times its
    first.

    Stops as soon as there are more than 32.
    """
    first = [0]
    following = 1
    while following < len(radii) and len(first) <= MAX_BANDS:
        first.append(following)
        following = int(torch.searchsorted(radii.double(), ratio * float(radii[following]), right=True))
    return torch.tensor(first)
