"""A network, what it predicts, and the data that it was trained on: what the estimators ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..decoders import PixelEncoding, encode_pixels
from ..numerics import as_float64, sum_except_batch
from ..prediction import PredictionType, convert, loss_weight_ratio, prediction_target
from ..reverse_variance import learned_range_variance

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(z_t (M, C, ...), log_snr (M,) float64 on the CPU, index (M,) of the images) -> the network's output (M, C or 2 C,
...).
"""


@dataclass(frozen=True, eq=False)
class DenoisingModel:
    """A network and what its output means.

    Attributes:
        predict: see `Predict`.
        prediction_type: what the (first half of the channels of the) output predicts.
        num_levels, pixel_encoding: how integer data are put into [-1, 1]; num_levels=None: the data are continuous, as
            they are.
        learned_variance: None, or the meaning of the output's second half of channels.
        clip_denoised: clamp x_hat to [-1, 1]. The bound holds for any x_hat: this is another model, not another
            estimate.
    """

    predict: Predict
    prediction_type: PredictionType
    num_levels: int | None = 256
    pixel_encoding: PixelEncoding = "bin_center"
    learned_variance: Literal["learned", "learned_range"] | None = None
    clip_denoised: bool = False

    def check(self, levels: Tensor) -> None:
        """Raise ValueError unless there are images, whose values fit."""
        if len(levels) == 0:
            raise ValueError("`images` holds no image.")
        if self.num_levels is None:
            return
        low, high = int(levels.min()), int(levels.max())
        if not 0 <= low <= high < self.num_levels:
            raise ValueError(
                f"`images` must hold levels in 0..{self.num_levels - 1}, got {low}..{high}. Is `num_levels` right?"
            )

    def encode(self, data: Tensor) -> Tensor:
        """Integers, or continuous data, as the diffusion sees them: float32."""
        return data.float() if self.num_levels is None else encode_pixels(data, self.num_levels, self.pixel_encoding)

    def outputs(self, z_t: Tensor, log_snr: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's prediction (M, C, ...) and its variance channels (M, C, ...) or None.

        Raises:
            ValueError: an output of another shape, or one that is not finite.
        """
        output = self.predict(z_t, log_snr, index)
        channels = z_t.shape[1]
        if output.shape[2:] != z_t.shape[2:] or output.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"the model's output must have the sample's shape {tuple(z_t.shape)} (or twice its channels, with a "
                "variance), "
                f"got {tuple(output.shape)}."
            )
        if self.learned_variance is not None and output.shape[1] != 2 * channels:
            raise ValueError(
                f"the scheduler says variance_type={self.learned_variance!r}, but the model's output has no channels "
                "for a "
                f"variance: {channels} in, {output.shape[1]} out. Pass variance_type='fixed_small' or 'fixed_large'."
            )
        if not bool(output.isfinite().all()):
            raise ValueError(
                "the model's output is not finite: a diverged training, or half precision that overflows. No "
                "likelihood "
                "can be computed."
            )
        value = output[:, :channels].to(torch.promote_types(output.dtype, torch.float32))
        return value, output[:, channels:] if self.learned_variance is not None else None

    def denoised(self, value: Tensor, z_t: Tensor, log_snr: Tensor) -> Tensor:
        """x_hat of a prediction made at z_t."""
        x_hat = convert(value, z_t, log_snr, source=self.prediction_type, target="sample")
        return x_hat.clamp(-1, 1) if self.clip_denoised else x_hat

    def error(self, value: Tensor, x: Tensor, noise: Tensor, z_t: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """The elementwise error of the prediction, (M, C, ...), and the factor (M,) that makes its square one of
        x_hat.

        The error is formed in the network's own terms, where it suffers no cancellation.
        """
        if self.clip_denoised:
            return self.denoised(value, z_t, log_snr) - x, torch.ones_like(log_snr)
        target = prediction_target(x, noise, log_snr, self.prediction_type)
        return value - target, loss_weight_ratio(log_snr, source=self.prediction_type, target="sample")


def learned_variance_of(output: Tensor, kind: str, low: Tensor, high: Tensor) -> Tensor:
    """The reverse variance that the network's variance channels mean: (M, C, ...), float64 where the device has it."""
    return as_float64(output).exp() if kind == "learned" else learned_range_variance(as_float64(output), low, high)


def sum64(square: Tensor) -> Tensor:
    """Sums over all dimensions but the first, float64 on the CPU."""
    return sum_except_batch(square.double() if square.device.type != "mps" else square).to("cpu", torch.float64)
