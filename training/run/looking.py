"""What is looked at while training: the held-out bits/dim, what changed, samples."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from arguments import ARGUMENTS_FILE
from changes import one_line as one_line_of_changes
from checkpoints import (
    atomic_folder,
    explained_failure,
    without_nan,
    write_json,
)
from diffusers.models.modeling_utils import ModelMixin
from evaluating import TERMS, bits_per_dim, combined_error, draw_samples
from latent_models import (
    latent_bits_per_dim,
    latent_pictures,
    latent_samples,
)
from plots import image_grid
from tqdm.auto import tqdm

from .constants import (
    BEST_FOLDER,
    SAMPLES_FOLDER,
)

if TYPE_CHECKING:
    from train import Training


def evaluate(training: Training) -> None:
    """Bits/dim of the held-out images with the averaged weights."""
    averaged = training.whole_average().eval()
    common: dict[str, Any] = {
        "seed": training.args.optimization.seed,
        "num_samples": training.args.run.eval_num_samples,
        "batch_size": training.args.run.eval_batch_size,
    }
    evaluator: Any = latent_bits_per_dim if training.is_latent else bits_per_dim
    result = evaluator(
        training.pipeline(averaged),
        training.eval_images,
        process_index=training.accelerator.process_index,
        num_processes=training.accelerator.num_processes,
        **common,
    )
    training.network.train()
    training.last_evaluation = result
    if training.changes is not None:
        found = training.changes.measure(averaged, training.pipeline, training.eval_images)
        training.network.train()
        result |= found
    training.log.write(training.step, {f"eval/{name}": value for name, value in result.items()})
    error = combined_error([result["standard_error"], result["sampling_error"]])
    terms = ", ".join(f"{term} {result[term]:.3f}" for term in TERMS if term in result)
    if training.accelerator.is_local_main_process:
        tqdm.write(f"step {training.step}: {training.figure} {result['bits_per_dim']:.3f} +- {error:.3f} ({terms})")
        if training.changes is not None and "since_last" in result:
            tqdm.write(f"    change in bits/dim: {one_line_of_changes(result)}")
    if training.args.run.keep_best and training.accelerator.is_main_process:
        _keep_if_best(training, averaged, result)


def _keep_if_best(training: Training, averaged: ModelMixin, result: dict[str, Any]) -> None:
    """The pipeline of the best evaluation so far, also before a resumption, with its figures.

    Where the change since the best was measured it decides: it is known far better than two figures.
    """
    target = training.output_dir / BEST_FOLDER
    held = target / "evaluation.json"
    if held.is_file():
        lowest = json.loads(held.read_text(encoding="utf-8"))["bits_per_dim"]
        if not (result["is_best"] if "since_best" in result else result["bits_per_dim"] < lowest):
            return
    figures = {name: value for name, value in result.items() if name != "per_image"} | {"step": training.step}
    with explained_failure(training.output_dir), atomic_folder(target) as folder:
        training.pipeline(averaged).save_pretrained(folder)
        write_json(folder / ARGUMENTS_FILE, training.description())
        write_json(folder / "evaluation.json", without_nan(figures))


def draw_sample_grid(training: Training) -> None:
    """A grid of samples, from the same noise each time."""
    averaged = training.whole_average().eval()
    if training.accelerator.is_main_process:
        seed, number = training.args.optimization.seed, training.args.run.num_sample_images
        common = {
            "seed": seed,
            "batch_size": training.args.run.eval_batch_size,
            "num_inference_steps": training.args.diffusion.ddpm_num_inference_steps,
        }
        more = {}
        if training.is_latent:
            levels = latent_samples(training.pipeline(averaged), number, **common)
            more = latent_pictures(training.pipeline(averaged), training.eval_images.images, seed=seed)
        else:
            classes = training.num_classes if training.args.model.class_conditional else None
            levels = draw_samples(training.pipeline(averaged), number, num_classes=classes, **common)
        folder = training.output_dir / SAMPLES_FOLDER
        folder.mkdir(exist_ok=True)
        training.last_samples = {}
        for name, (images, columns) in {"samples": (levels, None), **more}.items():
            grid = image_grid(images, training.num_levels, columns=columns)
            path = folder / f"{'' if name == 'samples' else name + '-'}step-{training.step:07d}.png"
            grid.save(path)
            training.last_samples[f"{name}.png"] = path
            training.log.picture(training.step, name, grid)
    training.network.train()
    training.accelerator.wait_for_everyone()
