"""Models with a learned encoder, through the same door: their own bound, in passes over the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tqdm.auto import tqdm

from vdm_diffusers.evaluation.adapters import eval_mode
from vdm_diffusers.evaluation.images import load_images
from vdm_diffusers.evaluation.methods import ImportanceWeighted
from vdm_diffusers.latent_evaluation import evaluate_latent_likelihood
from vdm_diffusers.likelihood import LikelihoodReport
from vdm_diffusers.pipelines import LatentVDMPipeline


def evaluate_latent_model(
    model: Any,
    images: Any,
    method: Any,
    options: Mapping[str, Any],
    *,
    num_samples: int,
    batch_size: int | None,
    generator: torch.Generator | None,
    progress_bar: bool,
    target_standard_error: float | None,
    max_model_evaluations: int | None,
) -> LikelihoodReport:
    """The bound of a VAE, a hierarchical VAE or a VAE with a diffusion prior. Arguments as in `evaluate_likelihood`.

    Args:
        method: None, the evidence lower bound from `num_samples` passes; or "importance_weighted", the bound of half
            as many draws, twice.
        options: of other models: all must be None.
    Raises:
        ValueError: an option that means nothing here, a method that the model does not have, images that do not fit.
    """
    kind = type(model).__name__
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"`{name}` means nothing to a {kind}, whose bound is its own: leave it out.")
    weighted = method == "importance_weighted" or isinstance(method, ImportanceWeighted)
    if not (method is None or weighted):
        raise ValueError(
            f"`method` of a {kind} must be None, for its own bound, or 'importance_weighted', got {method!r}."
        )
    if isinstance(method, ImportanceWeighted):
        chosen = {"num_steps": method.num_steps, "grid": method.grid, "variance_type": method.variance_type}
        if wrong := [name for name, value in chosen.items() if value is not None]:
            raise ValueError(f"`{wrong[0]}` means nothing to a {kind}, which has no chain of steps: leave it out.")
    if weighted and not hasattr(model, "importance_weighted_bound"):
        raise ValueError(f"`method` 'importance_weighted' is none of a {kind}: take its own bound, with method=None.")
    levels, _ = load_images(images, None, model.config.num_levels)
    draws = num_samples // 2 if weighted else 1
    passes = 2 if weighted else num_samples
    modules = [model.vae, model.unet] if isinstance(model, LatentVDMPipeline) else [model]
    seed = 0 if generator is None else generator.initial_seed()
    with (
        eval_mode(modules[0]),
        eval_mode(modules[-1]),
        tqdm(total=passes * len(levels), disable=not progress_bar) as bar,
    ):
        return evaluate_latent_likelihood(
            model.bound,
            levels.to(modules[0].device),
            importance_weighted_bound=model.importance_weighted_bound if weighted else None,
            importance_samples=draws,
            num_repeats=passes,
            batch_size=batch_size or 256,
            seed=seed,
            target_standard_error=target_standard_error,
            max_model_evaluations=max_model_evaluations,
            progress=bar.update,
        )
