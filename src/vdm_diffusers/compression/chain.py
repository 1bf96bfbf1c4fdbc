r"""The bound as a machine: a diffusion chain with what it pushes and pops (bits-back coding).

The sender has images x. With the forward chain q and the model p, in the order of the bound's first form
(docs/theory.md):

    pop z_0 ~ q(z_0 | x), push x | z_0 under p;   for k = 1..K: pop z_k ~ q(z_k | z_{k-1}), push z_{k-1} | z_k under p;
    push z_K under p

The stack has grown by -ln p(x, z) + ln q(z | x), whose expectation is the bound of this chain. The receiver does the
inverse, and gets back the bits that the pops took. Each z_k is a multiple of a bin's width, a power of two some 8 to
16 bins to the smaller deviation of the two distributions that it is coded with; the widths cancel.

Everything that sender and receiver must agree on to the last bit is made of few numbers, in float64, rounded to
float32's precision.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..decoders import bin_width, encode_pixels, log_normal_mass
from ..elbo_forms import Normal
from ..gaussian import alpha_sigma, posterior_coefficients, transition_coefficients
from ..likelihood import Decoder, DenoisingModel, DiscreteTerm, GaussianDecoder, SoftmaxDecoder, learned_variance_of
from ..models.calling import in_own_dtype
from ..numerics import as_float64
from ..reverse_variance import forward_variance
from .stack import Bins, Stack, Values

BINS = 8  # of a deviation, at least; at most twice as many
WIDE, NARROW = (
    10.0,
    6.5,
)  # deviations that a window has to either side: where values are pushed first, and where they are popped first
MEAN_PARTS = 16  # of a bin: what the network's means are rounded to
DEVIATION_PARTS = 32  # of a factor of two: what the network's deviations are rounded to
CENTER_PARTS = 256  # of a level: what the decoder's means are rounded to
LATENT_WIDTH = 2.0**-8  # of a bin of an autoencoder's latents, whose prior has deviation 1
ESCAPE = 2.0**-20  # the probability of a level outside its window


class Coder(ABC):
    """A Markovian hierarchy as what it pushes and pops: latents z_0 to z_K, each a multiple of its bin's width.

    Attributes:
        widths: (K + 1,) of the bins, powers of two.
    """

    widths: Values

    @property
    def num_steps(self) -> int:
        """K, the transitions between latents."""
        return len(self.widths) - 1

    @abstractmethod
    def encoder(self, levels: NDArray[np.int64]) -> tuple[Values, Values | float]:
        """Means and deviations of q(z_0 | x), in bins."""

    @abstractmethod
    def forward(self, k: int, below: Bins, count: int) -> tuple[Values, Values | float]:
        """Of q(z_k | z_{k-1}), in bins of z_k, for `count` images."""

    @abstractmethod
    def reverse(self, k: int, above: Bins, shape: tuple[int, ...], index: Tensor) -> tuple[Values, Values | float]:
        """Of p(z_{k-1} | z_k), in bins of z_{k-1}."""

    @abstractmethod
    def levels(self, bins: Bins, shape: tuple[int, ...], index: Tensor) -> tuple[Bins, Values, int]:
        """p(x | z_0): (n,) the first level of each window, (n, W + 1) the probabilities of its levels and of an
        escape, and L.
        """

    @abstractmethod
    def num_latents(self, shape: tuple[int, ...]) -> int:
        """How many numbers a latent of images of this shape (B, C, H, W) has."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of everything but the network's answers."""

    @abstractmethod
    def bits_to_begin(self) -> float:
        """Bits for a dimension of an image that the stack must hold before it, about: popped before as many are
        pushed.
        """

    # --- the two directions ------------------------------------------------------------------------------------------

    def push_images(
        self, stack: Stack, levels: NDArray[np.int64], index: Tensor, trace: list[int] | None = None
    ) -> float:
        """Push images (B, C, H, W). Returns -log2 p(x, z) + log2 q(z | x) of the latents drawn, whose expectation is
        the bound.

        Arguments:
            trace: gets K + 3 sizes of the stack in bits: before, after x, after each of the K steps, and after z_K.
        """
        shape, sizes = levels.shape, [] if trace is None else trace
        sizes.append(stack.num_bits)
        q = self.encoder(levels)
        bins = stack.pop_gaussian(*q, NARROW, escapes=False)
        first, probabilities, num_levels = self.levels(bins, shape, index)
        stack.push_levels(levels.ravel(), first, probabilities, num_levels)
        path = _bits_of_levels(levels.ravel(), first, probabilities, num_levels) - _bits(bins, *q)
        sizes.append(stack.num_bits)
        for k in range(1, self.num_steps + 1):
            stack.whiten(len(bins))
            q = self.forward(k, bins, len(levels))
            above = stack.pop_gaussian(*q, NARROW, escapes=False)
            p = self.reverse(k, above, shape, index)
            stack.push_gaussian(bins, *p, WIDE)
            path += _bits(bins, *p) - _bits(above, *q)
            bins = above
            sizes.append(stack.num_bits)
        prior = (np.zeros(len(bins)), 1 / self.widths[-1])
        stack.push_gaussian(bins, *prior, WIDE)
        sizes.append(stack.num_bits)
        return path + _bits(bins, *prior)

    def pop_images(self, stack: Stack, shape: tuple[int, ...], index: Tensor) -> NDArray[np.int64]:
        """Pop images of this shape (B, C, H, W): the inverse of `push_images`."""
        bins = stack.pop_gaussian(np.zeros(self.num_latents(shape)), 1 / self.widths[-1], WIDE)
        for k in range(self.num_steps, 0, -1):
            below = stack.pop_gaussian(*self.reverse(k, bins, shape, index), WIDE)
            stack.push_gaussian(bins, *self.forward(k, below, shape[0]), NARROW, escapes=False)
            stack.whiten(len(bins))
            bins = below
        levels = stack.pop_levels(*self.levels(bins, shape, index)).reshape(shape)
        stack.push_gaussian(bins, *self.encoder(levels), NARROW, escapes=False)
        return levels


