r"""A network that starts from the two denoisers that are known before any training, and learns what they leave.

Two facts about a data set are cheap to measure: the mean and covariance of its images, and how often each level of a
pixel occurs. Each gives a denoiser in closed form. This module joins them, and lets a network correct the join.

1. For Gaussian data N(mean, basis^T diag(lambda) basis), pixel i given the whole noisy image z = alpha x + sigma eps
   is N(m_i, v_i). Taking out what pixel i's own observation said leaves its cavity N(c_i, s_i), what the *other*
   pixels say about it:

       1 / s_i = 1 / v_i - snr,    c_i / s_i = m_i / v_i - snr z_i / alpha.

2. The network moves the cavity: c_i + sqrt(s_i) u_i and s_i exp(2 w_i), with (u, w) its output. A new network answers
   zero. Where one level fills most of a background, no Gaussian says "black, or else bright": there the network gives
   a third number, by which the log-odds of this level against all others move.
3. Bayes' rule puts the pixel's own observation back, and the knowledge that a pixel has one of L levels x_k of
   frequency f_k:

       x_hat_i = sum_k x_k p_k,   p_k proportional to f_k N(x_k; m'_i, v'_i),   1 / v' = 1 / s' + snr,   m' = v' (c' /
       s' + snr z_i / alpha).

So the network never has to learn where the levels are, nor how to weigh a pixel against its neighbours at each noise
level.

Source: Wiener's filter, and the cavity of expectation propagation (Minka 2001; Opper and Winther 2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel, UNet2DOutput
from torch import Tensor, nn

from vdm_diffusers.decoders import PixelEncoding, level_values
from vdm_diffusers.frequency import cosine_transform
from vdm_diffusers.gaussian import Path, alpha_sigma
from vdm_diffusers.models.fourier import FourierFeaturesUNet, check_sample
from vdm_diffusers.models.unet_vdm import VDMUNet2DModel
from vdm_diffusers.prediction import PredictionType, check_prediction_type, convert

INNER_NETWORKS = {c.__name__: c for c in (VDMUNet2DModel, UNet2DModel, FourierFeaturesUNet)}
FULL_COVARIANCE = (
    1024  # up to so many dimensions the whole covariance is measured, beyond the spectrum of the cosine transform
)
_MAX_LOG_SNR = 30.0  # float32 knows no noise below this
_MAX_LOG_SCALE = 8.0  # a network's w stays within this
_CHUNK = 1 << 20  # weights of levels held at a time


class _LevelMean(torch.autograd.Function):
    """E[x] and ln sum_k f_k exp(-(x_k - m)^2 / 2v) for p_k proportional to f_k N(x_k; m, v), elementwise, without the
    level `excluded`.

    The backward pass uses the moments of p, and needs no second pass over the levels.
    """

    @staticmethod
    def forward(
        context: Any, m: Tensor, v: Tensor, values: Tensor, log_frequencies: Tensor, excluded: int | None = None
    ) -> tuple[Tensor, Tensor]:
        flat_m, precision = m.flatten(), (0.5 / v).flatten()
        distance, last = (values[-1] - values[0]) / (len(values) - 1), len(values) - 1
        index = ((flat_m - values[0]) / distance).round().clamp(0, last)
        if excluded is not None:
            log_frequencies = log_frequencies.clone()
            log_frequencies[excluded] = -math.inf
            above = (flat_m >= values[excluded]) if 0 < excluded < last else torch.tensor(excluded == 0)
            index = torch.where(index == excluded, index + torch.where(above, 1, -1).to(index), index)
        nearest = values[0] + distance * index
        offset = nearest - flat_m  # of the nearest level: moments about it keep all their digits
        sums = [torch.zeros_like(flat_m) for _ in range(4)]
        size = max(1, _CHUNK // max(1, flat_m.numel()))
        for level, log_frequency in zip(values.split(size), log_frequencies.split(size), strict=True):
            d = level[:, None] - nearest
            weight = torch.exp(log_frequency[:, None] - precision * d * (d + 2 * offset))
            for total in sums:
                total += weight.sum(0)
                weight = weight * d
        first, second, third = (total / sums[0] for total in sums[1:])
        variance = second - first**2
        skew = third - first * second + 2 * offset * variance  # Cov(x, (x - m)^2)
        square = second + 2 * offset * first + offset**2  # E(x - m)^2
        slopes = (
            2 * precision * variance,
            2 * precision**2 * skew,
            2 * precision * (first + offset),
            2 * precision**2 * square,
        )
        context.save_for_backward(*(slope.reshape(m.shape) for slope in slopes))
        log_sum = sums[0].log() - precision * offset**2
        return (nearest + first).reshape(m.shape), log_sum.reshape(m.shape)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mean_m, mean_v, sum_m, sum_v = context.saved_tensors
        of_mean, of_sum = gradients
        return of_mean * mean_m + of_sum * sum_m, of_mean * mean_v + of_sum * sum_v, None, None, None


class NoiseLevel(NamedTuple):
    """The noise in a batch, all `(B, 1, 1, 1)`: z = alpha x + sigma eps, snr = alpha^2 / sigma^2, slope = alpha /
    sigma^2.
    """

    alpha: Tensor
    sigma: Tensor
    snr: Tensor
    slope: Tensor

    @classmethod
    def of(cls, log_snr: Tensor, path: Path) -> NoiseLevel:
        """At log SNRs `(B,)`, in their dtype."""
        alpha, sigma = (c.to(log_snr) for c in alpha_sigma(log_snr.double(), path))
        return cls(*(c.reshape(-1, 1, 1, 1) for c in (alpha, sigma, log_snr.exp(), alpha / sigma**2)))


class AnalyticStart(nn.Module):
    """The tables of a data set, and what they say about each pixel of a noisy image.

    All tables are buffers, saved with the weights, and stay in float32 whatever dtype the weights are put in.

    Args:
        shape: `(C, H, W)` of an image.
        num_levels: levels of a pixel; `None`: continuous data, of which no level is known.
    """

    mean: Tensor
    variance: Tensor
    basis: Tensor | None
    channels: Tensor
    rows: Tensor
    columns: Tensor
    log_frequencies: Tensor
    values: Tensor
    knots: Tensor
    log_snr: Tensor

    def __init__(self, shape: Sequence[int], num_levels: int | None):
        super().__init__()
        channels, height, width = shape
        dimension = math.prod(shape)
        whole = dimension <= FULL_COVARIANCE
        self.shape = tuple(shape)
        self.register_buffer("mean", torch.zeros(*shape))
        self.register_buffer("variance", torch.ones(dimension if whole else shape))
        self.register_buffer("basis", torch.eye(dimension) if whole else None)  # rows: principal directions
        self.register_buffer("channels", None if whole else torch.eye(channels))
        for name, n in (("rows", height), ("columns", width)):
            self.register_buffer(name, None if whole else cosine_transform(n).float(), persistent=False)
        self.register_buffer("log_frequencies", None if num_levels is None else torch.zeros(num_levels))

    def cavity(self, z: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """What the other pixels say of each pixel, as a Gaussian.

        Args:
            z: `(B, C, H, W)`, float32 or better.
            level: of z.
        Returns:
            mean and variance, both of z's shape.
        """
        prior = self.variance.to(z)
        posterior = prior / (1 + level.snr.reshape(-1, *[1] * prior.ndim) * prior)
        coordinates = self._transform(z - level.alpha * self.mean.to(z))
        deviation = self._inverse(posterior * coordinates)
        mean, variance = self.mean.to(z) + level.slope * deviation, self.spread(posterior)
        precision = (1 / variance - level.snr).clamp(min=1e-6 * level.snr + 1e-4)
        return (mean / variance - level.slope * z) / precision, 1 / precision

    def _transform(self, x: Tensor) -> Tensor:
        if self.basis is not None:
            return x.flatten(1) @ self.basis.to(x).T
        return self.rows.to(x) @ torch.einsum("dc,bchw->bdhw", self.channels.to(x), x) @ self.columns.to(x).T

    def _inverse(self, y: Tensor) -> Tensor:
        if self.basis is not None:
            return (y @ self.basis.to(y)).unflatten(1, self.shape)
        return torch.einsum("dc,bdhw->bchw", self.channels.to(y), self.rows.to(y).T @ y @ self.columns.to(y))

    def spread(self, variance: Tensor) -> Tensor:
        """The variance of each pixel, from the variances of the coordinates, of which it is a sum with squared
        weights.
        """
        if self.basis is not None:
            return (variance @ self.basis.to(variance) ** 2).unflatten(-1, self.shape)
        rows, columns, channels = (m.to(variance) ** 2 for m in (self.rows, self.columns, self.channels))
        return torch.einsum("dc,...dhw->...chw", channels, rows.T @ variance @ columns)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnalyticStart:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            # the tables are data, not weights: they are moved, never rounded
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class AnalyticStartModel(ModelMixin, ConfigMixin):
    r"""A denoiser that begins as the best one known in closed form; a network of ours or Diffusers' learns the rest.

    The inner network sees `3 C` channels: the noisy image at unit variance, the analytic estimate, and how far the
    noisy image is from what the other pixels say, in standard deviations. It returns `2 C` channels `(u, w)`, or with
    `spike_level` `3 C`, see the module's equations. While it answers zero, the model is the analytic denoiser exactly.

    Make one with [`fit_analytic_start`], which measures the tables.

    Args:
        network_class: 'VDMUNet2DModel', 'UNet2DModel' or 'FourierFeaturesUNet'.
        network_config: its configuration, with `in_channels = 3 C` and `out_channels = 2 C`, or `3 C` with
            `spike_level`.
        in_channels: `C`, channels of an image.
        sample_size: height and width, or one number for both. The tables belong to this size: no other is taken.
        num_levels: levels of a pixel; `None`: continuous data.
        pixel_encoding: where the levels lie, 'bin_center' or 'endpoint'.
        prediction_type: what the model answers with, as the scheduler's key of this name.
        knots, log_snr: timesteps and the log SNR at each, increasing and decreasing; linear between.
        path: 'vp', 'flow' or 've'.
        spike_level: the level whose log-odds the network moves by themselves, as MNIST's black; None: none.

    Raises:
        ValueError: sizes that do not fit, an unknown class or prediction type.
    """

    __module__ = "vdm_diffusers"
    takes_float32_sample = True  # the levels stand in the last bits
    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ("start",)
    _skip_layerwise_casting_patterns = ("norm", "start")

    @register_to_config
    def __init__(
        self,
        network_class: str,
        network_config: Mapping[str, Any],
        in_channels: int = 3,
        sample_size: int | tuple[int, int] = 32,
        num_levels: int | None = 256,
        pixel_encoding: PixelEncoding = "bin_center",
        prediction_type: PredictionType = "epsilon",
        knots: Sequence[float] = (-1.0, 999.0),
        log_snr: Sequence[float] = (13.3, -5.0),
        path: Path = "vp",
        spike_level: int | None = None,
    ):
        super().__init__()
        if spike_level is not None and not (
            num_levels is not None and 0 <= spike_level < num_levels and num_levels > 2
        ):
            raise ValueError(f"`spike_level` must be one of three or more levels, got {spike_level} of {num_levels}.")
        if network_class not in INNER_NETWORKS:
            raise ValueError(f"`network_class` must be one of {', '.join(INNER_NETWORKS)}, got {network_class!r}.")
        check_prediction_type(prediction_type)
        if len(knots) != len(log_snr) or len(knots) < 2:
            raise ValueError(
                f"`knots` and `log_snr` must be equally many, two at least, got {len(knots)} and {len(log_snr)}."
            )
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.network = INNER_NETWORKS[network_class].from_config(dict(network_config))
        for name, wanted in (
            ("in_channels", 3 * in_channels),
            ("out_channels", (2 if spike_level is None else 3) * in_channels),
        ):
            if self.network.config[name] != wanted:
                raise ValueError(
                    f"`network_config` must have `{name}` {wanted} for images of {in_channels} channels, got "
                    f"{self.network.config[name]}."
                )
        self.start = AnalyticStart((in_channels, height, width), num_levels)
        values = None if num_levels is None else level_values(num_levels, pixel_encoding, torch.float32)
        self.start.register_buffer("values", values, persistent=False)
        for name, entries in (("knots", knots), ("log_snr", log_snr)):
            self.start.register_buffer(name, torch.tensor(list(entries), dtype=torch.float64), persistent=False)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The prediction at the noisy `sample`, `(B, C, H, W)`, in its dtype.

        Args:
            sample: `(B, C, H, W)` of the size that the tables have. float32 is wanted: half precision has lost the
                levels.
            timestep: a number, `()` or `(B,)`, within `knots` of the configuration (values outside are clamped).
            class_labels: as the inner network takes them.
            return_dict: return a `UNet2DOutput` with `.sample`, else a tuple of one.
        """
        check_sample(sample, self.config.in_channels)
        if sample.shape[1:] != self.start.shape:
            raise ValueError(
                f"`sample` must have shape (B, {', '.join(map(str, self.start.shape))}), got {tuple(sample.shape)}."
            )
        z = sample.to(torch.promote_types(sample.dtype, torch.float32))
        with torch.autocast(z.device.type, enabled=False):
            log_snr = self.log_snr_at(timestep).to(z).expand(len(z))
            level = NoiseLevel.of(log_snr, self.config.path)
            alpha, sigma = level.alpha, level.sigma
            mean, variance = self.start.cavity(z, level)
            estimate = self._with_own_pixel(z, level, mean, variance)
            surprise = (z - alpha * mean) / (alpha**2 * variance + sigma**2).sqrt()
            inputs = torch.cat([z / (alpha**2 + sigma**2).sqrt(), estimate, surprise], dim=1)
        answer = self.network(inputs.to(self.network.dtype), timestep, class_labels=class_labels, return_dict=False)[0]
        with torch.autocast(z.device.type, enabled=False):
            shift, log_scale, *spike = answer.to(z.dtype).split(z.shape[1], dim=1)
            mean = mean + variance.sqrt() * shift
            variance = variance * torch.exp(2 * _MAX_LOG_SCALE * torch.tanh(log_scale / _MAX_LOG_SCALE))
            x_hat = self._with_own_pixel(z, level, mean, variance, *spike)
            output = convert(
                x_hat, z, log_snr, source="sample", target=self.config.prediction_type, path=self.config.path
            ).to(sample.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def log_snr_at(self, timestep: Tensor | float) -> Tensor:
        """The log SNR at timesteps of any shape, float64, within +-30."""
        knots, values = self.start.knots, self.start.log_snr
        time = torch.as_tensor(timestep).to(knots.device, torch.float64)
        right = torch.searchsorted(knots, time).clamp(1, len(knots) - 1)
        fraction = ((time - knots[right - 1]) / (knots[right] - knots[right - 1])).clamp(0, 1)
        return torch.lerp(values[right - 1], values[right], fraction).clamp(-_MAX_LOG_SNR, _MAX_LOG_SNR)

    def _with_own_pixel(
        self, z: Tensor, level: NoiseLevel, mean: Tensor, variance: Tensor, spike: Tensor | float = 0.0
    ) -> Tensor:
        """E[x_i] from the cavity of each pixel and its own observation: step 3 of the module's equations."""
        precision = 1 / variance + level.snr
        m, v = (mean / variance + level.slope * z) / precision, 1 / precision
        if self.config.num_levels is None:
            return m
        values, log_frequencies = self.start.values.to(z), self.start.log_frequencies.to(z)
        one = self.config.spike_level
        others, log_sum = _LevelMean.apply(m, v, values, log_frequencies, one)
        if one is None:
            return others
        log_odds = log_frequencies[one] - (values[one] - m) ** 2 / (2 * v) - log_sum + spike
        return others + torch.sigmoid(log_odds) * (values[one] - others)
