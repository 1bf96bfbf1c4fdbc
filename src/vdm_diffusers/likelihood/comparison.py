r"""The difference of two models' bounds, from evaluations that share images, noise levels and noise.

What two networks get wrong at one noisy image is mostly the same, so the difference of their losses scatters far less
than either. The evaluations are placed where the *difference* scatters (Neyman's allocation), and the control variates
are fitted to it.

    difference = a - b in bits/dim; negative: `a` finds the images more likely.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..elbo import prior_kl
from ..repetitions import Budget, Runner, run_all
from .bound import evaluate_rounds
from .estimate import by_band, estimate_terms, octaves
from .reconstruction import GaussianDecoder, expected_reconstruction
from .report import LossCurve
from .rounds import EvaluationRound, Problem, Side, fit_controls
from .terms import ContinuousTerm, DiffusionTerm, DiscreteTerm, Profile

_BAND = 2.0  # width of the report's bands of log SNR


@dataclass(frozen=True, eq=False)
class ComparisonReport:
    """How much less likely `a` finds the images than `b`: the difference of their bounds, a - b.

    Attributes:
        nats: (N,) float64, the difference for every image.
        prior, diffusion, reconstruction: (N,) nats, the same for each term; None where the models' methods have no
            such term.
        num_dims: D, dimensions of an image.
        standard_error: bits/dim, one standard deviation of the estimator of `difference` for these very images.
        num_model_evaluations: of both networks together.
        bands: the diffusion term's difference by log SNR: a list of `log_snr_low`, `log_snr_high`, `difference` and
            `standard_error` in bits/dim. Empty for a difference that is not paired.
        is_paired: whether the two shared noise and noise levels.
        settings: of both sides, and what could not be shared (JSON primitives).
    """

    nats: Tensor
    prior: Tensor | None
    diffusion: Tensor | None
    reconstruction: Tensor | None
    num_dims: int
    standard_error: float
    num_model_evaluations: int
    bands: list[dict[str, float]]
    is_paired: bool
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def difference(self) -> float:
        """The mean over the images in bits/dim; negative: `a` is better."""
        return self._bits(self.nats)

    @property
    def sampling_error(self) -> float:
        """bits/dim, std / sqrt(N) between the images: how far the difference on another sample of N images would lie.

        NaN for one image.
        """
        if len(self.nats) < 2:
            return math.nan
        return float(self.nats.std()) / math.sqrt(len(self.nats)) / (self.num_dims * math.log(2))

    @property
    def total_error(self) -> float:
        """bits/dim, for all images that might have been drawn.

        `sampling_error` holds the estimator's scatter already.
        """
        return (
            self.standard_error if math.isnan(self.sampling_error) else max(self.sampling_error, self.standard_error)
        )

    @property
    def share_better(self) -> float:
        """The share of images that `a` finds more likely, as estimated for each; ties count half."""
        return float((self.nats < 0).double().mean() + 0.5 * (self.nats == 0).double().mean())

    def to_dict(self, per_image: bool = False) -> dict[str, Any]:
        """JSON primitives: means in bits/dim, errors, bands and settings; with `per_image` the list of nats as
        well.
        """
        terms = {"prior": self.prior, "diffusion": self.diffusion, "reconstruction": self.reconstruction}
        summary: dict[str, Any] = {
            "difference": self.difference,
            "standard_error": self.standard_error,
            "sampling_error": None if math.isnan(self.sampling_error) else self.sampling_error,
            "total_error": self.total_error,
            "share_better": self.share_better,
            **{name: None if term is None else self._bits(term) for name, term in terms.items()},
            "num_images": len(self.nats),
            "num_dims": self.num_dims,
            "num_model_evaluations": self.num_model_evaluations,
            "is_paired": self.is_paired,
            "bands": self.bands,
            "settings": dict(self.settings),
        }
        if per_image:
            summary["per_image"] = {"nats": self.nats.tolist()}
        return summary

    def _bits(self, nats: Tensor) -> float:
        return float(nats.double().mean()) / (self.num_dims * math.log(2))

    def __str__(self) -> str:
        word = "better" if self.difference < 0 else "worse"
        shared = "" if self.is_paired else "; not paired"
        return (
            f"{self.difference:+.5f} bits/dim (a - b; a is {word}): +- {self.standard_error:.5f} (estimator) +- "
            f"{self.sampling_error:.5f} "
            f"(images); a is better on {self.share_better:.0%} of {len(self.nats)} "
            f"image{'s' if len(self.nats) > 1 else ''}{shared}"
        )


@dataclass(frozen=True, eq=False)
class _DifferenceTerm(DiffusionTerm):
    """The difference of two diffusion terms whose sites mean the same: places evaluations, and holds what needs no
    network.
    """

    first: DiffusionTerm
    second: DiffusionTerm
    both: DiffusionTerm  # whose sites cover the two

    def place(self, u: Tensor, profile: Profile | None = None) -> tuple[Tensor, Tensor]:
        return self.both.place(u, profile)

    def scale(self, site: Tensor) -> Tensor:
        return self.both.scale(site)

    def constant(self, site: Tensor, num_dims: int) -> Tensor:
        return self.first.constant(site, num_dims) - self.second.constant(site, num_dims)

    def quadrature(self, knots: Tensor) -> tuple[Tensor, Tensor]:
        return self.both.quadrature(knots)

    def log_snr(self, site: Tensor) -> Tensor:
        return self.both.log_snr(site)

    def log_snr_range(self) -> tuple[float, float]:
        return self.both.log_snr_range()

    def nats(self, site: Tensor, error: Tensor, to_x: Tensor, variance: Tensor | None) -> Tensor:
        raise NotImplementedError("each side has a term of its own")


def why_not_shared(first: DiffusionTerm, second: DiffusionTerm) -> str | None:
    """Why evaluations of two terms cannot share their sites; None: they can."""
    if isinstance(first, ContinuousTerm) and isinstance(second, ContinuousTerm):
        return None
    if not (isinstance(first, DiscreteTerm) and isinstance(second, DiscreteTerm)):
        return "one bound is in continuous time, the other a chain's"
    if first.grid.shape != second.grid.shape:
        return f"the chains have {first.num_steps} and {second.num_steps} steps"
    if not torch.equal(first.grid, second.grid):
        return "the chains' steps are at other log SNRs"
    return None


def evaluate_difference(
    first: Side,
    second: Side,
    levels: Tensor,
    prior_log_snrs: tuple[float, float],
    *,
    num_samples: int = 16,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    variance_reduction: bool = True,
    target_standard_error: float | None = None,
    max_model_evaluations: int | None = None,
    progress: Callable[[int], object] | None = None,
    runner: Runner = run_all,
) -> ComparisonReport:
    """The difference of two bounds, from `num_samples` evaluations of each network for every image.

    Two continuous-time bounds may have other ranges of log SNR: each counts within its own. Chains must have the same
    steps.

    Args:
        first, second: the models; their bounds are subtracted, first - second.
        prior_log_snrs: log SNR of each one's z_1.
        max_model_evaluations: of both networks together. The other arguments are those of `evaluate_bound`.
    Raises:
        ValueError: terms whose sites cannot be shared (`why_not_shared`), no images, levels outside the range, too few
            samples.
    """
    for side in (first, second):
        side.model.check(levels)
    if (reason := why_not_shared(first.term, second.term)) is not None:
        raise ValueError(f"the two bounds cannot share their evaluations: {reason}.")
    both = first.term
    if isinstance(first.term, ContinuousTerm) and isinstance(second.term, ContinuousTerm):
        both = ContinuousTerm(
            max(first.term.log_snr_max, second.term.log_snr_max), min(first.term.log_snr_min, second.term.log_snr_min)
        )
    count = len(levels)
    budget = Budget(target_standard_error, max_model_evaluations)
    budget.check(2 * num_samples * count, f"2 x {num_samples} x {count}")
    some = torch.linspace(0, count - 1, min(count, 4096), dtype=torch.float64).round().long()
    problem = Problem(
        sides=(first, second),
        levels=levels,
        term=_DifferenceTerm(first.term, second.term, both),
        controls=fit_controls(first.model, levels[some], both),
        variance_reduction=variance_reduction,
        batch_size=batch_size,
        seed=seed,
        device=torch.device(device),
        progress=progress,
        runner=runner,
        curve=LossCurve(),
    )
    prior = torch.zeros(count, dtype=torch.float64)
    reconstruction = torch.zeros(count, dtype=torch.float64)
    for sign, side, log_snr in zip((1, -1), (first, second), prior_log_snrs, strict=True):
        parts = [prior_kl(side.model.encode(part), log_snr) for part in levels.split(1024)]
        prior += sign * torch.cat(parts).double()
        if not isinstance(side.decoder, GaussianDecoder):
            reconstruction += sign * expected_reconstruction(side.model, side.decoder, levels)
    rounds, deciding = evaluate_rounds(problem, num_samples, budget)
    estimate = estimate_terms(problem, rounds, deciding)
    reconstruction += estimate.decoder
    scale = problem.num_dims * math.log(2) * count
    return ComparisonReport(
        nats=prior + estimate.diffusion + reconstruction,
        prior=prior,
        diffusion=estimate.diffusion,
        reconstruction=reconstruction,
        num_dims=problem.num_dims,
        standard_error=math.sqrt(estimate.variance) / scale,
        num_model_evaluations=2 * count * sum(r.nats.shape[1] for r in (*rounds, *deciding)),
        bands=_by_band(problem, rounds),
        is_paired=True,
    )


def _by_band(problem: Problem, rounds: list[EvaluationRound]) -> list[dict[str, float]]:
    """The difference of the diffusion terms in bands of log SNR: plain stratified averages, with the scatter of the
    replicates.
    """
    edges = octaves(rounds, _BAND)
    scale = problem.num_dims * math.log(2) * len(problem.levels)
    groups = int(problem.groups[-1]) + 1
    total = torch.zeros(len(edges) - 1, dtype=torch.float64)
    variance, columns = torch.zeros_like(total), sum(r.nats.shape[1] for r in rounds)
    for r in rounds:
        share = r.nats.shape[1] / columns
        sums = torch.zeros(groups, len(total), r.layout.num_replicates, dtype=torch.float64)
        for number in range(r.layout.num_replicates):
            mine = r.layout.replicate == number
            part = replace(r, layout=replace(r.layout, is_decoder=r.layout.is_decoder | ~mine))
            sums[:, :, number].index_add_(0, problem.groups, by_band(problem, [part], edges))
        total += share * sums.mean(2).sum(0)
        variance += share**2 * sums.var(2).sum(0) / r.layout.num_replicates
    rows = zip(edges[:-1].tolist(), edges[1:].tolist(), total.tolist(), variance.sqrt().tolist(), strict=True)
    return [
        {"log_snr_low": low, "log_snr_high": high, "difference": value / scale, "standard_error": error / scale}
        for low, high, value, error in rows
    ]
