r"""The bound as a machine: a diffusion chain with what it pushes and pops (bits-back coding).

The sender has images x. With the forward chain q and the model p, in the order of the bound's first form (docs/theory.md):

    pop z_0 ~ q(z_0 | x), push x | z_0 under p;   for k = 1..K: pop z_k ~ q(z_k | z_{k-1}), push z_{k-1} | z_k under p;   push z_K under p

The stack has grown by -ln p(x, z) + ln q(z | x), whose expectation is the bound of this chain. The receiver does the inverse, and gets
back the bits that the pops took. Each z_k is a multiple of a bin's width, a power of two some 8 to 16 bins to the smaller deviation of the
two distributions that it is coded with; the widths cancel.

Everything that sender and receiver must agree on to the last bit is made of few numbers, in float64, rounded to float32's precision.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..decoders import bin_width
from ..gaussian import alpha_sigma, posterior_coefficients, transition_coefficients
from ..likelihood import Decoder, DenoisingModel, DiscreteTerm, GaussianDecoder, SoftmaxDecoder, learned_variance_of
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
ESCAPE = 2.0**-20  # the probability of a level outside its window


@dataclass(frozen=True, eq=False)
class Chain:
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
                "a reverse variance for each frequency cannot be coded pixel by pixel: pass variance_type='optimal' with one measured "
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

    @property
    def num_steps(self) -> int:
        """K, the transitions. One evaluation of the network each, and one more for a table's decoder."""
        return self.term.num_steps

    def fingerprint(self) -> str:
        """Of everything but the network's answers."""
        digest = hashlib.blake2b(digest_size=8)
        for value in (*self.numbers.values(), self.widths):
            digest.update(value.astype(np.float32).tobytes())
        digest.update(repr((BINS, WIDE, NARROW, MEAN_PARTS, DEVIATION_PARTS, CENTER_PARTS)).encode())
        return digest.hexdigest()

    def bits_to_begin(self) -> float:
        """Bits for a dimension that the stack must hold before an image: what is popped before anything is pushed, about."""
        n = self.numbers
        of_z0 = math.log2(n["sigma"][0] / self.widths[0])
        of_z1 = math.log2(n["deviation"][0] / self.widths[1])
        return of_z0 + max(0.0, of_z1) + 2 * 0.5 * math.log2(2 * math.pi * math.e) + 1.0

    # --- the two directions -------------------------------------------------------------------------------------------

    def push_images(
        self, stack: Stack, levels: NDArray[np.int64], index: Tensor, trace: list[int] | None = None
    ) -> None:
        """Push images (B, C, H, W).

        Arguments:
            trace: gets K + 3 sizes of the stack in bits: before, after x, after each of the K steps, and after z_K.
        """
        shape, sizes = levels.shape, [] if trace is None else trace
        sizes.append(stack.num_bits)
        bins = self._pop_z0(stack, levels)
        self._push_levels(stack, levels, bins, shape, index)
        sizes.append(stack.num_bits)
        for k in range(1, self.num_steps + 1):
            stack.whiten(len(bins))
            above = self._pop_forward(stack, k, bins)
            mean, deviation = self._reverse(k, above, shape, index)
            stack.push_gaussian(bins, mean, deviation, self._window(deviation))
            bins = above
            sizes.append(stack.num_bits)
        stack.push_gaussian(bins, np.zeros(len(bins)), 1 / self.widths[-1], self._window(1 / self.widths[-1]))
        sizes.append(stack.num_bits)

    def pop_images(self, stack: Stack, shape: tuple[int, ...], index: Tensor) -> NDArray[np.int64]:
        """Pop images of this shape (B, C, H, W): the inverse of `push_images`."""
        count = math.prod(shape)
        bins = stack.pop_gaussian(np.zeros(count), 1 / self.widths[-1], self._window(1 / self.widths[-1]))
        for k in range(self.num_steps, 0, -1):
            mean, deviation = self._reverse(k, bins, shape, index)
            below = stack.pop_gaussian(mean, deviation, self._window(deviation))
            mean, spread = self._forward(k, below)
            stack.push_gaussian(bins, mean, spread, self._window(spread, NARROW), escapes=False)
            stack.whiten(len(bins))
            bins = below
        levels = self._pop_levels(stack, bins, shape, index)
        mean, spread = self._encoder(levels)
        stack.push_gaussian(bins, mean, spread, self._window(spread, NARROW), escapes=False)
        return levels

    # --- q ------------------------------------------------------------------------------------------------------------

    def _encoder(self, levels: NDArray[np.int64]) -> tuple[Values, float]:
        """q(z_0 | x) in bins."""
        x = self.model.encode(torch.from_numpy(levels)).double().numpy().ravel()
        n = self.numbers
        return n["alpha"][0] * x / self.widths[0], float(n["sigma"][0] / self.widths[0])

    def _forward(self, k: int, below: Bins) -> tuple[Values, float]:
        """q(z_k | z_{k-1}) in bins."""
        n = self.numbers
        z = below * self.widths[k - 1]
        return n["scale"][k - 1] * z / self.widths[k], float(n["deviation"][k - 1] / self.widths[k])

    def _pop_z0(self, stack: Stack, levels: NDArray[np.int64]) -> Bins:
        mean, spread = self._encoder(levels)
        return stack.pop_gaussian(mean, spread, self._window(spread, NARROW), escapes=False)

    def _pop_forward(self, stack: Stack, k: int, below: Bins) -> Bins:
        mean, spread = self._forward(k, below)
        return stack.pop_gaussian(mean, spread, self._window(spread, NARROW), escapes=False)

    # --- p ------------------------------------------------------------------------------------------------------------

    def _outputs(self, k: int, bins: Bins, shape: tuple[int, ...], index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's x_hat at z_k, (B, C, H, W) float64, and its variance channels."""
        z = torch.from_numpy(bins * self.widths[k]).reshape(shape).float()
        log_snr = self.term.grid[k].expand(shape[0])
        value, variance = self.model.outputs(z, log_snr, index)
        return self.model.denoised(value, z, log_snr).double(), variance

    def _reverse(self, k: int, above: Bins, shape: tuple[int, ...], index: Tensor) -> tuple[Values, Values | float]:
        """p(z_{k-1} | z_k) in bins of z_{k-1}."""
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

    # --- p(x | z_0) ---------------------------------------------------------------------------------------------------

    def _levels(self, bins: Bins, shape: tuple[int, ...], index: Tensor) -> tuple[Bins, Values]:
        """(n,) the first level of each window, and (n, W + 1) the probabilities of its levels and of an escape."""
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
        center = np.rint((center - lowest) / step * CENTER_PARTS) / CENTER_PARTS  # in levels
        center = np.clip(center, -1.0, float(num_levels))
        reach = math.ceil(12 * float(np.max(deviation))) + 2
        first = np.rint(center).astype(np.int64) - reach
        number = 2 * reach + 1
        if number >= num_levels:
            first, number = np.zeros_like(first), num_levels
        k = first[:, None] + np.arange(number)
        distance, spread = k - center[:, None], np.broadcast_to(np.asarray(deviation), center.shape)[:, None]
        if masses:
            upper = np.where(k >= num_levels - 1, np.inf, (distance + 0.5) / spread)
            lower = np.where(k <= 0, -np.inf, (distance - 0.5) / spread)
            p = _normal_mass(lower, upper)
        else:
            p = np.exp(-0.5 * ((distance**2) - (distance**2).min(axis=1, keepdims=True)) / spread**2)
        p = np.where((k >= 0) & (k < num_levels), p, 0.0)
        total = p.sum(axis=1, keepdims=True)
        p = np.where(total > 0, p / np.where(total > 0, total, 1), 1 / number) * (1 - ESCAPE)
        return first, np.concatenate([p, np.full((len(p), 1), ESCAPE)], axis=1)

    def _push_levels(
        self, stack: Stack, levels: NDArray[np.int64], bins: Bins, shape: tuple[int, ...], index: Tensor
    ) -> None:
        first, probabilities = self._levels(bins, shape, index)
        stack.push_levels(levels.ravel(), first, probabilities, int(self.model.num_levels or 0))

    def _pop_levels(self, stack: Stack, bins: Bins, shape: tuple[int, ...], index: Tensor) -> NDArray[np.int64]:
        first, probabilities = self._levels(bins, shape, index)
        return stack.pop_levels(first, probabilities, int(self.model.num_levels or 0)).reshape(shape)

    @staticmethod
    def _window(deviation: Values | float, reach: float = WIDE) -> int:
        """Half the number of bins of a window."""
        return math.ceil(reach * float(np.max(deviation))) + 2


def _rounded_deviation(deviation: Values | float) -> Values:
    exponent = np.rint(np.log2(np.asarray(deviation, dtype=np.float64)) * DEVIATION_PARTS)
    return np.exp2(exponent / DEVIATION_PARTS).astype(np.float32).astype(np.float64)


def _normal_mass(lower: Values, upper: Values) -> Values:
    """The mass of a standard normal distribution between two points, without cancellation in the tails."""
    from ..decoders import log_normal_mass

    return log_normal_mass(torch.from_numpy(lower), torch.from_numpy(upper)).exp().numpy()
