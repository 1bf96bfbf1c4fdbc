"""The evidence lower bound of integer images: prior, diffusion term and reconstruction term."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..elbo import prior_kl
from ..repetitions import Budget, Runner, run_all
from .denoising_model import DenoisingModel
from .estimate import by_band, estimate_terms, learned_profile, octaves
from .placement import fewest_samples, round_sizes
from .reconstruction import Decoder, GaussianDecoder, expected_reconstruction
from .report import LikelihoodReport, LossCurve
from .rounds import EvaluationRound, Problem, Side, evaluate_round, fit_controls
from .terms import DiffusionTerm, DiscreteTerm

OCTAVE = 2 * math.log(2)  # of alpha / sigma, in log SNR
_LEAST_FREEDOM = 24  # degrees of freedom of an error that decides how many evaluations follow


def evaluate_bound(
    model: DenoisingModel,
    levels: Tensor,
    term: DiffusionTerm,
    decoder: Decoder,
    prior_log_snr: float,
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
) -> LikelihoodReport:
    """The bound for integer images from `num_samples` evaluations of the network for each, stratified.

    The steps of a `DiscreteTerm` are strata too: they are drawn in proportion to what they add to the error, and not
    each once.

    A first round of evaluations (an eighth of them, if there are enough) is placed by a fixed density, and shows where
    the rest is worth most: at log SNRs in proportion to the standard deviation of what is to be averaged. Control
    variates (`control_variates`) are fitted to all evaluations, for each half of the images on the other half
    (cross-fitting), so that the estimate stays unbiased.

    Arguments:
        levels: (N, C, ...) integers 0..num_levels-1, on the CPU.
        term: `ContinuousTerm` or `DiscreteTerm`: the diffusion term that is estimated.
        decoder: `SoftmaxDecoder` (at z_0) or `GaussianDecoder` (at x_1, with a part of the evaluations).
        prior_log_snr: log SNR of z_1.
        num_samples: evaluations of the network for an image.
        batch_size: evaluations at a time. The result does not depend on it (but for rounding in the network).
        seed: of the noise and the shifts. Every image has noise of its own, whatever its place in a batch.
        variance_reduction: use importance sampling, stratified noise and control variates; False leaves the plain
            average over the lattices.
        target_standard_error: bits/dim; go on with further rounds until the estimate's error should be at most this.
            Independent evaluations decide it, the first `num_samples` and later an eighth, and are left out of the
            estimate, which is therefore unbiased. The error that is reported is the estimate's own, and may come out a
            little above the target.
        max_model_evaluations: stop before more than these, reached or not. `num_samples` for each image come first.
        progress: called with the number of evaluations done, after every batch.
        runner: see `Runner`.
    Raises:
        ValueError: no images, too few samples, levels outside the range, a network whose output does not fit.
    """
    model.check(levels)
    count = len(levels)
    budget = Budget(target_standard_error, max_model_evaluations)
    budget.check(num_samples * count, f"{num_samples} x {count}")
    some = torch.linspace(0, count - 1, min(count, 4096), dtype=torch.float64).round().long()
    problem = Problem(
        sides=(Side(model, term, decoder),),
        levels=levels,
        term=term,
        controls=fit_controls(model, levels[some], term),
        variance_reduction=variance_reduction,
        batch_size=batch_size,
        seed=seed,
        device=torch.device(device),
        progress=progress,
        runner=runner,
        curve=LossCurve(),
    )
    # Prior term: the divergence of q(z_1 | x) from N(0, I), in closed form.
    prior = torch.cat(
        [prior_kl(problem.encode(part), prior_log_snr) for part in torch.arange(count).split(1024)]
    ).double()

    # Diffusion term: the network's squared errors, weighted, by Monte Carlo.
    rounds, deciding = evaluate_rounds(problem, num_samples, budget)
    estimate = estimate_terms(problem, rounds, deciding)
    diffusion = estimate.diffusion

    # Reconstruction term: by quadrature, but for DDPM's decoder, which needs the network and took part in the rounds.
    if isinstance(decoder, GaussianDecoder):
        reconstruction = estimate.decoder
    else:
        reconstruction = expected_reconstruction(model, decoder, levels)

    return LikelihoodReport(
        method="discrete" if isinstance(term, DiscreteTerm) else "continuous",
        nats=prior + diffusion + reconstruction,
        prior=prior,
        diffusion=diffusion,
        reconstruction=reconstruction,
        num_dims=problem.num_dims,
        standard_error=math.sqrt(estimate.variance) / (problem.num_dims * math.log(2) * count),
        is_bound=True,
        num_model_evaluations=count * sum(r.nats.shape[1] for r in (*rounds, *deciding)),
        loss_curve=problem.curve.to_dict(problem.num_dims),
        nats_error=estimate.variances.sqrt(),
        log_snr_edges=(edges := octaves(rounds, OCTAVE)),
        nats_by_log_snr=by_band(problem, rounds, edges),
    )


def evaluate_rounds(
    problem: Problem, num_samples: int, budget: Budget
) -> tuple[list[EvaluationRound], list[EvaluationRound]]:
    """The rounds that are reported, and those that decided how many they are; the latter only where a target is asked
    for.

    Losses are skewed: where an estimate happens to be low its error is low too. Going on until the error of an
    estimate is small therefore stops at low estimates. So independent rounds, the first ones and later an eighth, say
    what an evaluation is worth.
    """
    count, decoder = len(problem.levels), problem.decoder
    scale = problem.num_dims * math.log(2) * count
    least = 2 * fewest_samples(decoder)
    rounds: list[EvaluationRound] = []
    deciding: list[EvaluationRound] = []
    profile = None

    def evaluate(size: int, into: list[EvaluationRound]) -> None:
        nonlocal profile
        into.append(evaluate_round(problem, size, profile, [*deciding, *rounds]))
        if problem.variance_reduction:
            profile = learned_profile(problem, [*deciding, *rounds])

    for size in round_sizes(count, num_samples, decoder, problem.variance_reduction):
        evaluate(size, deciding)
    if budget.target_standard_error is None:
        return deciding, []
    groups = int(problem.groups[-1]) + 1
    while True:
        done, decided = (sum(r.nats.shape[1] for r in part) for part in (rounds, deciding))
        freedom = groups * sum(r.layout.num_replicates - 1 for r in deciding)
        if freedom < _LEAST_FREEDOM or decided < done // 8:
            size, into = max(8 * least, (done // 8 - decided) // least * least), deciding
        else:
            variance = estimate_terms(problem, deciding, rounds).variance * decided
            size = budget.next_round(math.sqrt(variance) / scale, done, max(done, decided), least)
            into = rounds
        room = budget.room(count * len(problem.sides), done + decided) // least * least
        if size > 0 and room > 0:
            evaluate(min(size, room), into)
        if (
            size == 0 or size >= room
        ):  # the target, or the limit; by which the part is reported that has more evaluations
            done, decided = (sum(r.nats.shape[1] for r in part) for part in (rounds, deciding))
            return (rounds, deciding) if size == 0 or done >= decided else (deciding, rounds)
