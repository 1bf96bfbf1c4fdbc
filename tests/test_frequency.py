"""The cosine transform and its radial bands."""

import itertools
import math

import pytest
import torch

from vdm_diffusers.frequency import MAX_BANDS, RadialBands, cosine_transform


def test_the_transform_is_orthonormal_and_its_rows_are_cosines():
    matrix = cosine_transform(7)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-14)
    for k, j in [(0, 3), (2, 0), (6, 5)]:
        scale = math.sqrt((1 if k == 0 else 2) / 7)
        assert float(matrix[k, j]) == pytest.approx(scale * math.cos(math.pi * k * (2 * j + 1) / 14), abs=1e-15)
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bands = RadialBands.of(5, 7)
    both = torch.einsum("bchw,ih,jw->bcij", x, cosine_transform(5), matrix)
    torch.testing.assert_close(bands.transform(x), both, rtol=0, atol=1e-13)
    torch.testing.assert_close(bands.inverse(both), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (8, 8), (28, 28), (32, 32), (17, 96), (256, 192)], ids=str)
def test_bands_are_intervals_of_the_radius(size):
    bands = RadialBands.of(*size)
    number = len(bands.counts)
    radius = torch.sqrt((torch.arange(size[0])[:, None] / size[0]) ** 2 + (torch.arange(size[1]) / size[1]) ** 2)
    ends = [(float(r.min()), float(r.max())) for r in (radius[bands.index == b] for b in range(number))]
    assert 1 <= number <= MAX_BANDS and ends[0] == (0.0, 0.0)  # no empty band, and zero frequency alone
    assert bands.counts.tolist() == [int((bands.index == b).sum()) for b in range(number)]
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(ends))
    radii = radius.mul(1e9).round().unique()
    if len(radii) <= MAX_BANDS:
        assert number == len(radii)
    else:  # no wider than they must be: with any smaller ratio there would be more than 32
        assert number == MAX_BANDS
        ratio = max(high / low for low, high in ends[1:])
        needed, first = 1, 0.0
        for r in (radii[1:] / 1e9).tolist():
            if r >= first * ratio * (1 - 1e-6):
                needed, first = needed + 1, r
        assert needed > MAX_BANDS


def test_sums_and_spread():
    bands = RadialBands.of(4, 6)
    x = torch.rand(3, 2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = bands.sums(x)
    assert sums.shape == (3, 2, len(bands.counts))
    for b in range(len(bands.counts)):
        torch.testing.assert_close(sums[..., b], (x * (bands.index == b)).sum((2, 3)))
        assert bool((bands.spread(sums)[..., bands.index == b] == sums[..., b : b + 1]).all())
