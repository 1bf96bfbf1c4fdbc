"""A stack of bits, on which values are pushed, and from which they are popped, each with a distribution.

Pushing a value of probability p makes the stack -log2 p bits longer, popping one makes it that much shorter: a pop
draws a value from its distribution with the bits that lie on top, and pushing the value again puts the same bits back
(asymmetric numeral systems, Duda 2013). The coder is `constriction`'s.

Gaussian values are multiples of a bin's width. A distribution's support is a window around its mean, as the coder's
probabilities are multiples of 2^-24 and none is 0: every symbol of a wider window would get probability that the
Gaussian does not have there, and pops would draw outliers. A value outside its window is pushed as itself, and an
escape symbol after it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Bins = NDArray[np.int64]
LEAST = 128  # bits of the stack: with fewer a pop may not be undone
ESCAPED = 26  # bits of a bin's number that did not fit its window


class CodingError(RuntimeError):
    """The stack holds fewer bits than a pop needs, or a value cannot be coded."""


def constriction() -> Any:
    """The package of the entropy coder.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        import constriction as package  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError("compression needs the entropy coder constriction: pip install constriction") from None
    return package


class Stack:
    """Bits, the last ones on top.

    Arguments:
        words: (n,) uint32: any to begin a message with, or with continued=True those that `words` gave.
    """

    def __init__(self, words: NDArray[np.uint32], *, continued: bool = False):
        self._models = constriction().stream.model
        # what a message begins with is sealed by a bit, so that its end is found again
        self._coder = constriction().stream.stack.AnsCoder(np.ascontiguousarray(words, dtype=np.uint32), not continued)
        self.lowest = self.num_bits

    @property
    def num_bits(self) -> int:
        """How many bits it holds."""
        return int(self._coder.num_valid_bits())

    def words(self) -> NDArray[np.uint32]:
        """(n,) uint32, the message as it is."""
        return np.asarray(self._coder.get_compressed(), dtype=np.uint32)

    def first_words(self) -> NDArray[np.uint32]:
        """(n,) uint32, what the message began with, once all that was pushed is popped and all that was popped pushed
        again.

        Raises:
            CodingError: it is not.
        """
        try:
            return np.asarray(self._coder.get_compressed(unseal=True), dtype=np.uint32)
        except (AssertionError, ValueError) as error:
            raise CodingError(
                "the stack is not as it was in the beginning: other values were popped than were pushed."
            ) from error

    def whiten(self, count: int) -> None:
        """Exclusive-or the last `count` words, but for the coder's own state, with fixed pseudo-random ones. Twice is
        not at all.

        What was pushed with a distribution that it was not drawn from leaves bits that are not even ("dirty" ones). A
        pop that is to draw a value from its own distribution then draws from another.
        """
        words = self.words()
        end = len(words) - 2
        start = max(0, end - count)
        if end <= start:
            return
        pad = np.random.Generator(np.random.PCG64(len(words))).integers(0, 1 << 32, end - start, dtype=np.uint32)
        words[start:end] ^= pad
        self._coder = constriction().stream.stack.AnsCoder(words)

    # --- Gaussians ---------------------------------------------------------------------------------------------------

    def push_gaussian(
        self, bins: Bins, mean: Values, deviation: Values | float, reach: float, *, escapes: bool = True
    ) -> None:
        """Push (n,) bins, given means and deviations in units of a bin, from windows that reach so many deviations to
        either side.

        With escapes=False every value must lie in its window, as one does that was popped from there.
        """
        center, fraction, deviation = _around(mean, deviation)
        offset = bins - center
        for part, window in reversed(_windows(deviation, reach)):
            mine = offset[part]
            outside = np.abs(mine) >= window + (not escapes)
            if outside.any():
                if not escapes:
                    raise CodingError("a value lies outside its window: these bits were not made with this model.")
                self._push_escaped(bins[part][outside])
            clipped = np.clip(mine, -window, window).astype(np.int32)
            model = self._models.QuantizedGaussian(-window, window)
            self._coder.encode_reverse(clipped, model, fraction[part], deviation[part])

    def pop_gaussian(self, mean: Values, deviation: Values | float, reach: float, *, escapes: bool = True) -> Bins:
        """Pop (n,) bins: the inverse of `push_gaussian`.

        With escapes=False the windows are all there is to draw from.
        """
        center, fraction, deviation = _around(mean, deviation)
        bins = np.empty_like(center)
        for part, window in _windows(deviation, reach):
            model = self._models.QuantizedGaussian(-window, window)
            offset = np.asarray(self._coder.decode(model, fraction[part], deviation[part]), dtype=np.int64)
            self._note()
            drawn = center[part] + offset
            outside = np.abs(offset) >= window + (not escapes)
            if outside.any():
                drawn[outside] = self._pop_escaped(int(outside.sum()))
            bins[part] = drawn
        return bins

    def _push_escaped(self, bins: Bins) -> None:
        limit = 1 << (ESCAPED - 1)
        if bool((np.abs(bins) >= limit).any()):
            raise CodingError(
                "a latent lies too far out to be coded: the network's outputs are not finite, or it has diverged."
            )
        shifted = (bins + limit).astype(np.int64)
        half = ESCAPED // 2
        for part in (shifted >> half, shifted & ((1 << half) - 1)):
            self._coder.encode_reverse(part.astype(np.int32), self._models.Uniform(1 << half))

    def _pop_escaped(self, count: int) -> Bins:
        half = ESCAPED // 2
        low, high = (
            np.asarray(self._coder.decode(self._models.Uniform(1 << half), count), dtype=np.int64) for _ in range(2)
        )
        return (high << half) + low - (1 << (ESCAPED - 1))

    # --- levels ------------------------------------------------------------------------------------------------------

    def push_levels(self, levels: Bins, first: Bins, probabilities: Values, num_levels: int) -> None:
        """Push (n,) levels: probabilities (n, W + 1) of W levels from `first` on, and of an escape."""
        width = probabilities.shape[1] - 1
        symbol = levels - first
        outside = (symbol < 0) | (symbol >= width)
        if outside.any():
            self._coder.encode_reverse(levels[outside].astype(np.int32), self._models.Uniform(max(2, num_levels)))
        symbol = np.where(outside, width, symbol).astype(np.int32)
        self._coder.encode_reverse(symbol, self._models.Categorical(perfect=False), probabilities)

    def pop_levels(self, first: Bins, probabilities: Values, num_levels: int) -> Bins:
        """Pop (n,) levels: the inverse of `push_levels`."""
        width = probabilities.shape[1] - 1
        symbol = np.asarray(self._coder.decode(self._models.Categorical(perfect=False), probabilities), dtype=np.int64)
        self._note()
        outside = symbol == width
        levels = first + symbol
        if outside.any():
            model = self._models.Uniform(max(2, num_levels))
            levels[outside] = np.asarray(self._coder.decode(model, int(outside.sum())), dtype=np.int64)
        return levels

    def _note(self) -> None:
        self.lowest = min(self.lowest, self.num_bits)
        if self.lowest < LEAST:
            raise CodingError("the stack holds too few bits to draw latents with.")


def _windows(deviation: Values, reach: float) -> list[tuple[NDArray[np.intp], int]]:
    """Which of (n,) values have windows of one size, and half that size: deviations within a factor of two share
    one.
    """
    octave = np.ceil(np.log2(deviation))
    groups = [(np.flatnonzero(octave == value), float(value)) for value in np.unique(octave)]
    return [(part, int(np.ceil(reach * 2.0**value)) + 2) for part, value in groups]


def _around(mean: Values, deviation: Values | float) -> tuple[Bins, Values, Values]:
    """The bin nearest to each mean, the mean from there, and the deviations, each (n,)."""
    center = np.rint(mean)
    spread = np.broadcast_to(np.asarray(deviation, dtype=np.float64), mean.shape)
    return center.astype(np.int64), np.ascontiguousarray(mean - center), np.ascontiguousarray(spread)