@dataclass(frozen=True, eq=False)
class Chain(Coder):
    """A chain's numbers, and the network behind it.

    Attributes:
        model: the network, and what its images are.
        term: log SNRs and reverse variance. decoder: p(x | z_0).
    """

    model: DenoisingModel
    term: DiscreteTerm
    decoder: Decoder

    def __post_init__(self) -> None:
        if self.model.num_levels is None:
            raise ValueError("`num_levels` is needed: only integers have a size in bits.")
        if self.term.bands is not None:
            raise ValueError(
                "a reverse variance for each frequency cannot be coded pixel by pixel: pass variance_type='optimal' "
                "with one measured "
                "without per_frequency, or variance_type='fixed_small'."
            )
        grid = self.term.grid
        alpha, sigma = alpha_sigma(grid[0])
        scale, variance = transition_coefficients(grid[:-1], grid[1:])
        reverse = posterior_coefficients(grid[1:], grid[:-1])
        fixed = self.term.variance(torch.arange(1.0, len(grid), dtype=torch.float64)).sqrt()
        numbers = {
            "alpha": alpha.reshape(1), "sigma": sigma.reshape(1), "scale": scale, "deviation": variance.sqrt(),
            "from_z": reverse.z, "from_x": reverse.x, "reverse": fixed,
        }  # fmt: skip
        # one and the same on every machine: powers of two and other functions may differ in their last bit
        rounded = {name: value.float().double().numpy() for name, value in numbers.items()}
        object.__setattr__(self, "numbers", rounded)
        popped = np.concatenate([rounded["sigma"], rounded["deviation"]])  # deviations of q, z_0 to z_K
        pushed = np.concatenate([rounded["reverse"], [1.0]])  # and of p
        width = np.exp2(np.floor(np.log2(np.minimum(popped, pushed) / BINS)))
        object.__setattr__(self, "widths", width)

    numbers: dict[str, Values] = None  # type: ignore[assignment]
    widths: Values = None  # type: ignore[assignment]

    def num_latents(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for value in (*self.numbers.values(), self.widths):
            digest.update(value.astype(np.float32).tobytes())
        digest.update(repr((BINS, WIDE, NARROW, MEAN_PARTS, DEVIATION_PARTS, CENTER_PARTS)).encode())
        return digest.hexdigest()

    def bits_to_begin(self) -> float:
        n = self.numbers
        of_z0 = math.log2(n["sigma"][0] / self.widths[0])
        of_z1 = math.log2(n["deviation"][0] / self.widths[1])
        return of_z0 + max(0.0, of_z1) + 2 * 0.5 * math.log2(2 * math.pi * math.e) + 1.0

    # --- q -----------------------------------------------------------------------------------------------------------

    def encoder(self, levels: NDArray[np.int64]) -> tuple[Values, float]:
        x = self.model.encode(torch.from_numpy(levels)).double().numpy().ravel()
        n = self.numbers
        return n["alpha"][0] * x / self.widths[0], float(n["sigma"][0] / self.widths[0])

    def forward(self, k: int, below: Bins, count: int) -> tuple[Values, float]:
        n = self.numbers
        z = below * self.widths[k - 1]
        return n["scale"][k - 1] * z / self.widths[k], float(n["deviation"][k - 1] / self.widths[k])

    # --- p -----------------------------------------------------------------------------------------------------------

    def _outputs(self, k: int, bins: Bins, shape: tuple[int, ...], index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's x_hat at z_k, (B, C, H, W) float64, and its variance channels."""
        z = torch.from_numpy(bins * self.widths[k]).reshape(shape).float()
        log_snr = self.term.grid[k].expand(shape[0])
        value, variance = self.model.outputs(z, log_snr, index)
        return self.model.denoised(value, z, log_snr).double(), variance

    def reverse(self, k: int, above: Bins, shape: tuple[int, ...], index: Tensor) -> tuple[Values, Values | float]:
        n, width = self.numbers, self.widths[k - 1]
        x_hat, predicted = self._outputs(k, above, shape, index)
        mean = (n["from_z"][k - 1] * (above * self.widths[k]) + n["from_x"][k - 1] * x_hat.numpy().ravel()) / width
        mean = np.rint(mean * MEAN_PARTS) / MEAN_PARTS
        kind = self.term.reverse_variance
        if kind not in ("learned", "learned_range"):
            return mean, float(n["reverse"][k - 1] / width)
        if predicted is None:
            raise ValueError("a learned reverse variance needs a network that predicts it.")
        s, t = self.term.grid[k - 1], self.term.grid[k]
        low = as_float64(n["reverse"][k - 1] ** 2).reshape(1)
        variance = learned_variance_of(predicted, kind, low, forward_variance(s, t).reshape(1))
        return mean, _rounded_deviation(variance.sqrt().numpy().ravel() / width)

    # --- p(x | z_0) --------------------------------------------------------------------------------------------------

    def levels(self, bins: Bins, shape: tuple[int, ...], index: Tensor) -> tuple[Bins, Values, int]:
        num_levels = self.model.num_levels
        assert num_levels is not None
        step = bin_width(num_levels, self.model.pixel_encoding)
        lowest = -1 + step / 2 if self.model.pixel_encoding == "bin_center" else -1.0
        if isinstance(self.decoder, SoftmaxDecoder):
            center = bins * self.widths[0] / self.numbers["alpha"][0]
            deviation: Values | float = float(self.numbers["sigma"][0] / self.numbers["alpha"][0] / step)
            masses = False
        elif isinstance(self.decoder, GaussianDecoder):
            x_hat, predicted = self._outputs(0, bins, shape, index)
            center, masses = x_hat.numpy().ravel(), True
            variance: Values | float = self.decoder.variance
            if self.decoder.learned is not None:
                if predicted is None:
                    raise ValueError("a learned decoder variance needs a network that predicts it.")
                ends = (as_float64(self.decoder.variance), as_float64(self.decoder.upper_variance))
                variance = learned_variance_of(predicted, self.decoder.learned, *ends).numpy().ravel()
            deviation = _rounded_deviation(np.sqrt(variance) / step)
        else:
            raise ValueError("continuous data have no levels to code.")
        return window_of_levels((center - lowest) / step, deviation, num_levels, "gaussian" if masses else "softmax")


def window_of_levels(
    center: Values, deviation: Values | float, num_levels: int, kind: Literal["gaussian", "softmax", "logistic"]
) -> tuple[Bins, Values, int]:
    """What `Coder.levels` returns.

    Arguments:
        center, deviation: (n,) in levels; of a logistic distribution, its scale.
        kind: the mass of a normal or logistic distribution in each level's bin, or a softmax of the squared distances.
    """
    center = np.rint(center * CENTER_PARTS) / CENTER_PARTS
    center = np.clip(center, -1.0, float(num_levels))
    reach = math.ceil((24 if kind == "logistic" else 12) * float(np.max(deviation))) + 2
    first, number = np.rint(center).astype(np.int64) - reach, 2 * reach + 1
    if number >= num_levels:
        first, number = np.zeros_like(first), num_levels
    k = first[:, None] + np.arange(number)
    distance, spread = k - center[:, None], np.broadcast_to(np.asarray(deviation), center.shape)[:, None]
    if kind == "softmax":
        square = distance**2
        p = np.exp(-0.5 * (square - square.min(axis=1, keepdims=True)) / spread**2)
    else:
        upper = np.where(k >= num_levels - 1, np.inf, (distance + 0.5) / spread)
        lower = np.where(k <= 0, -np.inf, (distance - 0.5) / spread)
        p = _normal_mass(lower, upper) if kind == "gaussian" else _logistic_mass(lower, upper)
    p = np.where((k >= 0) & (k < num_levels), p, 0.0)
    total = p.sum(axis=1, keepdims=True)
    p = np.where(total > 0, p / np.where(total > 0, total, 1), 1 / number) * (1 - ESCAPE)
    return first, np.concatenate([p, np.full((len(p), 1), ESCAPE)], axis=1), num_levels


class HierarchyCoder(Coder):
    """A variational autoencoder, or a hierarchical one, as a coder: latents of its own shape, widths of one size.

    Arguments:
        model: a `VariationalAutoencoder` or `HierarchicalVAE`, in evaluation mode.
    """

    def __init__(self, model: Any):
        self.model, self.hierarchy = model, model.hierarchy()
        self.widths = np.full(self.hierarchy.num_layers, LATENT_WIDTH)

    def num_latents(self, shape: tuple[int, ...]) -> int:
        return shape[0] * math.prod(self.model.latent_shape)

    def fingerprint(self) -> str:
        constants = (NARROW, WIDE, MEAN_PARTS, DEVIATION_PARTS, CENTER_PARTS)
        return hashlib.blake2b(repr((len(self.widths), LATENT_WIDTH, *constants)).encode(), digest_size=8).hexdigest()

    def bits_to_begin(self) -> float:
        share = math.prod(self.model.latent_shape) / (
            self.model.config.in_channels * math.prod(_two(self.model.config.sample_size))
        )
        return 2 * share * (math.log2(1 / LATENT_WIDTH) + 2.1) + 0.1

    def encoder(self, levels: NDArray[np.int64]) -> tuple[Values, Values | float]:
        config = self.model.config
        x = encode_pixels(torch.from_numpy(levels), config.num_levels, config.pixel_encoding)
        return self._normal(self.hierarchy.encode(1, x.to(self.model.device)), 0)

    def forward(self, k: int, below: Bins, count: int) -> tuple[Values, Values | float]:
        return self._normal(self.hierarchy.encode(k + 1, self._latent(k - 1, below, count)), k)

    def reverse(self, k: int, above: Bins, shape: tuple[int, ...], index: Tensor) -> tuple[Values, Values | float]:
        return self._normal(self.hierarchy.decode(k + 1, self._latent(k, above, shape[0])), k - 1)

    def levels(self, bins: Bins, shape: tuple[int, ...], index: Tensor) -> tuple[Bins, Values, int]:
        config, z = self.model.config, self._latent(0, bins, shape[0])
        step = bin_width(config.num_levels, config.pixel_encoding)
        lowest = -1 + step / 2 if config.pixel_encoding == "bin_center" else -1.0
        if getattr(self.model, "is_diffusion", False):
            alpha, sigma = alpha_sigma(config.encoder_log_snrs[0])
            center = z.double().cpu().numpy().ravel() / float(alpha)
            return window_of_levels(
                (center - lowest) / step, float(sigma / alpha) / step, config.num_levels, "softmax"
            )
        parameters = in_own_dtype(self.model.decoder, z).double().cpu()
        if config.likelihood == "bernoulli":
            logit = np.rint(parameters.numpy().ravel() * CENTER_PARTS) / CENTER_PARTS
            p = np.stack([1 / (1 + np.exp(logit)), 1 / (1 + np.exp(-logit)), np.full(logit.shape, ESCAPE)], axis=1)
            return np.zeros(len(logit), dtype=np.int64), p, 2
        mean, raw = parameters.chunk(2, dim=1)
        scale = bin_width(config.num_levels, config.pixel_encoding) / 20 + torch.nn.functional.softplus(raw)
        kind: Literal["logistic", "gaussian"] = (
            "logistic" if config.likelihood == "discretized_logistic" else "gaussian"
        )
        deviation = _rounded_deviation(scale.numpy().ravel() / step)
        return window_of_levels((mean.numpy().ravel() - lowest) / step, deviation, config.num_levels, kind)

    def _latent(self, k: int, bins: Bins, count: int) -> Tensor:
        z = torch.from_numpy(bins * self.widths[k]).float()
        return z.reshape(count, *self.model.latent_shape).to(self.model.device)

    def _normal(self, normal: Normal, k: int) -> tuple[Values, Values]:
        mean = normal.mean.double().cpu().numpy().ravel() / self.widths[k]
        variance = torch.broadcast_to(as_float64(normal.variance).cpu(), normal.mean.shape)
        deviation = np.maximum(variance.sqrt().numpy().ravel() / self.widths[k], 0.05)
        return np.rint(mean * MEAN_PARTS) / MEAN_PARTS, _rounded_deviation(deviation)


def _two(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _bits(bins: Bins, mean: Values, deviation: Values | float) -> float:
    """-log2 of the Gaussian density at all bins, summed."""
    spread = np.broadcast_to(np.asarray(deviation, dtype=np.float64), mean.shape)
    nats = 0.5 * ((bins - mean) / spread) ** 2 + np.log(spread) + 0.5 * math.log(2 * math.pi)
    return float(nats.sum()) / math.log(2)


def _bits_of_levels(levels: Bins, first: Bins, probabilities: Values, num_levels: int) -> float:
    """-log2 of the probabilities of all levels, summed; of one outside its window what its escape costs."""
    width = probabilities.shape[1] - 1
    symbol = levels - first
    outside = (symbol < 0) | (symbol >= width)
    chosen = np.take_along_axis(probabilities, np.where(outside, width, symbol)[:, None], axis=1)
    return float(outside.sum()) * math.log2(num_levels) - float(np.log2(np.maximum(chosen, 2.0**-60)).sum())


def _rounded_deviation(deviation: Values | float) -> Values:
    exponent = np.rint(np.log2(np.asarray(deviation, dtype=np.float64)) * DEVIATION_PARTS)
    return np.exp2(exponent / DEVIATION_PARTS).astype(np.float32).astype(np.float64)


def _normal_mass(lower: Values, upper: Values) -> Values:
    """The mass of a standard normal distribution between two points, without cancellation in the tails."""
    return log_normal_mass(torch.from_numpy(lower), torch.from_numpy(upper)).exp().numpy()


def _logistic_mass(lower: Values, upper: Values) -> Values:
    """The mass of a standard logistic distribution between two points: on the side of the mean where both are
    small.
    """
    flip = lower + upper > 0
    low, high = np.where(flip, -upper, lower), np.where(flip, -lower, upper)
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-high)) - 1 / (1 + np.exp(-low))
