"""Integer levels as images: what the pipelines return."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch

PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def levels_to_images(levels: torch.Tensor, num_levels: int, output_type: str) -> Any:
    """Integer levels `(B, C, H, W)` as `"pt"` or `"np"` arrays in [0, 1], or as a list of 8-bit PIL images."""
    highest = num_levels - 1
    if output_type == "pt":
        return levels.to(torch.float32) / highest
    pixels = levels.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return pixels.astype(np.float32) / np.float32(highest)
    pixels = ((2 * pixels * 255 + highest) // (2 * highest)).astype(np.uint8)  # rounded in whole numbers
    mode = PIL_MODES[pixels.shape[-1]]
    return [PIL.Image.fromarray(image[..., 0] if mode == "L" else image, mode=mode) for image in pixels]
