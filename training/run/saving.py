"""A run's state on its way to disk and back: checkpoints, and the finished pipeline."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import (
    gather_object,
)
from arguments import ARGUMENTS_FILE
from checkpoints import (
    CheckpointError,
    atomic_folder,
    discard,
    explained_failure,
    prune,
    write_json,
)
from diffusers.models.modeling_utils import ModelMixin
from latent_models import (
    BoundModel,
    load_saved,
)
from safetensors.torch import load_file, save_file
from sharding import gathered, load_gathered_optimizer

from vdm_diffusers import VDMPipeline, VDMScheduler
from vdm_diffusers.hub import (
    write_travelling_code,
)

from .constants import (
    BEST_FOLDER,
    STATE_FOLDER,
)
from .publishing import push_in_background
from .records import on_cpu

if TYPE_CHECKING:
    from train import Training


def save_checkpoint(training: Training) -> None:
    """Everything that the run needs to go on, and a pipeline of the averaged weights, in one folder."""
    if training.accelerator.is_main_process:
        training.writer.wait()  # the copies that it writes are about to be overwritten
    device = "cpu" if training.accelerator.is_main_process else None
    weights, optimizer, averaged = (
        training.network.state_dict(),
        training.optimizer.state_dict() if training.engine is None else training.engine.gathered_optimizer(device),
        training.averaged.state_dict(),
    )
    if training.sharding is not None:  # all processes give, the main one takes
        weights, optimizer, averaged = (gathered(state, device) for state in (weights, optimizer, averaged))
    streams = [] if training.stream is None else gather_object([training.stream.state_dict()])  # of all processes
    if training.accelerator.is_main_process:
        training.writer.submit(_checkpoint_writer(training, weights, optimizer, averaged, streams))
    training.accelerator.wait_for_everyone()


def _checkpoint_writer(
    training: Training,
    weights: dict[str, Any],
    optimizer: dict[str, Any],
    averaged: dict[str, Any],
    streams: list[dict[str, Any]],
) -> Callable[[], None]:
    """A function that writes the state as it is now; in the background from copies, so that training may go on
    meanwhile.
    """
    target, limit = training.output_dir / f"checkpoint-{training.step}", training.args.run.checkpoints_total_limit
    weights = {name: value.contiguous() for name, value in weights.items()}
    time_learning, model = training.time, training.averaged
    scaler = None if training.accelerator.scaler is None else training.accelerator.scaler.state_dict()
    if training.args.run.async_checkpoints:
        if training.sharding is None:
            weights, optimizer = on_cpu(weights), on_cpu(optimizer)
        time_learning = copy.deepcopy(training.time)
    if training.args.run.async_checkpoints or training.sharding is not None:
        model = _copy_of_averaged(training, averaged)
    saved = training.pipeline(model)
    description = training.description()
    position = {
        "format": 1,
        "step": training.step,
        "images_seen": training.images_seen,
        "seconds": training.seconds(),
        "skipped": training.skipped,
        "skipped_in_a_row": training.skipped_in_a_row,
        "evaluations_without_gain": 0 if training.changes is None else training.changes.waited,
    }

    def write() -> None:
        with explained_failure(training.output_dir):
            with atomic_folder(target) as folder:
                saved.save_pretrained(folder)
                write_json(folder / ARGUMENTS_FILE, description)
                state = folder / STATE_FOLDER
                state.mkdir()
                save_file(weights, state / "weights.safetensors")
                torch.save(optimizer, state / "optimizer.pt")
                time_learning.save(state)
                if scaler is not None:
                    torch.save(scaler, state / "scaler.pt")
                if streams:
                    write_json(state / "streams.json", streams)
                write_json(state / "state.json", position)
            if training.repo_id is not None and training.args.run.push_checkpoints:
                push_in_background(training, target, f"Step {position['step']}")
            prune(training.output_dir, limit)

    return write


def _copy_of_averaged(training: Training, averaged: dict[str, Any]) -> ModelMixin:
    """The averaged network as it is now, on the CPU; the same object at every call."""
    if training.copied is None:
        training.copied = training._new_network()
    training.copied.load_state_dict(averaged)
    if isinstance(training.copied, BoundModel):
        training.copied.take_scales(training.averaged)
    return training.copied


def save_pipeline(training: Training) -> None:
    """The finished pipeline in --output_dir itself; model_index.json comes last, so that it never names a half."""
    averaged = training.whole_average()
    if training.accelerator.is_main_process:
        with explained_failure(training.output_dir), atomic_folder(training.output_dir / "pipeline") as folder:
            pipeline = training.pipeline(averaged)
            pipeline.save_pretrained(folder)
            if isinstance(pipeline, VDMPipeline) and isinstance(pipeline.scheduler, VDMScheduler):
                write_travelling_code(folder)  # with it the folder loads where this package is not
            write_json(folder / ARGUMENTS_FILE, training.description())
        written = training.output_dir / "pipeline"
        index = "config.json" if training.args.model.model in ("vae", "hvae") else "model_index.json"
        names = [path.name for path in written.iterdir() if path.name != index]
        (training.output_dir / index).unlink(missing_ok=True)
        for name in [*names, index]:
            if (training.output_dir / name).exists():
                discard(training.output_dir / name)
            (written / name).rename(training.output_dir / name)
        discard(written)
        training.accelerator.print(f"saved the pipeline in {training.output_dir}")
    training.accelerator.wait_for_everyone()


def load_weights(training: Training, checkpoint: Path) -> None:
    state = checkpoint / STATE_FOLDER
    position = json.loads((state / "state.json").read_text(encoding="utf-8"))
    training.step, training.images_seen = position["step"], position["images_seen"]
    training.started -= position["seconds"]
    training.skipped, training.skipped_in_a_row = position.get("skipped", 0), position.get("skipped_in_a_row", 0)
    try:
        training.network.load_state_dict(load_file(state / "weights.safetensors"))
        training.time.load(state)
        if training.is_latent:
            averaged = load_saved(training.args.model.model, checkpoint)
            for model in [training.network] if training.ema is None else [training.network, training.ema.model]:
                model.take_scales(averaged)
        elif training.ema is not None:
            averaged = VDMPipeline.from_pretrained(checkpoint).unet
        if training.ema is not None:
            training.ema.model.load_state_dict(averaged.state_dict())
        if training.changes is not None:
            training.changes.waited = position.get("evaluations_without_gain", 0)
            if (training.output_dir / BEST_FOLDER / "evaluation.json").is_file():
                training.changes.best = VDMPipeline.from_pretrained(
                    training.output_dir / BEST_FOLDER
                ).unet.state_dict()
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} is of another network than the arguments describe: {error}") from error


def load_stream(training: Training, checkpoint: Path) -> None:
    assert training.stream is not None
    path = checkpoint / STATE_FOLDER / "streams.json"
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} is of a run without --streaming: it cannot go on with it.")
    streams = json.loads(path.read_text(encoding="utf-8"))
    training.stream.load_state_dict(streams[training.accelerator.process_index % len(streams)])


def load_optimizer(training: Training, checkpoint: Path) -> None:
    state = checkpoint / STATE_FOLDER
    optimizer = torch.load(state / "optimizer.pt", map_location="cpu", weights_only=True)
    if training.engine is not None:
        training.engine.load_gathered_optimizer(optimizer)
    elif training.sharding is None:
        training.optimizer.load_state_dict(optimizer)
    else:
        load_gathered_optimizer(training.optimizer, optimizer)
    if training.accelerator.scaler is not None and (state / "scaler.pt").is_file():
        training.accelerator.scaler.load_state_dict(torch.load(state / "scaler.pt", weights_only=True))
