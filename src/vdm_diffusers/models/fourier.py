"""Fourier features of the input: what lets a smooth network read the fine-scale bits of an image."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel, UNet2DOutput
from torch import nn


class FourierFeatures(nn.Module):
    r"""Append sines and cosines of the input, at frequencies that double: `(z, sin(2^n pi z), cos(2^n pi z))`.

    The last bits of an integer image decide its likelihood, and a convolution of the plain values hardly sees them. In
    an encoding of `L` levels onto [-1, 1] neighbours are `2/L` apart, so `2^n = L/2` swings by half a turn from level
    to level, and `2^n = L` by a whole one (it shows the position within a level): 7 and 8 for 256 levels.

    The features are computed in float32 (float64 for a float64 input), outside autocast: rounding `z` to bfloat16
    turns the phase at `n = 8` by 0.68 radians RMS. An input that arrives in half precision has already lost them: pass
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
                f"`exponents` must be finite numbers n of the frequencies 2^n pi, got {exponents!r}. For 256 levels "
                "use "
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


class FourierFeaturesUNet(ModelMixin, ConfigMixin):
    r"""Any of Diffusers' `UNet2DModel`s with Fourier features of its input: `unet((z, sin, cos), tau) (+ z)`.

    The inner network is made here from `unet_config`, with as many input channels as there are features, and is saved
    and loaded with the wrapper as one model. Everything that one asks of a `UNet2DModel` from outside
    (`config.in_channels`, `config.sample_size`, `forward`) is the same. The features are computed in float32 at least,
    outside autocast, and the output has the dtype of `sample`; see [`VDMUNet2DModel`] on half precision.

    Args:
        unet_config: the keyword arguments of the inner `UNet2DModel`, without the three that stand here.
        sample_size: as in `UNet2DModel`.
        in_channels: channels of `sample`, before the features are appended.
        out_channels: channels of the output; `None`: `in_channels`.
        fourier_exponents: as in [`VDMUNet2DModel`].
        residual_connection: as in [`VDMUNet2DModel`].

    Raises:
        ValueError: if `unet_config` sets one of the three, or `out_channels` is too small for the residual connection.

    Source: Kingma et al. 2021, "Variational Diffusion Models", appendix C.
    """

    # As in `VDMUNet2DModel`: the module that checkpoints name must hold the class and `ModelMixin`.
    __module__ = "vdm_diffusers"

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        unet_config: Mapping[str, Any],
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int | None = None,
        fourier_exponents: Sequence[float] = (7, 8),
        residual_connection: bool = True,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        misplaced = sorted({"sample_size", "in_channels", "out_channels"} & set(unet_config))
        if misplaced:
            raise ValueError(
                f"`unet_config` must not set {misplaced}: the wrapper does. Pass them to `FourierFeaturesUNet` itself."
            )
        check_residual_channels(in_channels, out_channels, residual_connection)
        self.fourier_features = FourierFeatures(fourier_exponents)
        self.unet = UNet2DModel(
            sample_size=sample_size,
            in_channels=self.fourier_features.num_features(in_channels),
            out_channels=out_channels,
            **unet_config,
        )

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """`UNet2DModel.forward` of the features: same arguments, same output.

        Raises:
            ValueError: if `sample` has another number of channels than `in_channels`.
        """
        check_sample(sample, self.config.in_channels)
        features = self.fourier_features(sample).to(self.dtype)
        output = self.unet(features, timestep, class_labels=class_labels, return_dict=False)[0]
        output = add_residual(output, sample, self.config.residual_connection)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def check_residual_channels(in_channels: int, out_channels: int, residual_connection: bool) -> None:
    """Refuse an output with too few channels for `+ z`."""
    if residual_connection and out_channels < in_channels:
        raise ValueError(
            f"`out_channels` must be at least `in_channels` with `residual_connection=True`, got {out_channels} < "
            f"{in_channels}. Leave `out_channels` unset, or switch the connection off."
        )


def check_sample(sample: torch.Tensor, in_channels: int) -> None:
    """Refuse a `sample` that is not `(B, in_channels, H, W)`."""
    if sample.ndim != 4 or sample.shape[1] != in_channels:
        raise ValueError(
            f"`sample` must have shape (B, {in_channels}, H, W), the {in_channels} from `in_channels` of the model, "
            "got "
            f"{tuple(sample.shape)}."
        )


def add_residual(output: torch.Tensor, sample: torch.Tensor, residual_connection: bool) -> torch.Tensor:
    """`net(z) + z` in float32 at least, then in the dtype of `sample`; further output channels stay as they are."""
    output = output.to(torch.promote_types(sample.dtype, torch.float32))
    if residual_connection:
        output = output + nn.functional.pad(sample, (0, 0, 0, 0, 0, output.shape[1] - sample.shape[1]))
    return output.to(sample.dtype)
