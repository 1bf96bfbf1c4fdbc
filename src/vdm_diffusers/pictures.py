"""Pictures of many images."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
from torch import Tensor


def image_grid(
    levels: Tensor, num_levels: int, *, columns: int | None = None, smallest_side: int = 256
) -> PIL.Image.Image:
    """Integer images (N, C, H, W) side by side, with a gap between them; small ones are enlarged without smoothing.

    One channel is drawn in grey, three or more by the first three in colour, two by the first alone.
    """
    number, channels, height, width = levels.shape
    columns = columns or math.ceil(math.sqrt(number))
    rows, gap, shown = math.ceil(number / columns), 1, 3 if channels >= 3 else 1
    pixels = (levels[:, :shown].double() * 255 / (num_levels - 1)).round().to("cpu").numpy().astype(np.uint8)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, shown), 127, dtype=np.uint8)
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + gap) + gap, (index % columns) * (width + gap) + gap
        canvas[top : top + height, left : left + width] = np.moveaxis(image, 0, -1)
    grid = PIL.Image.fromarray(canvas[..., 0] if shown == 1 else canvas)
    factor = max(1, math.ceil(smallest_side / max(grid.size)))
    return grid.resize((grid.width * factor, grid.height * factor), PIL.Image.Resampling.NEAREST)
