"""Which class fits an image, and how much a label says about it: bounds of one network under several labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vdm_diffusers.evaluation.adapters import Predictor, eval_mode
from vdm_diffusers.evaluation.candidates import Candidate, Space, components_need_space
from vdm_diffusers.evaluation.comparison import compare_likelihood
from vdm_diffusers.evaluation.images import load_labels
from vdm_diffusers.evaluation.latent_space import in_latent_space, is_latent_pipeline
from vdm_diffusers.evaluation.methods import Continuous, Discrete, EstimationMethod, Method
from vdm_diffusers.evaluation.sharing import draw_seed
from vdm_diffusers.likelihood.classification import ClassificationReport, evaluate_classes
from vdm_diffusers.likelihood.rounds import Side
from vdm_diffusers.models.labels import default_label, null_label, num_classes
from vdm_diffusers.numerics import as_generator, whole_number


def classify(
    model: Any,
    images: Any,
    class_labels: Sequence[int] | Tensor | None = None,
    *,
    prompts: Sequence[str] | None = None,
    space: Space | None = None,
    scheduler: Any = None,
    prior: Sequence[float] | Tensor | None = None,
    method: Method | EstimationMethod | None = None,
    num_samples: int = 8,
    drop_unlikely: bool = True,
    learn_density: bool = True,
    num_levels: int | str | None = "auto",
    pixel_encoding: str = "auto",
    batch_size: int | None = None,
    generator: torch.Generator | int | None = None,
    progress_bar: bool = True,
    num_steps: int | None = None,
    grid: Any = None,
) -> ClassificationReport:
    r"""The posterior probability of each class for each image, p(k | x) proportional to prior_k p(x | k), with errors.

    p(x | k) is the network's bound under class k. All classes see the same noisy images, so that what they have in
    common cancels.

    Args:
        model, images, scheduler, method, num_levels, pixel_encoding, batch_size, generator, progress_bar, num_steps,
            grid: as of `evaluate_likelihood`, for a class-conditional network. Of the methods the two that estimate
                the plain bound are possible.
        class_labels: the K labels to choose among. Default: all that stand for a class, without the one for "no
            class".
        prompts, space: for a text-to-image pipeline: the K prompts to choose among, and space="latent" where it is one
            of latents.
        prior: (K,) positive weights of the classes, which need not sum to one. Default: all alike.
        num_samples: evaluations of the network for each image and class. More make the errors smaller.
        drop_unlikely: leave classes out of later rounds that are more than 7 nats and 4 errors behind the best one.
            `report.num_evaluations` says how many evaluations each class got.
        learn_density: place later evaluations at the log SNRs where the classes were seen to differ.

    Returns:
        [`ClassificationReport`]: `predictions`, `probabilities`, `log_odds` and `log_odds_error`.

    Raises:
        ValueError: a network without classes, labels that it does not have, fewer than two of them, a prior that does
            not fit.

    Example:
    ```py
    >>> report = classify(pipe, images)
    >>> print(report.predictions, report.probabilities.max(1).values)
    ```

    Source: Li et al. 2023, "Your diffusion model is secretly a zero-shot classifier", equation 5.
    """
    if isinstance(model, (str,)):
        raise ValueError("`model` must be a pipeline or a network: load the checkpoint first, load_model(path).")
    generator = as_generator(generator)
    assert not isinstance(generator, int)
    num_samples = whole_number("num_samples", num_samples) or 0
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
    common: dict[str, Any] = {
        "method": method,
        "options": {"num_steps": num_steps, "grid": grid},
        "batch_size": batch_size,
    }
    if prompts is not None or space == "latent":
        candidate, by_class, classes = _by_prompt(model, images, prompts, class_labels, space, common)
    else:
        common |= {"scheduler": scheduler, "num_levels": num_levels, "pixel_encoding": pixel_encoding}
        candidate, by_class, classes = _by_label(model, images, class_labels, common)
    log_prior = _log_prior(prior, len(classes))
    if candidate.term is None or not isinstance(candidate.way, Continuous | Discrete):
        raise ValueError(f"`method` must be 'continuous' or 'discrete', got {candidate.way.name!r}.")
    side = Side(replace(candidate.denoiser, predict=by_class), candidate.term, candidate.decoder)
    total = len(candidate.levels) * len(classes) * num_samples
    with eval_mode(candidate.network), torch.no_grad(), tqdm(total=total, disable=not progress_bar) as bar:
        log_odds, error, spent = evaluate_classes(
            side,
            candidate.levels,
            len(classes),
            log_prior,
            num_samples=num_samples,
            batch_size=candidate.batch_size,
            seed=draw_seed(generator),
            device=candidate.device,
            drop_unlikely=drop_unlikely,
            learn_density=learn_density,
            progress=bar.update,
        )
    settings = candidate.settings(num_samples) | {"method": candidate.way.name, "drop_unlikely": drop_unlikely}
    return ClassificationReport(log_odds, error, spent, classes, settings)


@dataclass(frozen=True, eq=False)
class MutualInformationReport:
    """How much a label says about its image, ln p(x | y) - ln p(x), in bits.

    Attributes:
        bits: (N,) of every image, the pointwise mutual information.
        standard_error: bits, of the estimator of `mean` for these images.
        sampling_error: bits, std / sqrt(N) between the images; NaN for one.
        num_model_evaluations: in all.
    """

    bits: Tensor
    standard_error: float
    sampling_error: float
    num_model_evaluations: int

    @property
    def mean(self) -> float:
        """The mean over the images in bits; over images and labels that belong together it is the mutual
        information.
        """
        return float(self.bits.mean())

    def __str__(self) -> str:
        return (
            f"{self.mean:.3f} bits an image: +- {self.standard_error:.3f} (estimator) +- {self.sampling_error:.3f} "
            "(images), "
            f"{len(self.bits)} images"
        )


def mutual_information(
    model: Any, images: Any, class_labels: Any = None, *, without: int | None = None, **options: Any
) -> MutualInformationReport:
    r"""How many bits a label says about its image: log2 p(x | y) - log2 p(x), both bounds by the same network.

    p(x) is the network's bound under the label "no class", which it must have been trained with (`--class_dropout`).
    The two share all noise, so that the difference has a small error.

    Args:
        model, images: as of `evaluate_likelihood`.
        class_labels: of the images, y.
        without: the label that means "no class". Default: the network's own.
        options: further arguments of `compare_likelihood`.

    Raises:
        ValueError: a network without a label for "no class", no labels, or what `compare_likelihood` refuses.

    Source: Kong et al. 2024, "Interpretable diffusion via information decomposition", equation 4.
    """
    network = getattr(model, "unet", model)
    if without is None:
        without = null_label(network)
        without = default_label(network) if without is None else without
    if without is None:
        raise ValueError(
            "`model` has no label for 'no class', which p(x) needs: train it with --class_dropout, or say which one "
            "it is, `without`."
        )
    report = compare_likelihood(
        model, model, images, a_options={"class_labels": without}, b_options={"class_labels": class_labels}, **options
    )
    to_bits = report.num_dims  # errors are given for each dimension
    return MutualInformationReport(
        report.nats / math.log(2),
        report.standard_error * to_bits,
        report.sampling_error * to_bits,
        report.num_model_evaluations,
    )


def _by_label(
    model: Any, images: Any, class_labels: Any, common: dict[str, Any]
) -> tuple[Candidate, Predictor, list[Any]]:
    """A class-conditional network, and the same called with the number of a class."""
    labels = _labels_to_compare(getattr(model, "unet", model), class_labels)
    candidate = Candidate.of(model, images, class_labels=int(labels[0]), **common)
    by_class = Predictor(candidate.network, candidate.chain, candidate.device, labels, {}, len(labels))
    return candidate, by_class, labels.tolist()


def _by_prompt(
    model: Any, images: Any, prompts: Any, class_labels: Any, space: Space | None, common: dict[str, Any]
) -> tuple[Candidate, Predictor, list[Any]]:
    """A pipeline that is told a prompt (or a class), and its network called with the number of one."""
    told = prompts if prompts is not None else class_labels
    if not is_latent_pipeline(model) or components_need_space(model, space):
        raise ValueError(
            "`prompts` and space='latent' are for pipelines that are told a prompt or work on latents, got a "
            f"{type(model).__name__}"
            + (", which is one of latents: pass space='latent'." if is_latent_pipeline(model) else ".")
        )
    told = told.tolist() if isinstance(told, Tensor) else told
    if told is None or isinstance(told, (str, int)) or len(told) < 2 or len(set(told)) < len(told):
        raise ValueError(f"`prompts` (or `class_labels`) must be two or more different ones, got {told!r}.")
    which: dict[str, Any] = {"prompts" if prompts is not None else "class_labels": list(told)}
    task = in_latent_space(model, images, one_for_each=False, **which)
    first = {name: rows[:1] for name, rows in task.kept.items()}
    data = task.latents if task.levels is None else task.levels
    candidate = Candidate.of(task.network, data, scheduler=task.scheduler, model_kwargs=first, **task.data, **common)
    by_class = Predictor(candidate.network, candidate.chain, candidate.device, None, task.kept, len(told))
    return candidate, by_class, list(told)


def _labels_to_compare(network: Any, class_labels: Sequence[int] | Tensor | None) -> Tensor:
    classes, null = num_classes(network), null_label(network)
    if class_labels is None:
        if classes is None:
            raise ValueError(
                "`model` has no classes to choose among; pass `class_labels` for a callable that takes them."
            )
        class_labels = [k for k in range(classes) if k != null]
    labels = torch.as_tensor(class_labels)
    if labels.ndim != 1 or len(labels) < 2 or len(labels.unique()) < len(labels):
        raise ValueError(f"`class_labels` must be two or more different labels, got {labels.tolist()}.")
    loaded = load_labels(network, labels, len(labels))
    assert loaded is not None
    return loaded


def _log_prior(prior: Sequence[float] | Tensor | None, classes: int) -> Tensor:
    weights = torch.ones(classes, dtype=torch.float64) if prior is None else torch.as_tensor(prior).double()
    if weights.shape != (classes,) or not bool((weights > 0).all()):
        raise ValueError(f"`prior` must be {classes} positive numbers, one for each class, got {weights.tolist()}.")
    return (weights / weights.sum()).log()
