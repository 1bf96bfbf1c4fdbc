"""How much better one model finds images than another: the difference of two likelihoods, with a small error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from vdm_diffusers.evaluation.adapters import eval_mode
from vdm_diffusers.evaluation.candidates import Candidate
from vdm_diffusers.evaluation.images import read_once
from vdm_diffusers.evaluation.likelihood import evaluate_likelihood
from vdm_diffusers.evaluation.methods import Continuous, Discrete, EstimationMethod, Method
from vdm_diffusers.evaluation.sharing import rank_and_size, resume_folder, run_shared, shared_seed
from vdm_diffusers.likelihood import LikelihoodReport
from vdm_diffusers.likelihood.comparison import ComparisonReport, evaluate_difference, why_not_shared
from vdm_diffusers.likelihood.rounds import Side
from vdm_diffusers.loading import load_model
from vdm_diffusers.models import HierarchicalVAE, VariationalAutoencoder
from vdm_diffusers.numerics import as_generator, whole_number
from vdm_diffusers.pipelines import LatentVDMPipeline

OF_A_SIDE = (
    "scheduler",
    "class_labels",
    "model_kwargs",
    "num_levels",
    "pixel_encoding",
    "clip_denoised",
    "prompts",
    "space",
)
_OF_THE_METHOD = ("num_steps", "grid", "variance_type", "variance_reduction")


def compare_likelihood(
    a: Any,
    b: Any,
    images: Any,
    *,
    a_options: Mapping[str, Any] | None = None,
    b_options: Mapping[str, Any] | None = None,
    method: Method | EstimationMethod | None = None,
    num_samples: int = 16,
    batch_size: int | None = None,
    generator: torch.Generator | int | None = None,
    progress_bar: bool = True,
    target_standard_error: float | None = None,
    max_model_evaluations: int | None = None,
    resume_dir: str | Path | None = None,
    accelerator: Any = None,
    **options: Any,
) -> ComparisonReport:
    r"""The difference of two models' bits/dim on the same images, a - b, with its error. Negative: `a` is better.

    Both networks see the same images at the same noise levels with the same noise, so that what they have in common
    cancels. For two checkpoints of one run this takes hundreds of times fewer evaluations than two figures of the same
    accuracy.

    Not everything can be shared: chains of different steps, a bound in continuous time beside a chain's, VAEs. Then
    two separate figures are subtracted; `report.is_paired` is False, and `report.settings["not_paired"]` says why.

    Args:
        a, b: what `evaluate_likelihood` takes, or the folder or Hub repository of a checkpoint. They may be one and
            the same network with two labels: `a_options={"class_labels": 3}, b_options={"class_labels": 5}`.
        images: as of `evaluate_likelihood`. Both models must take them.
        a_options, b_options: arguments of one side alone: `scheduler`, `class_labels`, `model_kwargs`, `num_levels`,
            `pixel_encoding`, `clip_denoised`, `prompts`, `space`. Two prompts for one pipeline: which fits the images
            better.
        method: `"continuous"`, `"discrete"`, or an object; by default each model's own, which must be the same for a
            paired difference.
        num_samples: evaluations of each network for an image.
        target_standard_error: bits/dim, of the difference; go on until `standard_error` should be at most this.
        max_model_evaluations: of both networks together.
        options: further arguments of `evaluate_likelihood` for both sides: those named above, `num_steps`, `grid`,
            `variance_type`, `variance_reduction`. The other arguments are those of `evaluate_likelihood`.

    Returns:
        [`ComparisonReport`]: `difference`, `standard_error`, `sampling_error`, `share_better`, `nats` for each image,
        and `bands`, the difference by log SNR.

    Raises:
        ValueError: images that one of the models does not take, models of different data shape or levels, an unknown
            option, a method without a bound.

    Example:
    ```py
    >>> report = compare_likelihood("outputs/run/checkpoint-2000", "outputs/run/checkpoint-1000", images)
    >>> print(report.difference, report.standard_error)
    ```
    """
    for name, given in (("a_options", a_options), ("b_options", b_options), ("options", options)):
        allowed = OF_A_SIDE if name != "options" else (*OF_A_SIDE, *_OF_THE_METHOD)
        if unknown := [key for key in given or {} if key not in allowed]:
            raise ValueError(f"`{name}` holds {unknown[0]!r}, which is none of {', '.join(allowed)}.")
    generator = as_generator(generator)
    assert not isinstance(generator, int)
    num_samples = whole_number("num_samples", num_samples) or 16
    seed = 0 if generator is None and resume_dir is not None else shared_seed(generator, accelerator)
    models = [load_model(os.fspath(m)) if isinstance(m, (str, os.PathLike)) else m for m in (a, b)]
    images = read_once(images)
    of_method = {name: options.pop(name, None) for name in _OF_THE_METHOD}
    sides = [options | dict(own or {}) for own in (a_options, b_options)]
    common: dict[str, Any] = {"method": method, "batch_size": batch_size}
    limits: dict[str, Any] = {
        "num_samples": num_samples,
        "target_standard_error": target_standard_error,
        "max_model_evaluations": max_model_evaluations,
    }
    separately = partial(
        _separately,
        models,
        images,
        sides,
        common | of_method | {"progress_bar": progress_bar, "resume_dir": resume_dir, "accelerator": accelerator},
        limits,
        seed,
    )
    latent = (LatentVDMPipeline, VariationalAutoencoder, HierarchicalVAE)
    if kinds := [type(m).__name__ for m in models if isinstance(m, latent)]:
        return separately(f"a {kinds[0]} draws its latents itself")
    first, second = (
        Candidate.of(m, images, options=of_method, **common, **own) for m, own in zip(models, sides, strict=True)
    )
    for candidate in (first, second):
        if not isinstance(candidate.way, Continuous | Discrete):
            raise ValueError(
                f"`method` {candidate.way.name!r} has no terms that two models could share: take 'continuous' or "
                "'discrete'."
            )
    _check_alike(first, second)
    assert first.term is not None and second.term is not None
    if (reason := why_not_shared(first.term, second.term)) is not None:
        return separately(reason)
    settings = {"a": first.settings(num_samples), "b": second.settings(num_samples), "method": first.way.name}
    folder = None
    if resume_dir is not None:
        identity = [
            settings | {"batch_size": first.batch_size, "seed": seed, "side": name} for name in ("first", "second")
        ]
        names = [
            resume_folder(Path(), c.network, c.denoiser, c.levels, i, c.term, c.decoder).name
            for c, i in zip((first, second), identity, strict=True)
        ]
        folder = Path(resume_dir) / f"{names[0][:12]}{names[1][:12]}"
    quiet = not progress_bar or rank_and_size(accelerator)[0] > 0
    with ExitStack() as stack:
        for candidate in (first, second):
            stack.enter_context(eval_mode(candidate.network))
        stack.enter_context(torch.no_grad())
        bar = stack.enter_context(tqdm(total=2 * len(first.levels) * num_samples, disable=quiet))
        report = evaluate_difference(
            Side(first.denoiser, first.term, first.decoder),
            Side(second.denoiser, second.term, second.decoder),
            first.levels,
            (first.prior_log_snr, second.prior_log_snr),
            batch_size=min(first.batch_size, second.batch_size),
            seed=seed,
            device=first.device,
            variance_reduction=getattr(first.way, "variance_reduction", True),
            progress=bar.update,
            runner=partial(run_shared, folder, accelerator),
            **limits,
        )
    report.settings.update(settings)
    return report


def _check_alike(first: Candidate, second: Candidate) -> None:
    """Raise ValueError for models whose figures cannot be subtracted."""
    levels = [c.denoiser.num_levels for c in (first, second)]
    if levels[0] != levels[1]:
        raise ValueError(
            f"`a` and `b` are models of {levels[0]} and {levels[1]} levels: their bits are not of the same data."
        )
    if first.device != second.device:
        raise ValueError(f"`a` is on {first.device}, `b` on {second.device}: put both on one device.")


def _separately(
    models: list[Any],
    images: Any,
    sides: list[dict[str, Any]],
    common: dict[str, Any],
    limits: dict[str, Any],
    seed: int,
    reason: str,
) -> ComparisonReport:
    """The difference of two figures by themselves, where nothing can be shared."""
    reports: list[LikelihoodReport] = []
    for number, (model, own) in enumerate(zip(models, sides, strict=True)):
        generator = torch.Generator().manual_seed(seed + number)
        given = {name: value for name, value in (common | own).items() if value is not None}
        budget = dict(limits)
        if budget["target_standard_error"] is not None:
            budget["target_standard_error"] /= 2**0.5
        if budget["max_model_evaluations"] is not None:
            budget["max_model_evaluations"] //= 2
        reports.append(evaluate_likelihood(model, images, generator=generator, **given, **budget))
    first, second = reports
    terms = {
        name: None if None in (x := getattr(first, name), y := getattr(second, name)) else x - y
        for name in ("prior", "diffusion", "reconstruction")
    }
    return ComparisonReport(
        nats=first.nats - second.nats,
        num_dims=first.num_dims,
        standard_error=(first.standard_error**2 + second.standard_error**2) ** 0.5,
        num_model_evaluations=first.num_model_evaluations + second.num_model_evaluations,
        bands=[],
        is_paired=False,
        settings={"a": first.settings, "b": second.settings, "not_paired": reason},
        **terms,
    )
