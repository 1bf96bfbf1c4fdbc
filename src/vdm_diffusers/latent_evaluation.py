"""Bits/dim of latent variable models, in the report that diffusion models get: VAE, hierarchical VAE, VAE with a diffusion prior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .elbo import Bound, bits_per_dim
from .likelihood import LikelihoodReport


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
    progress: Callable[[int], object] | None = None,
) -> LikelihoodReport:
    """The bound on -ln p of integer images, averaged over `num_repeats` independent passes, whose scatter is its error.

    Arguments:
        bound: a model's own, called as `bound(levels, generator=...)`, for instance `VariationalAutoencoder.bound`.
        levels: (N, C, ...) integers.
        importance_weighted_bound, importance_samples: instead of the ELBO the tighter bound of that many samples, called as
            `importance_weighted_bound(levels, importance_samples, generator=...)`.
        num_repeats: passes over the images, at least 2.
        batch_size: images at a time. (Models that stratify their times do so over a batch, which changes the error a little.)
        seed: of the noise.
        progress: called with the number of images done, after every batch.
    Returns:
        `LikelihoodReport` with the method "elbo" or "importance_weighted"; the latter has no terms.
    Raises:
        ValueError: no images, fewer than two repeats, or a bound that is not finite.
    """
    if len(levels) == 0:
        raise ValueError("`levels` holds no image.")
    if num_repeats < 2:
        raise ValueError(f"`num_repeats` must be at least 2 for an error bar, got {num_repeats}.")
    num_dims = levels[0].numel()
    totals: list[Tensor] = []
    terms = torch.zeros(3, len(levels), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(num_repeats):
            parts = []
            for start, batch in enumerate(levels.split(batch_size)):
                rows = slice(start * batch_size, start * batch_size + len(batch))
                if importance_weighted_bound is None:
                    found = bound(batch, generator=generator)
                    parts.append(found.nats.double().cpu())
                    three = (found.terms.prior, found.terms.diffusion, found.terms.reconstruction)
                    terms[:, rows] += torch.stack([term.double().cpu() for term in three]) / num_repeats
                else:
                    parts.append(
                        importance_weighted_bound(batch, importance_samples, generator=generator).double().cpu()
                    )
                if progress is not None:
                    progress(len(batch))
            totals.append(torch.cat(parts))
    nats = torch.stack(totals)
    if not bool(nats.isfinite().all()):
        raise ValueError("the bound is not finite: a diverged training, or levels that the model was not trained on.")
    settings: dict[str, Any] = {"num_repeats": num_repeats, "seed": seed}
    if importance_weighted_bound is not None:
        settings["importance_samples"] = importance_samples
    error = bits_per_dim(nats.mean(1).std() / num_repeats**0.5, num_dims)
    elbo = importance_weighted_bound is None
    return LikelihoodReport(
        method="elbo" if elbo else "importance_weighted",
        nats=nats.mean(0),
        prior=terms[0] if elbo else None,
        diffusion=terms[1] if elbo else None,
        reconstruction=terms[2] if elbo else None,
        num_dims=num_dims,
        standard_error=float(error),
        is_bound=True,
        num_model_evaluations=num_repeats * importance_samples,
        settings=settings,
    )
