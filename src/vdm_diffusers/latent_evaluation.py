"""Bits/dim of latent variable models, in the report that diffusion models get: VAE, hierarchical VAE, VAE with a
diffusion prior.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .elbo import Bound
from .likelihood import LikelihoodReport
from .numerics import whole_number
from .repetitions import Budget, Runner, mix_seed, repeat, run_all


class BoundTerms(Protocol):
    """What a model's `bound` returns: the estimate and its three terms, all (B,) in nats."""

    @property
    def nats(self) -> Tensor: ...

    @property
    def terms(self) -> Bound: ...


def evaluate_latent_likelihood(
    bound: Callable[..., BoundTerms],
    levels: Tensor,
    *,
    importance_weighted_bound: Callable[..., Tensor] | None = None,
    importance_samples: int = 1,
    num_repeats: int = 16,
    batch_size: int = 256,
    seed: int = 0,
    target_standard_error: float | None = None,
    max_model_evaluations: int | None = None,
    progress: Callable[[int], object] | None = None,
    runner: Runner = run_all,
) -> LikelihoodReport:
    """The bound on -ln p of integer images, averaged over `num_repeats` independent passes, whose scatter is its
    error.

    Arguments:
        bound: a model's own, called as `bound(levels, generator=...)`, for instance `VariationalAutoencoder.bound`.
        levels: (N, C, ...) integers.
        importance_weighted_bound, importance_samples: instead of the ELBO the tighter bound of that many samples,
            called as `importance_weighted_bound(levels, importance_samples, generator=...)`.
        num_repeats: passes over the images, at least 2.
        batch_size: images at a time. (Models that stratify their times do so over a batch, which changes the error a
            little.)
        seed: of the noise.
        target_standard_error, max_model_evaluations: see `evaluate_likelihood`.
        progress: called with the number of images done, after every batch.
        runner: see `vdm_diffusers.repetitions`.
    Returns:
        `LikelihoodReport` with the method "elbo" or "importance_weighted"; the latter has no terms.
    Raises:
        ValueError: no images, fewer than two repeats, or a bound that is not finite.
    """
    if len(levels) == 0:
        raise ValueError("`levels` holds no image.")
    if levels.is_floating_point() or levels.dtype == torch.bool:
        raise ValueError(f"`levels` must be integers, got {levels.dtype}: likelihoods are of integers, not of floats.")
    for name, value in (("importance_samples", importance_samples), ("batch_size", batch_size)):
        if whole_number(name, value) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if num_repeats < 2:
        raise ValueError(f"`num_repeats` must be at least 2 for an error bar, got {num_repeats}.")
    num_dims = levels[0].numel()

    def draw(images: Tensor, repetitions: Tensor) -> Tensor:
        parts = []
        for repetition in repetitions.unique().tolist():
            rows = images[repetitions == repetition]
            generator = torch.Generator().manual_seed(mix_seed(seed, "pass", repetition, int(rows[0])))
            if importance_weighted_bound is None:
                found = bound(levels[rows], generator=generator)
                values = [found.nats, found.terms.prior, found.terms.diffusion, found.terms.reconstruction]
            else:
                values = [importance_weighted_bound(levels[rows], importance_samples, generator=generator)]
            evaluations = torch.full((len(rows),), importance_samples)
            parts.append(torch.stack([evaluations.double(), *(value.double().cpu() for value in values)]))
            if progress is not None:
                progress(len(rows))
        return torch.cat(parts, dim=1)

    with torch.no_grad():
        found = repeat(
            draw,
            len(levels),
            num_dims,
            num_repeats,
            batch_size=batch_size,
            budget=Budget(target_standard_error, max_model_evaluations),
            cost=importance_samples,
            runner=runner,
            separate_images=False,
        )
    nats, *terms = found.values
    if not bool(nats.isfinite().all()):
        raise ValueError("the bound is not finite: a diverged training, or levels that the model was not trained on.")
    settings: dict[str, Any] = {"num_repeats": found.number, "seed": seed}
    if importance_weighted_bound is not None:
        settings["importance_samples"] = importance_samples
    elbo = importance_weighted_bound is None
    return LikelihoodReport(
        method="elbo" if elbo else "importance_weighted",
        nats=nats,
        prior=terms[0] if elbo else None,
        diffusion=terms[1] if elbo else None,
        reconstruction=terms[2] if elbo else None,
        num_dims=num_dims,
        standard_error=found.standard_error,
        is_bound=True,
        num_model_evaluations=found.num_model_evaluations,
        settings=settings,
    )
