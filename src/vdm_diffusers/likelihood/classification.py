r"""Which class an image is of: the bounds of one network under every class, from evaluations that share noise levels
and noise.

    log-odds of class k against j:   ln p(k | x) - ln p(j | x) = nats_j - nats_k + ln prior_k - ln prior_j

Both bounds are sums over log SNR of the network's errors, of which most is the same for all classes. Evaluated at the
same noisy images it cancels. Further evaluations go where the classes differ: in proportion to the standard deviation
of the difference at each log SNR, which the first ones show. A class that is far behind the best one is left out of
later rounds.

Source: Li et al. 2023, "Your diffusion model is secretly a zero-shot classifier"; the stratified times, the density
and the errors are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..control_variates import hat_weights
from ..repetitions import mix_seed
from ..time_sampling import fold
from .placement import noise_of
from .reconstruction import GaussianDecoder
from .rounds import Side
from .terms import Profile

_KNOTS = 24  # of the learned density over log SNR, at most
_FAR = 7.0  # nats behind the best class (odds of 1 to 1100), beyond `_SURE` errors: such a class is left out
_SURE = 4.0


@dataclass(frozen=True, eq=False)
class ClassificationReport:
    """What each class says of each image.

    Attributes:
        log_odds: (N, K) nats, ln p(k | x) - ln p(best | x): 0 for the most likely class, negative for the others.
        log_odds_error: (N, K) nats, one standard deviation of these estimates; NaN from a single evaluation.
        num_evaluations: (N, K) evaluations that each class got.
        classes: the K labels or prompts, in the order of the columns.
        settings: how the figures came about (JSON primitives).
    """

    log_odds: Tensor
    log_odds_error: Tensor
    num_evaluations: Tensor
    classes: list[Any]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def probabilities(self) -> Tensor:
        """(N, K) posterior probabilities of the classes."""
        return torch.softmax(self.log_odds, dim=1)

    @property
    def best(self) -> Tensor:
        """(N,) the column of the most likely class."""
        return self.log_odds.argmax(1)

    @property
    def predictions(self) -> list[Any]:
        """The most likely class of each image."""
        return [self.classes[k] for k in self.best.tolist()]

    @property
    def num_model_evaluations(self) -> int:
        """How many times the network was applied to one image."""
        return int(self.num_evaluations.sum())

    def to_dict(self) -> dict[str, Any]:
        """JSON primitives."""
        return {
            "classes": list(self.classes),
            "predictions": self.predictions,
            "log_odds": self.log_odds.tolist(),
            "log_odds_error": [[None if math.isnan(e) else e for e in row] for row in self.log_odds_error.tolist()],
            "probabilities": self.probabilities.tolist(),
            "num_model_evaluations": self.num_model_evaluations,
            "settings": dict(self.settings),
        }

    def __str__(self) -> str:
        shares = torch.bincount(self.best, minlength=len(self.classes)).tolist()
        counts = ", ".join(f"{name}: {n}" for name, n in zip(self.classes, shares, strict=True) if n)
        return f"{len(self.log_odds)} images, {self.num_model_evaluations} evaluations; most likely classes: {counts}"


def evaluate_classes(
    side: Side,
    levels: Tensor,
    num_classes: int,
    log_prior: Tensor,
    *,
    num_samples: int = 8,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    drop_unlikely: bool = True,
    learn_density: bool = True,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-odds, their errors and the evaluations spent, each (N, K); see `ClassificationReport`.

    Args:
        side: the model, whose `predict` takes the class k as its index.
        levels: (N, C, ...) as of `evaluate_bound`.
        log_prior: (K,) of the classes.
        num_samples: evaluations of the network for each image and class, at least 1.
        drop_unlikely: leave classes out that are more than 7 nats and 4 errors behind the best one.
        learn_density: place later evaluations where the classes were seen to differ.
        progress: called with the number of evaluations done or saved.
    """
    side.model.check(levels)
    count = len(levels)
    alive = torch.ones(count, num_classes, dtype=torch.bool)
    tally = _Tally(count, num_classes)
    profile = _first_profile(side) if learn_density else None
    seen: list[tuple[Tensor, Tensor]] = []
    for number, size in enumerate(_round_sizes(num_samples)):
        site, inverse_density, is_decoder = _places(side, count, size, profile, mix_seed(seed, "classes", number))
        log_snr = side.term.log_snr(site)
        nats = torch.full((count, num_classes, site.shape[1]), math.nan, dtype=torch.float64)
        for image, kind, column in _batches(alive, site.shape[1], batch_size):
            k = levels[image].to(device)
            noise = noise_of(image, column, k.shape[1:], seed, number, torch.arange(site.shape[1]) // 4).to(device)
            drawn = (k, noise, kind, site[image, column], log_snr[image, column], is_decoder[column])
            nats[image, kind, column] = side.evaluate(*drawn)[0]
            if progress is not None:
                progress(len(image))
        if progress is not None:
            progress(int((~alive).sum()) * site.shape[1])
        if not bool(nats[alive].isfinite().all()):
            raise ValueError(
                "the loss is not finite: the network's outputs are too large for float32, as of a diverged training."
            )
        values = nats * torch.where(is_decoder, 1.0, inverse_density[:, None])
        tally.add(values, is_decoder, alive)
        if learn_density:
            seen.append(_spread(side, nats, site, log_snr, is_decoder, alive))
            profile = _profile(seen)
        if drop_unlikely:
            log_odds, error = tally.log_odds(log_prior)
            alive = alive & ~(log_odds < -_FAR - _SURE * error)
    return *tally.log_odds(log_prior), tally.spent


class _Tally:
    """Sums over the rounds: of each class's nats less the mean over the classes that were evaluated beside it."""

    def __init__(self, count: int, num_classes: int):
        self.parts: list[
            tuple[Tensor, Tensor, Tensor]
        ] = []  # nats (N, K, n), which columns decode, which classes took part
        self.spent = torch.zeros(count, num_classes, dtype=torch.long)

    def add(self, values: Tensor, is_decoder: Tensor, alive: Tensor) -> None:
        self.parts.append((values, is_decoder, alive))
        self.spent += alive.long() * values.shape[2]

    def log_odds(self, log_prior: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K) log-odds against the best class, and their errors."""
        best = self._against(self.parts[-1][2].float().argmax(1))[0].masked_fill(~self.parts[-1][2], math.inf)
        leader = (best - log_prior).argmin(1)  # among those that are still in
        difference, error = self._against(leader)
        reference = log_prior[leader][:, None]
        log_odds = log_prior - reference - difference
        return log_odds - log_odds.max(1, keepdim=True).values, error

    def _against(self, leader: Tensor) -> tuple[Tensor, Tensor]:
        """nats_k - nats_leader, (N, K), from the rounds that class k took part in, and the error."""
        rows = torch.arange(len(leader))
        total, square, number = (torch.zeros(self.spent.shape, dtype=torch.float64) for _ in range(3))
        decoded, decodings = torch.zeros_like(total), torch.zeros_like(total)
        for values, is_decoder, alive in self.parts:
            apart = values - values[rows, leader][:, None]
            mine = alive[..., None] & ~is_decoder
            apart = torch.where(alive[..., None], apart, 0.0)
            total += torch.where(mine, apart, 0.0).sum(2)
            square += torch.where(mine, apart**2, 0.0).sum(2)
            number += mine.sum(2)
            decoded += torch.where(alive[..., None] & is_decoder, apart, 0.0).sum(2)
            decodings += (alive[..., None] & is_decoder).sum(2)
        mean = total / number
        scatter = (square - number * mean**2).clamp(min=0)
        # a class's own scatter, and two evaluations' worth of what is usual: few evaluations say little of their own
        # error
        usual = scatter.sum(1, keepdim=True) / (number - 1).clamp(min=0).sum(1, keepdim=True)
        variance = (scatter + 2 * usual) / (number + 1)
        error = (variance / number).sqrt()
        error[rows, leader] = 0.0
        return mean + decoded / decodings.clamp(min=1), error


def _round_sizes(num_samples: int) -> list[int]:
    """A quarter, a quarter, a half; at least two evaluations at first, without which there is no error."""
    if num_samples < 4:
        return [num_samples]
    first = max(2, num_samples // 4)
    second = max(1, min(first, (num_samples - first) // 2))
    return [n for n in (first, second, num_samples - first - second) if n > 0]


def _places(side: Side, count: int, size: int, profile: Profile | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sites and inverse densities (N, n), stratified within each image and over the images; which columns are the
    decoder's.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    shift = torch.rand((), generator=generator, dtype=torch.float64)
    lattice = (order[:, None] + count * torch.arange(size)).double()
    site, inverse_density = side.term.place(fold((lattice / (count * size) + shift) % 1.0), profile)
    own = int(isinstance(side.decoder, GaussianDecoder))  # one evaluation a round for a decoder that needs the network
    ones = torch.ones(count, own, dtype=torch.float64)
    return torch.cat([ones, site], 1), torch.cat([ones, inverse_density], 1), torch.arange(size + own) < own


def _batches(alive: Tensor, columns: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(image, class, column) of all evaluations of a round; those of one noisy image stand together."""
    image, column, kind = alive[:, None, :].expand(-1, columns, -1).nonzero().T
    for part in torch.arange(len(image)).split(batch_size):
        yield image[part], kind[part], column[part]


def _first_profile(side: Side) -> Profile:
    """Where classes are expected to differ before anything was seen: where noise hides the details, at log SNRs below
    about 2.
    """
    highest, lowest = side.term.log_snr_range()
    knots = torch.linspace(max(lowest, -20.0), min(highest, 20.0), _KNOTS, dtype=torch.float64)
    return Profile(knots, torch.sigmoid(2.0 - knots) + 1e-3)


def _spread(
    side: Side, nats: Tensor, site: Tensor, log_snr: Tensor, is_decoder: Tensor, alive: Tensor
) -> tuple[Tensor, Tensor]:
    """Log SNRs and mean square differences between the classes there, per unit of the term's scale."""
    mine = alive[..., None] & ~is_decoder
    number = mine.sum(1).clamp(min=1)
    centered = torch.where(mine, nats, 0.0)
    centered = torch.where(mine, nats - (centered.sum(1) / number)[:, None], 0.0)
    variance = (centered**2).sum(1) / (number - 1).clamp(min=1) / side.term.scale(site).clamp(min=1e-12) ** 2
    keep = (~is_decoder).expand(variance.shape) & (number > 1)
    return log_snr[keep], variance[keep]


def _profile(seen: list[tuple[Tensor, Tensor]]) -> Profile | None:
    """The standard deviation of the difference against log SNR."""
    log_snr, variance = (torch.cat(parts) for parts in zip(*seen, strict=True))
    number = min(_KNOTS, len(log_snr) // 16)
    if number < 2 or not float(variance.sum()) > 0:
        return None
    knots = torch.linspace(float(log_snr.min()), float(log_snr.max()) + 1e-9, number, dtype=torch.float64)
    hats, overall = hat_weights(knots, log_snr), variance.mean()
    values = torch.sqrt((hats.T @ variance + 2e-3 * overall) / (hats.sum(0) + 2e-3)).clamp(min=1e-150)
    return Profile(knots, values)
