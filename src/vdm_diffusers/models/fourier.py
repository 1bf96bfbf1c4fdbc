"""Fourier features of the input: what lets a smooth network read the fine-scale bits of an image."""

import math
from collections.abc import Sequence

import torch
from torch import nn


class FourierFeatures(nn.Module):
    r"""Append sines and cosines of the input, at frequencies that double: `(z, sin(2^n pi z), cos(2^n pi z))`.

    The last bits of an integer image decide its likelihood, and a convolution of the plain values hardly sees them. In
    an encoding of `L` levels onto [-1, 1] neighbours are `2/L` apart, so `2^n = L/2` swings by half a turn from level to
    level, and `2^n = L` by a whole one (it shows the position within a level): 7 and 8 for 256 levels.

    The features are computed in float32 (float64 for a float64 input), outside autocast: rounding `z` to bfloat16 turns
    the phase at `n = 8` by 0.68 radians RMS. An input that arrives in half precision has already lost them: pass
    float32. No tensor is stored, so casting the module to half precision cannot harm the frequencies.

    Args:
        exponents: the `n`, whole or fractional, in any order; none of them leaves the input as it is.

    Shape:
        `(B, C, ...)` to `(B, C (1 + 2 len(exponents)), ...)`: the input, then all sines, then all cosines.

    Raises:
        ValueError: if an exponent is not a finite number.

    Source: Kingma et al. 2021, "Variational Diffusion Models", appendix C (`n = 7, 8`).
    """

    def __init__(self, exponents: Sequence[float]):
        super().__init__()
        if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in exponents):
            raise ValueError(
                f"`exponents` must be finite numbers n of the frequencies 2^n pi, got {exponents!r}. For 256 levels use "
                "(7, 8)."
            )
        self.exponents = tuple(exponents)

    def num_features(self, num_channels: int) -> int:
        """Channels that come out when `num_channels` go in."""
        return num_channels * (1 + 2 * len(self.exponents))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=sample.device.type, enabled=False):
            z = sample.to(torch.promote_types(sample.dtype, torch.float32))
            # For a whole n both 2^n z and its remainder are exact, so the only rounding is that of pi times a number
            # in [0, 2): as good at n = 8 as at n = 0, and no slow path for large arguments on a GPU.
            phases = [math.pi * torch.remainder(2.0**n * z, 2.0) for n in self.exponents]
            return torch.cat([z, *(p.sin() for p in phases), *(p.cos() for p in phases)], dim=1)

    def extra_repr(self) -> str:
        return f"exponents={self.exponents}"
