"""The tables of an analytic start, measured on training images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from vdm_diffusers.control_variates import WienerDenoiser
from vdm_diffusers.decoders import PixelEncoding, level_values
from vdm_diffusers.gaussian import Path
from vdm_diffusers.models.analytic_start import AnalyticStart, AnalyticStartModel
from vdm_diffusers.prediction import PredictionType

_MAX_LOG_FREQUENCY = 12.0  # of a level, against the Gaussian's density there


def fit_analytic_start(
    network: ModelMixin,
    images: Tensor,
    *,
    knots: Sequence[float],
    log_snr: Sequence[float],
    num_levels: int | None = 256,
    pixel_encoding: PixelEncoding = "bin_center",
    prediction_type: PredictionType = "epsilon",
    path: Path = "vp",
) -> AnalyticStartModel:
    """A model around `network`, with the tables of `images`.

    Args:
        network: a `VDMUNet2DModel`, `UNet2DModel` or `FourierFeaturesUNet` of `3 C` input and `2 C` output channels;
            of `3 C` output channels, and it also moves the log-odds of the most frequent level (see
            [`AnalyticStartModel`]).
        images: `(N, C, H, W)` training images: integers `0..num_levels-1`, or with `num_levels=None` numbers.
        knots, log_snr: timesteps and the log SNR at each, increasing and decreasing; linear between.
        num_levels, pixel_encoding, prediction_type, path: see [`AnalyticStartModel`].
    Raises:
        ValueError: channels that do not fit, no images, or levels outside `0..num_levels-1`.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"`images` must have shape (N, C, H, W) with at least one image, got {tuple(images.shape)}.")
    if num_levels is not None and (
        images.is_floating_point() or int(images.min()) < 0 or int(images.max()) >= num_levels
    ):
        raise ValueError(f"`images` must hold integers 0..{num_levels - 1}; for numbers pass num_levels=None.")
    channels, height, width = images.shape[1:]
    spike_level = None
    if num_levels is not None and network.config.out_channels == 3 * channels:
        spike_level = int(images.flatten().long().bincount(minlength=num_levels).argmax())
    model = AnalyticStartModel(
        network_class=type(network).__name__,
        network_config=dict(network.config),
        in_channels=channels,
        sample_size=height if height == width else (height, width),
        num_levels=num_levels,
        pixel_encoding=pixel_encoding,
        prediction_type=prediction_type,
        knots=[float(t) for t in knots],
        log_snr=[float(v) for v in log_snr],
        path=path,
        spike_level=spike_level,
    )
    model.network = network
    if num_levels is None:
        _measure(model.start, images, None, None)
    else:
        values = level_values(num_levels, pixel_encoding)
        _measure(model.start, values[images.long()], images, values)
    return model


@torch.no_grad()
def _measure(start: AnalyticStart, images: Tensor, levels: Tensor | None, values: Tensor | None) -> None:
    """Take the tables from images in the space of the diffusion; `levels` and `values` say which levels their pixels
    have.
    """
    x = images.double()
    if start.basis is not None:
        start.mean.copy_(x.mean(0))
        flat = (x - x.mean(0)).flatten(1)
        # a little white noise, less of it the more images there are, keeps pixels that never vary invertible
        ridge = 8 * flat.square().mean() / (len(x) + 8) * 1e-3
        eigenvalues, vectors = torch.linalg.eigh(flat.T @ flat / len(x) + ridge * torch.eye(flat.shape[1]).to(x))
        start.variance.copy_(eigenvalues.clamp(min=1e-7))
        start.basis.copy_(vectors.T)
    else:
        wiener = WienerDenoiser.fit(x)
        start.mean.copy_(wiener.mean)
        start.variance.copy_(wiener.variance.reshape(start.shape).clamp(min=1e-7))
        start.channels.copy_(wiener.axes[0])
    if levels is not None and values is not None:
        counts = torch.bincount(levels.flatten().long(), minlength=len(values)).double()
        frequency = ((counts + 0.5) / (counts.sum() + 0.5 * len(values))).log()
        # the Gaussian's own density of the levels, over all pixels
        center, spread = start.mean.double().flatten(), start.spread(start.variance.double()).flatten()
        density = torch.stack([(torch.exp(-0.5 * (v - center) ** 2 / spread) / spread.sqrt()).mean() for v in values])
        ratio = frequency - (density / density.sum()).clamp(min=1e-30).log()
        start.log_frequencies.copy_(
            (ratio - (frequency.exp() * ratio).sum()).clamp(-_MAX_LOG_FREQUENCY, _MAX_LOG_FREQUENCY)
        )
