"""From evaluations to an estimate and its error: control variates, cross-fitting, replicates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..control_variates import Surrogate, hat_weights
from .placement import Layout
from .reconstruction import GaussianDecoder
from .rounds import EvaluationRound, Problem
from .terms import Profile

_FITTED = 200_000  # evaluations that control variates are fitted to, at most
_KNOTS = 32  # of the functions of log SNR that are learned, at most


@dataclass(frozen=True, eq=False)
class _Estimate:
    diffusion: Tensor  # (N,) nats
    decoder: Tensor  # (N,) nats; zero if the decoder needs no network
    variance: float  # of the sum over the images, nats^2
    variances: Tensor  # (N,) of every image by itself, nats^2


def _folds(problem: Problem, layout: Layout) -> Tensor:
    """(N, n) of 0 and 1. Cross-fitting: the surrogate that is subtracted in fold f is fitted to fold 1 - f.

    The two folds have independent noise and shifts, so that the estimate stays unbiased.
    """
    groups = problem.groups
    if int(groups[-1]) > 0:
        return (groups % 2)[:, None].expand(-1, len(layout.replicate))
    return (layout.replicate % 2).expand(len(groups), -1)


def _records(
    problem: Problem, rounds: list[EvaluationRound], fold: int | None, of_decoder: bool
) -> tuple[Tensor, ...]:
    """Evaluations to fit to, those of a fold or all: log SNR, features, loss, its weight in the estimate."""
    parts = []
    for r in rounds:
        chosen = (r.layout.is_decoder == of_decoder).expand(r.nats.shape)
        if fold is not None:
            chosen = chosen & (_folds(problem, r.layout) == fold)
        if of_decoder:
            loss, weight = r.nats[chosen], torch.ones_like(r.nats[chosen])
        else:
            site = r.site[chosen]
            scale = problem.term.scale(site)
            loss = torch.where(
                scale > 0, (r.nats[chosen] - problem.term.constant(site, problem.num_dims)) / scale, 0.0
            )
            weight = scale * r.inverse_density[chosen]
        parts.append((r.log_snr[chosen], r.features[chosen], loss, weight, chosen.nonzero()[:, 0]))
    log_snr, features, loss, weight, image = (torch.cat(values) for values in zip(*parts, strict=True))
    if of_decoder:
        # one site for all: what an image's evaluations have in common is no business of the controls
        means = problem.controls.num_means
        features = torch.cat([torch.zeros_like(features[:, :means]), features[:, means:]], dim=1)
        both = torch.cat([loss[:, None], features], dim=1)
        sums = torch.zeros(len(problem.levels), both.shape[1], dtype=torch.float64).index_add_(0, image, both)
        both = both - (sums / image.bincount(minlength=len(sums)).clamp(min=1)[:, None])[image]
        loss, features = both[:, 0], both[:, 1:]
    keep = (weight > 0).nonzero()[:, 0]
    if len(keep) > _FITTED:
        keep = keep[torch.linspace(0, len(keep) - 1, _FITTED, dtype=torch.float64).round().long()]
    return log_snr[keep], features[keep], loss[keep], weight[keep]


def _fit(problem: Problem, rounds: list[EvaluationRound], fold: int | None, of_decoder: bool) -> Surrogate:
    """The surrogate fitted to one fold; of zeros if there is too little to fit to."""
    log_snr, features, loss, weight = _records(problem, rounds, fold, of_decoder)
    if len(loss) < 4 * problem.controls.num_features:
        return problem.no_surrogate
    number = 1 if of_decoder else max(1, min(_KNOTS, len(loss) // (6 * problem.controls.num_features)))
    knots = torch.linspace(float(log_snr.min()), float(log_snr.max()), number, dtype=torch.float64)
    if number > 1 and not bool((knots.diff() > 0).all()):
        knots = knots[:1]
    return Surrogate.fit(knots, log_snr, features, loss, (weight / weight.mean()) ** 2)


def learned_profile(problem: Problem, rounds: list[EvaluationRound]) -> Profile:
    """The standard deviation of what the surrogate leaves of the loss, against log SNR, and the decoder's part."""
    surrogates = [_fit(problem, rounds, 1 - fold, of_decoder=False) for fold in (0, 1)]
    parts = [_records(problem, rounds, fold, of_decoder=False) for fold in (0, 1)]
    log_snr = torch.cat([part[0] for part in parts])
    rest = torch.cat([loss - (s.at(ell) * f).sum(-1) for s, (ell, f, loss, _) in zip(surrogates, parts, strict=True)])
    number = max(2, min(_KNOTS, len(rest) // 32))
    knots = torch.linspace(float(log_snr.min()), float(log_snr.max()) + 1e-9, number, dtype=torch.float64)
    hats = hat_weights(knots, log_snr)
    overall = rest.square().mean()
    # two evaluations' worth of the overall mean keeps an empty neighbourhood finite
    values = torch.sqrt((hats.T @ rest.square() + 2e-3 * overall) / (hats.sum(0) + 2e-3)).clamp(min=1e-150)
    profile = Profile(knots, values)
    if not isinstance(problem.decoder, GaussianDecoder):
        return profile
    # the best shares are in proportion to the deviations of a single evaluation of either kind
    decoded = [
        loss - (_fit(problem, rounds, 1 - fold, of_decoder=True).at(ell) * f).sum(-1)
        for fold in (0, 1)
        for ell, f, loss, _ in [_records(problem, rounds, fold, of_decoder=True)]
    ]
    sd_decoder = float(torch.cat(decoded).square().mean().sqrt())
    site, weight = problem.term.quadrature(knots)
    contribution = weight * problem.term.scale(site) * profile.at(problem.term.log_snr(site))
    sd_diffusion = float(contribution.sum())
    return replace(profile, decoder_share=sd_decoder / max(sd_decoder + sd_diffusion, 1e-300))


def estimate_terms(
    problem: Problem, rounds: list[EvaluationRound], others: Sequence[EvaluationRound] = ()
) -> _Estimate:
    """What `rounds` together say of every image, and the variance of their sum.

    Surrogates are fitted to the `others` too.
    """
    num_dims = problem.num_dims
    surrogates = {
        (fold, own): _fit(problem, [*rounds, *others], 1 - fold, own)
        if problem.variance_reduction
        else problem.no_surrogate
        for fold in (0, 1)
        for own in ((False, True) if isinstance(problem.decoder, GaussianDecoder) else (False,))
    }
    known = torch.stack([_known_part(problem, surrogates[fold, False]) for fold in (0, 1)])  # (2, N)
    means, weights = [], []
    for r in rounds:
        fold = _folds(problem, r.layout)
        rest = torch.zeros_like(r.nats)
        first = torch.zeros_like(r.nats)  # the part of the integrand whose mean or integral is known
        for (f, own), surrogate in surrogates.items():
            chosen = (fold == f) & (r.layout.is_decoder == own)
            coefficients, features = surrogate.at(r.log_snr[chosen]), r.features[chosen]
            surrogate_loss = (coefficients * features).sum(-1)
            if own:
                rest[chosen] = r.nats[chosen] - surrogate_loss  # whose coefficients of means are zero
            else:
                site = r.site[chosen]
                reference = problem.term.constant(site, num_dims) + problem.term.scale(site) * surrogate_loss
                rest[chosen] = (r.nats[chosen] - reference) * r.inverse_density[chosen]
                first[chosen] = known[f][:, None].expand(r.nats.shape)[chosen]
        total = rest + first
        means.append(torch.stack([_replicate_means(total, r.layout, own) for own in (False, True)]))  # (2, N, R)
        # not by the inverse of a variance seen in the same losses: where these are skewed, a low mean comes with a low
        # variance
        weights.append(rest.shape[1])
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    diffusion, decoder = sum(w * m.mean(2) for w, m in zip(share, means, strict=True))
    variance, variances = 0.0, torch.zeros(len(problem.levels), dtype=torch.float64)
    for w, m in zip(share.tolist(), means, strict=True):
        sums = torch.zeros(int(problem.groups[-1]) + 1, m.shape[2], dtype=torch.float64)
        sums.index_add_(0, problem.groups, m.sum(0))
        variance += w**2 * float(sums.var(1).sum()) / m.shape[2]
        variances += w**2 * m.sum(0).var(1) / m.shape[2]
    return _Estimate(diffusion, decoder, variance, variances)


def by_band(problem: Problem, rounds: Sequence[EvaluationRound], edges: Tensor) -> Tensor:
    """(N, B) nats of the diffusion term by bands of log SNR between increasing `edges`: plain stratified averages for
    each image.
    """
    total = torch.zeros(len(problem.levels), len(edges) - 1, dtype=torch.float64)
    columns = sum(int((~r.layout.is_decoder).sum()) for r in rounds)
    for r in rounds:
        mine = ~r.layout.is_decoder
        band = torch.bucketize(r.log_snr[:, mine], edges, right=True).clamp(1, len(edges) - 1) - 1
        total.scatter_add_(1, band, r.nats[:, mine] * r.inverse_density[:, mine] / columns)
    return total


def octaves(rounds: Sequence[EvaluationRound], width: float) -> Tensor:
    """Edges at multiples of `width` that hold all log SNRs of the rounds."""
    parts = [r.log_snr[:, ~r.layout.is_decoder] for r in rounds]
    finite = torch.cat([p.flatten() for p in parts]).clamp(-40, 40)
    first, last = math.floor(float(finite.min()) / width), math.floor(float(finite.max()) / width) + 1
    return torch.arange(first, last + 1, dtype=torch.float64) * width


def _known_part(problem: Problem, surrogate: Surrogate) -> Tensor:
    """(N,) the sum or integral over all sites of the constant and of the surrogate's expectation."""
    term = problem.term
    site, weight = term.quadrature(torch.cat([surrogate.knots, problem.controls.jumps]))
    log_snr = term.log_snr(site)
    coefficients = (weight * term.scale(site))[:, None] * surrogate.at(log_snr)[:, : problem.controls.num_means]
    constant = (weight * term.constant(site, problem.num_dims)).sum()
    parts = torch.arange(len(problem.levels)).split(1024)
    sums = [problem.controls.known_sum(problem.encode(p), problem.levels[p], log_snr, coefficients) for p in parts]
    return constant + torch.cat(sums)


def _replicate_means(nats: Tensor, layout: Layout, of_decoder: bool) -> Tensor:
    """Means over the columns of each replicate: (N, n) -> (N, R); zero where the decoder has no columns."""
    chosen = layout.is_decoder == of_decoder
    member = (layout.replicate == torch.arange(layout.num_replicates)[:, None]) & chosen
    return nats @ (member / member.sum(1, keepdim=True).clamp(min=1)).double().T
