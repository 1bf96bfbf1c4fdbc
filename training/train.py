#!/usr/bin/env python
"""Train a variational diffusion model.

    python training/train.py                                       # the 8x8 digits, on a CPU, in minutes
    accelerate launch training/train.py --config recipe.yaml       # any data, any number of processes
    python training/train.py --help

One optimiser step sees a global batch of train_batch_size x processes x gradient_accumulation_steps images. Its
images, times and noise are functions of (seed, step) alone (see randomness.py): a run that was killed and resumed is
the run that was not.

Exit codes: 0 done; 2 bad arguments or data; 128 + n stopped by signal n (SIGTERM 143, SIGINT 130, SIGHUP 129, SIGUSR1)
with its state saved; 1 anything else. (torchrun reports every one of them but 0 as its own 1.)
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -m`, runpy and -P leave the script's folder out

from arguments import ARGUMENTS_FILE, Arguments, OptimizationArguments, RunArguments, parse_arguments

if __name__ == "__main__":
    parse_arguments()  # --help and what cannot be are answered before the seconds that the imports below take

import contextlib
import copy
import dataclasses
import errno
import hashlib
import json
import math
import os
import resource
import shlex
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from changes import Changes
from changes import one_line as one_line_of_changes
from checkpoints import (
    CheckpointError,
    CheckpointWriter,
    SaveError,
    atomic_folder,
    clean_up,
    discard,
    explained_failure,
    find_checkpoint,
    list_checkpoints,
    prune,
    required_bytes,
    without_nan,
    write_json,
    write_text,
)
from class_labels import check_labels
from data import (
    DataError,
    ImageSet,
    ImageStream,
    evaluation_split,
    figure_name,
    first_images,
    is_digits,
    load_splits,
    overlap,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.utils import logging as diffusers_logging
from diffusion import DiffusionTask, Losses, Rows, make_scheduler, schedule_name
from ema import EMA
from evaluating import TERMS, bits_per_dim, combined_error, draw_samples
from latent_models import (
    BoundModel,
    LatentModel,
    LatentTask,
    Stage,
    latent_bits_per_dim,
    latent_pictures,
    latent_samples,
    load_saved,
    make_latent_model,
    make_stages,
)
from networks import compile_network, make_network, no_class_label
from optimizers import clip_gradients, make_optimizer
from output_folder import FolderError, RunLock, check_output_dir, set_aside, start_anew
from plots import image_grid
from precision import chosen_precision, slow_bf16
from randomness import DataOrder, seed_dropout
from safetensors.torch import load_file, save_file
from sharding import clip_divided_gradients, gathered, in_precision, load_gathered_optimizer, requested_sharding, shard
from stopping import StopSignal, Terminated
from time_learning import TimeLearning
from torch import Tensor
from tqdm.auto import tqdm
from zero import ZeroEngine, requested_zero

from vdm_diffusers import VDMFlowScheduler, VDMPipeline, VDMScheduler
from vdm_diffusers.hub import (
    HUB_ERRORS,
    EvaluationData,
    Measurement,
    ModelDescription,
    Provenance,
    check_hub_access,
    publish_folder,
    write_model_card,
    write_travelling_code,
)
from vdm_diffusers.models.labels import num_classes

EXIT_FAILED = 1
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EXIT_BAD_INPUT = 2
STATE_FOLDER = "training_state"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FOLDER = "samples"
SAMPLES_FILE = "samples.png"
MODEL_NAMES = {
    "vdm": "variational diffusion model",
    "vae": "variational autoencoder",
    "hvae": "Markovian hierarchical variational autoencoder",
    "latent_vdm": "variational autoencoder with a variational diffusion model as its prior, a model",
}
PICTURES = {
    SAMPLES_FILE: "Samples, drawn in {steps} steps, not selected.",
    "reconstructions.png": "Held-out images, and below each row what encoder and decoder make of it.",
    "traversal.png": "One held-out image; in each row one latent from -3 to 3 standard deviations of the prior.",
    "interpolations.png": "In each row from one held-out image to another through the latents.",
}
BEST_FOLDER = "best"
OWN_FILES = (
    *("model_index.json", "unet", "scheduler", "README.md"),
    *("config.json", "diffusion_pytorch_model.safetensors"),
    *(ARGUMENTS_FILE, METRICS_FILE, SAMPLES_FOLDER, "vae", "vdm_diffusers.py", BEST_FOLDER, *PICTURES),
)
NUM_BINS = 16  # of log SNR, for the loss by log SNR
BATCHES_HELD = 64  # micro-batches whose losses are summed up at once
BYTES_KEPT_ON_DEVICE = 2 << 30  # data sets up to this size live on the accelerator


class SetupError(RuntimeError):
    """The run cannot start as asked; the message says what to do."""


# --- before the first step -------------------------------------------------------------------------------------------


def check_launch(accelerator: Accelerator) -> None:
    """Raise SetupError if the launcher was asked for more processes than there are."""
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted > accelerator.num_processes:
        raise SetupError(
            f"the launcher's WORLD_SIZE is {wanted}, but {accelerator.num_processes} process(es) found each other. On "
            "CPUs start "
            f"`ACCELERATE_USE_CPU=true torchrun --nproc_per_node {wanted} training/train.py`."
        )
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise SetupError(
            "MEGATRON_LM is not done here. Weights and optimiser states are divided among the processes by "
            "training/accelerate_configs/fsdp.yaml, optimiser states and gradients by deepspeed_zero2.yaml."
        )
    # `accelerate launch --cpu --num_processes N` starts a single process; all it leaves are these two variables
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise SetupError(
            "`accelerate launch` was asked for several processes and started one. On CPUs write "
            "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N training/train.py`, or use "
            "torchrun."
        )


def idle_cores(accelerator: Accelerator) -> str | None:
    """A warning if CPU training leaves cores idle (launchers set one thread for each process)."""
    if accelerator.device.type != "cpu":
        return None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = local * torch.get_num_threads()
    if used >= cores:
        return None
    return (
        f"warning: {local} process(es) with {torch.get_num_threads()} thread(s) each use {used} of {cores} cores. "
        f"Set OMP_NUM_THREADS={cores // local} (or --num_cpu_threads_per_process of `accelerate launch`)."
    )


def prepare_output_dir(args: Arguments, accelerator: Accelerator) -> tuple[Path, RunLock]:
    """Make --output_dir and hold it, or raise SetupError everywhere if it is occupied or in use."""
    output_dir, run = Path(args.run.output_dir), args.run
    lock, problem = RunLock(output_dir), [""]
    if accelerator.is_main_process:
        try:
            resume = bool(run.resume_from_checkpoint)
            check_output_dir(output_dir, OWN_FILES, resume=resume, overwrite=run.overwrite_output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            if run.resume_from_checkpoint:
                clean_up(output_dir)
            else:
                start_anew(output_dir, OWN_FILES, run.logging_dir)
        except FolderError as error:
            problem = [str(error)]
        except OSError as error:
            problem = [f"--output_dir {output_dir} cannot be written: {error}."]
    broadcast_object_list(problem)
    if problem[0]:
        raise SetupError(problem[0])
    return output_dir, lock


def hub_repository(args: Arguments, output_dir: Path) -> str | None:
    """The repository that --push_to_hub will publish to, made if it does not exist; None without --push_to_hub.

    Raises:
        SetupError: nobody is logged in, or may not write there.
    """
    run = args.run
    if not run.push_to_hub:
        return None
    try:  # an existing repository keeps its visibility unless a private one was asked for
        return check_hub_access(
            run.hub_model_id or output_dir.resolve().name, private=run.hub_private_repo or None, token=run.hub_token
        )
    except HUB_ERRORS as error:
        raise SetupError(
            f"--push_to_hub: {one_line(error)} (Without it the run can be published later, see docs/hub.md.)"
        ) from error


def peak_memory(device: torch.device) -> float:
    """GiB that the run has taken at most: of the GPU's memory, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)


def duration(seconds: float) -> str:
    """In words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def warmup_steps(asked: int | None, num_steps: int) -> int:
    """Of a stage of the run: what was asked for, or 500 and at most a tenth of it."""
    return min(500, num_steps // 10) if asked is None else asked


def one_line(error: BaseException) -> str:
    """The first sentence of what the Hub's client says, without its traceback."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".") + "."


def changed_arguments(checkpoint: Path, args: Arguments, global_batch: int) -> str | None:
    """A warning if the run goes on with other arguments, or on another number of processes, that change its course."""
    saved = json.loads((checkpoint / ARGUMENTS_FILE).read_text(encoding="utf-8"))
    before, now = saved["arguments"] | {"global batch": saved.get("global_batch")}, args.flat()
    now |= {"global batch": global_batch}
    harmless = {field.name for field in dataclasses.fields(RunArguments)} | {
        *("cache_dir", "dataloader_num_workers", "decoded_images", "memory_share")
    }
    changed = [
        f"{name} {before[name]} -> {now[name]}"
        for name in now
        if name in before and before[name] != now[name] and name not in harmless
    ]
    return f"warning: going on with other arguments than before: {', '.join(changed)}" if changed else None


def num_train_steps(args: Arguments, num_images: int, global_batch: int) -> int:
    """--max_train_steps, or the optimiser steps that --num_epochs take."""
    if args.optimization.max_train_steps is not None:
        return args.optimization.max_train_steps
    return math.ceil(args.optimization.num_epochs * num_images / global_batch)


# --- the pieces of a run ---------------------------------------------------------------------------------------------


class Batches:
    """Integer images by their place in the training stream, on the device or on their way to it.

    Where a GPU's images lie in the host's memory, a thread copies the next batch to pinned memory while this one is
    trained on: it is the one that lies as far on as this one lay from the last. On a CPU, where gathering takes a
    twentieth of a millisecond, it would take a core from the training.
    """

    def __init__(self, images: ImageSet, order: DataOrder, device: torch.device) -> None:
        self.order, self.device = order, device
        self.images, self.labels = images.images, images.labels
        self.on_device = device.type != "cpu" and self.images.nbytes <= BYTES_KEPT_ON_DEVICE
        if self.on_device:
            self.images = self.images.to(device)
            self.labels = None if self.labels is None else self.labels.to(device)
        self.thread = ThreadPoolExecutor(1, "batches") if device.type == "cuda" and not self.on_device else None
        self._last: int | None = None
        self._ahead: tuple[tuple[int, int], Future[tuple[Tensor, Tensor | None]]] | None = None

    def __call__(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """The images and labels at places start..start+count-1 of the stream."""
        if self.thread is None:
            return self.gather(start, count)
        place, future = self._ahead or (None, None)
        # the thread has done with the order before it is used here
        found = future.result() if future is not None else None
        batch = found if found is not None and place == (start, count) else self.gather(start, count)
        if self._last is not None and start > self._last:
            following = (2 * start - self._last, count)
            self._ahead = following, self.thread.submit(self.gather, *following)
        self._last = start
        return batch

    def gather(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """The batch itself, in pinned memory for a GPU that does not hold the images."""
        index = self.order.indices(start, count)
        if self.on_device:
            index = index.to(self.device, non_blocking=True)
        images = self.images[index]
        if self.device.type == "cuda" and not self.on_device:
            images = images.pin_memory()
        return images, None if self.labels is None else self.labels[index]


class Meter:
    """Loss, loss by log SNR and gradient norm since the last reading, summed on the device."""

    def __init__(self, scheduler: VDMScheduler | VDMFlowScheduler, device: torch.device) -> None:
        schedule = scheduler.noise_schedule
        self.highest, self.lowest = schedule.log_snr_max, max(schedule.log_snr_min, -20.0)
        # loss, number of losses, gradient norm, number of norms, then loss and number in each bin
        self.sums = torch.zeros(4 + 2 * NUM_BINS, device=device)
        # not yet in the sums: a dozen small operations take as long for many micro-batches as for one
        self._losses: list[Losses] = []
        self._norms: list[Tensor] = []

    def add_losses(self, batch: Losses) -> None:
        """The losses of a micro-batch: their mean over uniform times, and each in its bin."""
        times = batch.times and dataclasses.replace(batch.times, log_snr=batch.times.log_snr.detach(), cut=None)
        self._losses.append(Losses(batch.values.detach(), times))
        if len(self._losses) == BATCHES_HELD:
            self._sum_up()

    def add_gradient_norm(self, norm: Tensor) -> None:
        """The norm of an optimiser step's gradient, before clipping."""
        self._norms.append(norm.detach())

    def _sum_up(self) -> None:
        """Add what is held to the sums."""
        if self._norms:
            self.sums[2] += torch.stack(self._norms).sum()
            self.sums[3] += len(self._norms)
        if self._losses:
            losses = torch.cat([batch.values for batch in self._losses]).float()
            self.sums[0] += torch.cat([batch.weighted for batch in self._losses]).float().sum()
            self.sums[1] += len(losses)
            times = [batch.times for batch in self._losses if batch.times is not None]
            if times:
                log_snr = torch.cat([part.log_snr for part in times])
                position = (log_snr - self.lowest) / (self.highest - self.lowest) * NUM_BINS
                bins = position.floor().clamp(0, NUM_BINS - 1).long().to(self.sums.device, non_blocking=True)
                self.sums.index_add_(0, 4 + bins, losses)
                self.sums.index_add_(0, 4 + NUM_BINS + bins, torch.ones_like(losses))
        self._losses, self._norms = [], []

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks and micro-batches since the last reading, none if all were skipped; waits for the
        device.
        """
        self._sum_up()
        values = accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        if not values[1]:
            return {}
        means = {"loss": values[0] / max(values[1], 1), "gradient_norm": values[2] / max(values[3], 1)}
        width = (self.highest - self.lowest) / NUM_BINS
        for index in range(NUM_BINS):
            loss, number = values[4 + index], values[4 + NUM_BINS + index]
            if number:
                means[f"loss_by_log_snr/{self.lowest + (index + 0.5) * width:+.1f}"] = loss / number
        return means


def on_cpu(state: Any) -> Any:
    """A copy of nested dictionaries and lists, with the tensors in the host's memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return [on_cpu(value) for value in state] if isinstance(state, list) else state


class Log:
    """metrics.jsonl and the tracker; on the main process only."""

    def __init__(self, accelerator: Accelerator, args: Arguments, output_dir: Path, step: int) -> None:
        self.accelerator, self.path = accelerator, output_dir / METRICS_FILE
        self.tracking = args.run.logger != "none"
        if self.tracking:
            if not accelerator.log_with:  # Accelerate drops a tracker that is not installed, and says nothing
                raise SetupError(
                    f"--logger {args.run.logger} needs its package: pip install {args.run.logger}, or --logger none."
                )
            options = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in args.flat().items()}
            # a resumed run goes on in its line: what TensorBoard has after the checkpoint goes, W&B knows the folder
            # by its number
            folder = hashlib.blake2b(str(output_dir.resolve()).encode(), digest_size=6).hexdigest()
            of_tracker = {
                "trackio": {"name": output_dir.name, "resume": "allow" if step else "never"},
                "wandb": {"name": output_dir.name, **({"id": folder, "resume": "allow"} if step else {"id": folder})},
                "tensorboard": {"purge_step": step + 1} if step else {},
            }
            accelerator.init_trackers("vdm", config=options, init_kwargs=of_tracker)
        if accelerator.is_main_process:  # entries after the checkpoint will be written again
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            kept = [line for line in lines if _whole_entry(line) and json.loads(line)["step"] <= step]
            write_text(self.path, "".join(line + "\n" for line in kept))
        accelerator.wait_for_everyone()
        self._evaluated = {
            json.loads(line)["step"]
            for line in (self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else [])
            if '"eval/bits_per_dim"' in line
        }
        self._failed = False

    def has_evaluation(self, step: int) -> bool:
        """Whether an earlier part of the run has evaluated this step."""
        return step in self._evaluated

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One entry: numbers to the tracker, everything to metrics.jsonl."""
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        try:
            if self.accelerator.is_main_process:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(without_nan({"step": step, **values}), allow_nan=False) + "\n")
            if self.tracking:
                self.accelerator.log(numbers, step=step)
        except OSError as error:  # a full disk of logs is no reason to lose the training
            if not self._failed:
                self.accelerator.print(
                    f"warning: the log could not be written ({error}); training goes on without it."
                )
            self._failed = True

    def picture(self, step: int, name: str, image: PIL.Image.Image) -> None:
        """A picture to the tracker."""
        pixels = np.asarray(image.convert("RGB"))
        for tracker in self.accelerator.trackers if self.tracking else []:
            if tracker.name == "tensorboard":
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "trackio":  # Accelerate's wrapper has no method for pictures
                import trackio

                tracker.log({name: trackio.Image(pixels)}, step=step)
            else:
                tracker.log_images({name: [pixels]}, step=step)


def _whole_entry(line: str) -> bool:
    try:
        return "step" in json.loads(line)
    except ValueError:
        return False


# --- the run ---------------------------------------------------------------------------------------------------------


class Training:
    """A run: what is trained, on what, where it stands, and what is done on the way."""

    def __init__(self, args: Arguments, accelerator: Accelerator, stack: contextlib.ExitStack) -> None:
        self.args, self.accelerator = args, accelerator
        optimization, device = args.optimization, accelerator.device
        check_launch(accelerator)
        try:
            self.sharding, zero = requested_sharding(accelerator), requested_zero(accelerator)
        except ValueError as error:
            raise SetupError(str(error)) from error
        if (self.sharding or zero) and (self.is_latent or optimization.optimizer == "muon"):
            what = (
                "--optimizer muon needs whole matrices"
                if not self.is_latent
                else f"--model {args.model.model} is small"
            )
            raise SetupError(
                f"{what}: {'FSDP divides them' if self.sharding else 'DeepSpeed divides their gradients'}. "
                "Use training/accelerate_configs/ddp.yaml or --optimizer adamw."
            )
        if zero and optimization.channels_last:
            raise SetupError("--channels_last: DeepSpeed lays all weights out in one row.")
        self.output_dir, lock = prepare_output_dir(args, accelerator)
        stack.callback(lock.release)
        resume_from, self.warnings = None, [*args.notes, idle_cores(accelerator)]
        if args.run.resume_from_checkpoint:
            resume_from, passed_over = find_checkpoint(self.output_dir, args.run.resume_from_checkpoint)
            self.warnings += passed_over
            accelerator.wait_for_everyone()  # nothing is renamed before everybody has found it
            if accelerator.is_main_process:
                self.warnings += set_aside(self.output_dir, resume_from)
            accelerator.wait_for_everyone()

        # a login that is missing is found out now, not in days
        self.repo_id = hub_repository(args, self.output_dir) if accelerator.is_main_process else None
        self.last_evaluation: dict[str, Any] | None = None
        self.changes = None
        if args.run.eval_change_samples and not self.is_latent:
            self.changes = Changes(
                num_samples=args.run.eval_change_samples,
                seed=optimization.seed,
                batch_size=args.run.eval_batch_size,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
            )
        self.last_samples: dict[str, Path] = {}  # pictures of the model card

        with accelerator.local_main_process_first():  # the others find what the first has downloaded
            self.stream = None
            if args.data.streaming:
                places = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
                split = args.data.train_split
                self.stream = ImageStream(args.data, split, optimization.seed, device=accelerator.device, **places)
                self.train_images = self.stream.first
                self.eval_images = first_images(args.data, evaluation_split(args.data), args.run.eval_max_images)
            else:
                self.train_images, self.eval_images = load_splits(args.data, optimization.seed)
        if args.run.eval_max_images is not None:
            self.eval_images = self.eval_images.first(args.run.eval_max_images)
        self.num_levels = args.data.num_levels or self.train_images.num_levels
        highest = max(self.train_images.highest, self.eval_images.highest)
        if highest >= self.num_levels:
            raise DataError(f"--num_levels {self.num_levels}: the images hold level {highest}.")

        if optimization.allow_tf32 and device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.warnings += [slow_bf16(accelerator.mixed_precision, device)]
        self.warnings += [*self.train_images.warnings, *self.eval_images.warnings]
        self.figure = figure_name(args.data, evaluation_split(args.data), conditional=args.model.class_conditional)
        if self.stream is None and accelerator.is_main_process:
            self.warnings += [overlap(self.train_images, self.eval_images)]

        set_seed(optimization.seed)
        try:
            if self.is_latent:
                self.network = make_latent_model(args, self.train_images, self.num_levels)
            else:
                self.network = make_network(args, self.train_images)
                dropout = args.model.class_dropout
                check_labels(self.network, self.train_images, self.eval_images, class_dropout=dropout)
            self.scheduler = make_scheduler(args.diffusion)
        except ValueError as error:  # sizes or schedules that cannot be; the message says which
            raise SetupError(str(error)) from error
        self.time = TimeLearning(args.diffusion, self.scheduler, device)
        self.num_classes, self.network_class = num_classes(self.network), type(self.network)
        self.network.to(device).train()
        if optimization.gradient_checkpointing or (self.sharding is not None and self.sharding.gradient_checkpointing):
            self.network.enable_gradient_checkpointing()
        if optimization.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.ema = None
        if optimization.use_ema:
            options = {"inv_gamma": optimization.ema_inv_gamma, "power": optimization.ema_power}
            self.ema = EMA(self.network, **options, max_decay=optimization.ema_max_decay)
        self.step = self.images_seen = self.logged_step = 0
        self.skipped = self.skipped_in_a_row = 0  # optimiser steps whose gradient was not finite
        self.training_seconds = 0.0  # since the last entry of the log
        self.first_rate: float | None = None  # images a second, as the first entry had it
        self.started = time.perf_counter()  # moved back by what earlier parts of the run took
        if resume_from is not None:
            self._load_weights(resume_from)
        if self.sharding is not None:
            shard(self.network, self.sharding, device, compile=optimization.compile)
            if self.ema is not None:
                shard(self.ema.model, self.sharding, device)
                self.ema.follow(self.network)
        elif optimization.compile:
            compile_network(self.network, device, self.train_images.images[0, 0].numel())
        try:
            optimizer = make_optimizer(
                optimization.optimizer,
                self.network.named_parameters(),
                lr=optimization.learning_rate,
                betas=(optimization.adam_beta1, optimization.adam_beta2),
                weight_decay=optimization.adam_weight_decay,
                eps=optimization.adam_epsilon,
                fused=device.type in ("cpu", "cuda"),
            )
        except ValueError as error:
            raise SetupError(str(error)) from error
        self.engine: ZeroEngine | None = None
        if zero is not None:
            sizes = {"rows": optimization.train_batch_size, "accumulation": accelerator.gradient_accumulation_steps}
            limit = optimization.max_grad_norm or 0.0
            self.engine = ZeroEngine(self.network, optimizer, zero, accelerator, **sizes, max_grad_norm=limit)
            self.model, self.optimizer = self.engine, optimizer
        elif self.sharding is None:
            self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        else:
            self.model, self.optimizer = (
                in_precision(self.network, accelerator),
                accelerator.prepare_optimizer(optimizer),
            )
        # Accelerate's wrapper looks for an optional package on the disk at every step: needed for float16's scaling
        # alone
        self.take_step = optimizer.step if accelerator.scaler is None else self.optimizer.step
        self.parameters = list(self.network.parameters())  # walking the modules at each step would cost a millisecond
        if resume_from is not None:
            self._load_optimizer(resume_from)

        self.rows = optimization.train_batch_size
        self.global_batch = self.rows * accelerator.num_processes * accelerator.gradient_accumulation_steps
        self.num_steps = num_train_steps(args, len(self.train_images), self.global_batch)
        self.writer = CheckpointWriter(in_background=args.run.async_checkpoints)
        self.copied: ModelMixin | None = None  # on the CPU, of the averaged network, for the background writer
        if accelerator.is_main_process:
            self.check_disk()
        # The schedule is used as a function of the optimiser step: nothing to save, nothing that could count
        # otherwise.
        self.stages = make_stages(args, self.num_steps)
        self.learning_rate_factors = {
            stage: get_scheduler(
                optimization.lr_scheduler,
                optimizer,
                num_warmup_steps=warmup_steps(optimization.lr_warmup_steps, stage.end - stage.first),
                num_training_steps=stage.end - stage.first,
            ).lr_lambdas[0]
            for stage in self.stages
        }
        order = DataOrder(len(self.train_images), optimization.seed)
        self.batches = Batches(self.train_images, order, device) if self.stream is None else self.stream
        if resume_from is not None and self.stream is not None:
            self._load_stream(resume_from)
        common = {"seed": optimization.seed, "device": device, "random_flip": args.data.random_flip}
        self.task: LatentTask | DiffusionTask
        if self.is_latent:
            self.task = LatentTask(self.stages, **common)
        else:
            self.task = DiffusionTask(
                args.diffusion,
                self.scheduler,
                num_levels=self.num_levels,
                num_classes=self.num_classes,
                class_dropout=args.model.class_dropout,
                dropped_label=no_class_label(self.network, self.train_images),
                learned_schedule=self.time.schedule,
                sampler=self.time.sampler,
                **common,
            )
        self.meter = Meter(self.scheduler, device)
        self.log = Log(accelerator, args, self.output_dir, self.step)
        self.stop = StopSignal(accelerator, args.run.max_minutes)
        stack.callback(self.stop.restore)
        if accelerator.is_main_process:
            write_json(self.output_dir / ARGUMENTS_FILE, self.description())
        if resume_from is not None:
            self.warnings += [changed_arguments(resume_from, args, self.global_batch)]
            accelerator.print(f"resuming from {resume_from} at step {self.step}")

    def description(self) -> dict[str, Any]:
        """What the model was trained on and how, for evaluate.py and for people."""
        return {
            "arguments": self.args.flat(),
            "train_images": self.train_images.name,
            "eval_images": self.eval_images.name,
            "num_levels": self.num_levels,
            "class_names": self.train_images.class_names if self.args.model.class_conditional else None,
            "num_parameters": sum(p.numel() for p in self.network.parameters()),
            "global_batch": self.global_batch,
            "max_train_steps": self.num_steps,
            "num_processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
        }

    @property
    def averaged(self) -> ModelMixin:
        """The network that is evaluated, sampled and published: the average's, or the trained one."""
        return self.network if self.ema is None else self.ema.model

    def whole_average(self) -> ModelMixin:
        """`averaged`, gathered where weights are divided among the processes: all of them must ask."""
        if self.sharding is None:
            return self.averaged
        network = self._new_network().to(self.accelerator.device)
        network.load_state_dict(gathered(self.averaged.state_dict(), self.accelerator.device))
        return network

    def _new_network(self) -> ModelMixin:
        with torch.random.fork_rng(devices=[]):
            return self.network_class.from_config(self.network.config).eval()

    @property
    def is_latent(self) -> bool:
        """Whether a model with a learned encoder is trained, by its own bound."""
        return self.args.model.model != "vdm"

    def stage(self, step: int) -> Stage:
        """The part of the run that a step belongs to; one that trains all weights alike has one stage."""
        return next(stage for stage in self.stages if step < stage.end)

    def learning_rate_factor(self, step: int) -> float:
        """Of --learning_rate at a step: every stage has the whole course."""
        stage = self.stage(step)
        return stage.rate * self.learning_rate_factors[stage](step - stage.first)

    def begin_stage(self) -> None:
        """Before a step: where the prior's own stage begins, or the joint one of a given VAE, fix what it builds
        upon.
        """
        stage = self.stage(self.step)
        if self.step != stage.first or self.args.model.model != "latent_vdm":
            return
        if stage.name == "prior" or (stage.name == "joint" and not stage.first and self.args.model.vae is not None):
            average = None if self.ema is None else self.ema.model
            self.network.begin_prior(self.train_images.images, average)

    def pipeline(self, network: ModelMixin | None = None) -> VDMPipeline | LatentModel:
        """A pipeline of the averaged network, or of its copy; a VAE is one by itself."""
        if self.is_latent:
            return (self.averaged if network is None else network).published
        encoding, network = self.args.diffusion.pixel_encoding, self.averaged if network is None else network
        return VDMPipeline(network, self.time.scheduler(), num_levels=self.num_levels, pixel_encoding=encoding)

    # --- one step

    def optimizer_step(self) -> None:
        """One optimiser step: all micro-batches of this process, then clipping, optimiser, EMA."""
        optimization, accelerator = self.args.optimization, self.accelerator
        collected: list[Losses] = []
        healthy = True
        self.begin_stage()
        for group in self.optimizer.param_groups:
            group["lr"] = optimization.learning_rate * self.learning_rate_factor(self.step)
        for micro_batch in range(accelerator.gradient_accumulation_steps):
            first = (micro_batch * accelerator.num_processes + accelerator.process_index) * self.rows
            rows = Rows(self.step, first, self.rows, self.global_batch)
            levels, labels = self.batches(self.images_seen + first, self.rows)
            if not self.args.model.class_conditional:
                labels = None
            seed_dropout(accelerator.device, optimization.seed, "dropout", self.step, first)
            # divided gradients are added up where they lie: each micro-batch sends its own
            with accelerator.accumulate(*([] if self.sharding or self.engine else [self.model])):
                losses = self.task.losses(self.model, levels, labels, rows)
                self.backward(losses.weighted.mean())
                self.time.collect(accelerator, losses)
                collected.append(losses)
                if accelerator.sync_gradients and self.engine is not None:
                    norm = self.engine.step()
                    if optimization.max_skipped_steps:
                        healthy = bool(norm.isfinite())
                elif accelerator.sync_gradients:
                    limit = optimization.max_grad_norm or math.inf
                    accelerator.unscale_gradients()
                    clip = clip_gradients if self.sharding is None else clip_divided_gradients
                    norm = clip(self.parameters, limit)
                    # float16's loss scaling leaves out overflowing steps by itself
                    if optimization.max_skipped_steps and accelerator.scaler is None:
                        healthy = bool(norm.isfinite())
                    if healthy:
                        self.take_step()
                    for parameter in self.parameters:
                        parameter.grad = None
        self.step += 1
        self.images_seen += self.global_batch
        if not healthy:
            self.skip_step()
            return
        self.skipped_in_a_row = 0
        for losses in collected:
            self.meter.add_losses(losses)
        self.meter.add_gradient_norm(norm)
        self.time.step(accelerator, self.learning_rate_factor(self.step - 1))
        if self.ema is not None:
            self.ema.update(self.step - self.stage(self.step - 1).first)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss; its share of the optimiser step's."""
        # Accelerate's own looks for an optional package on the disk at every step: needed for float16's scaling alone
        if self.engine is not None:
            self.engine.backward(loss, last=self.accelerator.sync_gradients)
        elif self.accelerator.scaler is not None:
            self.accelerator.backward(loss)
        else:
            (loss / self.accelerator.gradient_accumulation_steps).backward()

    def skip_step(self) -> None:
        """Go on as if the step's images had not been there, or raise FloatingPointError after too many in a row.

        The gradient is the sum over all processes, so all of them come here or none.
        """
        self.time.skip()
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.args.optimization.max_skipped_steps:
            raise FloatingPointError(
                f"the gradient was not finite in {self.skipped_in_a_row} optimiser steps in a row, up to step "
                f"{self.step}. {self.advice()}"
            )
        if self.accelerator.is_local_main_process:
            tqdm.write(f"step {self.step}: the gradient is not finite, skipped ({self.skipped_in_a_row} in a row)")

    def train(self) -> None:
        """Train to the last step, then evaluate, sample and save the pipeline."""
        run, accelerator = self.args.run, self.accelerator
        self.announce()
        bar = tqdm(
            total=self.num_steps,
            initial=self.step,
            disable=not accelerator.is_local_main_process,
            desc="training",
            unit="step",
            mininterval=0.5,
        )
        self.logged_step, self.training_seconds = self.step, 0.0
        if 0 < self.step < self.num_steps and self.is_time_to_look() and not self.log.has_evaluation(self.step):
            self.look()  # which the run before was stopped at
        with bar:
            while self.step < self.num_steps and not self.has_stopped_gaining():
                began = time.perf_counter()
                self.optimizer_step()
                self.training_seconds += time.perf_counter() - began
                bar.update()
                last = self.step == self.num_steps
                stopping = not last and self.stop.agreed(self.step)
                saving = last or stopping or self.step % run.checkpointing_steps == 0
                if saving or self.step % run.logging_steps == 0:
                    values = self.record()
                    loss = values.get("loss", math.nan)
                    bar.set_postfix(loss=f"{loss:.4f}", lr=f"{values['learning_rate']:.1e}", refresh=False)
                    self.writer.check()
                looking = not (last or stopping) and self.is_time_to_look()
                if saving or looking:  # first: a kill while it is looked at costs nothing
                    self.save_checkpoint()
                if stopping:
                    self.writer.wait()
                    name = self.stop.name
                    accelerator.print(
                        f"{name}: state saved at step {self.step}; go on with --resume_from_checkpoint latest"
                    )
                    self.leave()
                    raise Terminated(128 + self.stop.number)
                if looking:
                    self.look()
        self.writer.wait()
        if self.stream is not None:
            self.stream.close()
        self.save_pipeline()  # before anything that may fail
        with self.stop.at_once():
            if run.eval_steps != 0:
                self.evaluate()
            if run.sample_steps != 0:
                self.draw_samples()
        self.publish()
        self.leave()

    def has_stopped_gaining(self) -> bool:
        """Whether --early_stopping ends the run here."""
        patience = self.args.run.early_stopping
        if patience is None or self.changes is None or self.changes.waited < patience:
            return False
        self.accelerator.print(
            f"step {self.step}: {patience} evaluation(s) without a gain, training ends (--early_stopping)"
        )
        return True

    def is_time_to_look(self) -> bool:
        """Whether an evaluation or samples are due at this step."""
        run = self.args.run
        return any(every and self.step % every == 0 for every in (run.eval_steps, run.sample_steps))

    def look(self) -> None:
        """Evaluate and draw samples, where either is due.

        The state has been saved: a signal ends the run between two operations.
        """
        run = self.args.run
        self.writer.wait()
        with self.stop.at_once():
            if run.eval_steps and self.step % run.eval_steps == 0:
                self.evaluate()
            if run.sample_steps and self.step % run.sample_steps == 0:
                self.draw_samples()

    def leave(self) -> None:
        """End the trackers and the process group: after DDP's wrapper, the destruction of which with the group's last
        reference may wait for gloo's threads while these wait for the interpreter (seen with torch 2.13 in one run of
        seventeen)."""
        self.model = self.network
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def record(self) -> dict[str, float]:
        """Read the meter, make sure that it is finite, and log it; waits for the device."""
        began = time.perf_counter()
        values = self.meter.read(self.accelerator)
        self.training_seconds += time.perf_counter() - began  # the device's backlog is training too
        if values:
            self.check_finite(values, self.logged_step)
        if self.args.optimization.max_skipped_steps:
            values["skipped_steps"] = self.skipped
        values |= {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": (self.step - self.logged_step) * self.global_batch / self.training_seconds,
            "epoch": self.epoch,
        }
        values["memory_gib"] = peak_memory(self.accelerator.device)
        if self.first_rate is None:
            self.first_rate = values["images_per_second"]
            left = (self.num_steps - self.step) * self.global_batch / self.first_rate
            if self.accelerator.is_main_process:
                tqdm.write(
                    f"{self.first_rate:.1f} images a second: about {duration(left)} for the steps that are left, "
                    "evaluations not "
                    f"counted; {values['memory_gib']:.1f} GiB so far"
                )
        self.log.write(self.step, values)
        self.logged_step, self.training_seconds = self.step, 0.0
        return values

    def seconds(self) -> float:
        """Time the run has taken, all its parts together."""
        return time.perf_counter() - self.started

    @property
    def epoch(self) -> float:
        """Passes through the training images so far."""
        return self.images_seen / len(self.train_images) if self.stream is None else self.stream.epoch

    def check_finite(self, values: dict[str, float], since: int) -> None:
        """Raise FloatingPointError if the loss or the gradient was not finite since the last reading."""
        scaled = self.accelerator.scaler is not None  # float16's loss scaling skips overflowing steps by itself
        if math.isfinite(values["loss"]) and (scaled or math.isfinite(values["gradient_norm"])):
            return
        raise FloatingPointError(
            f"the loss ({values['loss']}) or the gradient norm ({values['gradient_norm']}) was not finite in steps "
            f"{since + 1} to "
            f"{self.step}. {self.advice()} A few such steps may be left out: --max_skipped_steps."
        )

    def advice(self) -> str:
        """What to look at when numbers are not finite."""
        kept = list_checkpoints(self.output_dir)
        return (
            f"Look at the last entries of {self.output_dir / METRICS_FILE} (did the gradient norm grow?); lower "
            "--learning_rate or --max_grad_norm, lengthen --lr_warmup_steps, or train with --mixed_precision no or "
            "bf16. "
            f"The last checkpoint, {kept[-1].name if kept else 'none yet'}, is from before."
        )

    def check_disk(self) -> None:
        """Raise SetupError if the checkpoints cannot fit on the disk: now, and not in the night."""
        run = self.args.run
        weights = sum(p.numel() * p.element_size() for p in self.network.parameters())
        copies = 3 + (self.ema is not None)  # weights, AdamW's two moments, the average
        saves = math.ceil((self.num_steps - self.step) / run.checkpointing_steps)
        present = len(list_checkpoints(self.output_dir))
        needed = required_bytes(copies * weights, saves, run.checkpoints_total_limit, present)
        free = shutil.disk_usage(self.output_dir).free
        if needed > free:
            raise SetupError(
                f"the checkpoints need about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in --output_dir "
                f"{self.output_dir}. "
                "Give one on another disk, keep fewer (--checkpoints_total_limit), or save less often "
                "(--checkpointing_steps)."
            )

    def announce(self) -> None:
        """Say what will be done."""
        accelerator = self.accelerator
        for warning in filter(None, self.warnings):
            accelerator.print(warning)
        parameters = sum(p.numel() for p in self.network.parameters())
        shape = "x".join(map(str, self.train_images.images.shape[1:]))
        diffusion = self.args.diffusion
        objective = (
            "trained by its bound"
            if self.is_latent
            else (
                f"predicts {diffusion.prediction_type}, loss {diffusion.loss} in "
                f"{'discrete' if self.task.discrete else 'continuous'} time, schedule {schedule_name(diffusion)}"
            )
        )
        passes = self.num_steps * self.global_batch / len(self.train_images)
        epochs = f"{passes:.1f} epochs" if self.stream is None else "read in passing"
        divided = ", weights divided" if self.sharding else ", optimiser states divided" if self.engine else ""
        accelerator.print(
            f"training on {self.train_images.name} ({shape}, {self.num_levels} levels)\n"
            f"evaluating on {self.eval_images.name}\n"
            f"network: {self.network_class.__name__}, {parameters / 1e6:.2f}M weights; {objective}\n"
            f"{self.num_steps} optimiser steps of {self.global_batch} images ({self.rows} x "
            f"{accelerator.num_processes} process(es) x "
            f"{accelerator.gradient_accumulation_steps} micro-batch(es)), {epochs}, on "
            f"{accelerator.device}{divided}, precision {accelerator.mixed_precision}\n"
            f"writing to {self.output_dir}"
        )

    # --- looking at it

    def evaluate(self) -> None:
        """Bits/dim of the held-out images with the averaged weights."""
        averaged = self.whole_average().eval()
        common = {
            "seed": self.args.optimization.seed,
            "num_samples": self.args.run.eval_num_samples,
            "batch_size": self.args.run.eval_batch_size,
        }
        evaluator = latent_bits_per_dim if self.is_latent else bits_per_dim
        result = evaluator(
            self.pipeline(averaged),
            self.eval_images,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            **common,
        )
        self.network.train()
        self.last_evaluation = result
        if self.changes is not None:
            found = self.changes.measure(averaged, self.pipeline, self.eval_images)
            self.network.train()
            result |= found
        self.log.write(self.step, {f"eval/{name}": value for name, value in result.items()})
        error = combined_error([result["standard_error"], result["sampling_error"]])
        terms = ", ".join(f"{term} {result[term]:.3f}" for term in TERMS if term in result)
        if self.accelerator.is_local_main_process:
            tqdm.write(f"step {self.step}: {self.figure} {result['bits_per_dim']:.3f} +- {error:.3f} ({terms})")
            if self.changes is not None and "since_last" in result:
                tqdm.write(f"    change in bits/dim: {one_line_of_changes(result)}")
        if self.args.run.keep_best and self.accelerator.is_main_process:
            self.keep_if_best(averaged, result)

    def keep_if_best(self, averaged: ModelMixin, result: dict[str, Any]) -> None:
        """The pipeline of the best evaluation so far, also before a resumption, with its figures.

        Where the change since the best was measured it decides: it is known far better than two figures.
        """
        target = self.output_dir / BEST_FOLDER
        held = target / "evaluation.json"
        if held.is_file():
            lowest = json.loads(held.read_text(encoding="utf-8"))["bits_per_dim"]
            if not (result["is_best"] if "since_best" in result else result["bits_per_dim"] < lowest):
                return
        figures = {name: value for name, value in result.items() if name != "per_image"} | {"step": self.step}
        with explained_failure(self.output_dir), atomic_folder(target) as folder:
            self.pipeline(averaged).save_pretrained(folder)
            write_json(folder / ARGUMENTS_FILE, self.description())
            write_json(folder / "evaluation.json", without_nan(figures))

    def draw_samples(self) -> None:
        """A grid of samples, from the same noise each time."""
        averaged = self.whole_average().eval()
        if self.accelerator.is_main_process:
            seed, number = self.args.optimization.seed, self.args.run.num_sample_images
            common = {
                "seed": seed,
                "batch_size": self.args.run.eval_batch_size,
                "num_inference_steps": self.args.diffusion.ddpm_num_inference_steps,
            }
            more = {}
            if self.is_latent:
                levels = latent_samples(self.pipeline(averaged), number, **common)
                more = latent_pictures(self.pipeline(averaged), self.eval_images.images, seed=seed)
            else:
                classes = self.num_classes if self.args.model.class_conditional else None
                levels = draw_samples(self.pipeline(averaged), number, num_classes=classes, **common)
            folder = self.output_dir / SAMPLES_FOLDER
            folder.mkdir(exist_ok=True)
            self.last_samples = {}
            for name, (images, columns) in {"samples": (levels, None), **more}.items():
                grid = image_grid(images, self.num_levels, columns=columns)
                path = folder / f"{'' if name == 'samples' else name + '-'}step-{self.step:07d}.png"
                grid.save(path)
                self.last_samples[f"{name}.png"] = path
                self.log.picture(self.step, name, grid)
        self.network.train()
        self.accelerator.wait_for_everyone()

    # --- saving and loading

    def save_checkpoint(self) -> None:
        """Everything that the run needs to go on, and a pipeline of the averaged weights, in one folder."""
        if self.accelerator.is_main_process:
            self.writer.wait()  # the copies that it writes are about to be overwritten
        device = "cpu" if self.accelerator.is_main_process else None
        weights, optimizer, averaged = (
            self.network.state_dict(),
            self.optimizer.state_dict() if self.engine is None else self.engine.gathered_optimizer(device),
            self.averaged.state_dict(),
        )
        if self.sharding is not None:  # all processes give, the main one takes
            weights, optimizer, averaged = (gathered(state, device) for state in (weights, optimizer, averaged))
        streams = [] if self.stream is None else gather_object([self.stream.state_dict()])  # of all processes
        if self.accelerator.is_main_process:
            self.writer.submit(self._checkpoint_writer(weights, optimizer, averaged, streams))
        self.accelerator.wait_for_everyone()

    def _checkpoint_writer(
        self,
        weights: dict[str, Any],
        optimizer: dict[str, Any],
        averaged: dict[str, Any],
        streams: list[dict[str, Any]],
    ) -> Callable[[], None]:
        """A function that writes the state as it is now; in the background from copies, so that training may go on
        meanwhile.
        """
        target, limit = self.output_dir / f"checkpoint-{self.step}", self.args.run.checkpoints_total_limit
        weights = {name: value.contiguous() for name, value in weights.items()}
        time_learning, model = self.time, self.averaged
        scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        if self.args.run.async_checkpoints:
            if self.sharding is None:
                weights, optimizer = on_cpu(weights), on_cpu(optimizer)
            time_learning = copy.deepcopy(self.time)
        if self.args.run.async_checkpoints or self.sharding is not None:
            model = self._copy_of_averaged(averaged)
        saved = self.pipeline(model)
        description = self.description()
        position = {
            "format": 1,
            "step": self.step,
            "images_seen": self.images_seen,
            "seconds": self.seconds(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "evaluations_without_gain": 0 if self.changes is None else self.changes.waited,
        }

        def write() -> None:
            with explained_failure(self.output_dir):
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
                if self.repo_id is not None and self.args.run.push_checkpoints:
                    self.push_in_background(target, f"Step {position['step']}")
                prune(self.output_dir, limit)

        return write

    def _copy_of_averaged(self, averaged: dict[str, Any]) -> ModelMixin:
        """The averaged network as it is now, on the CPU; the same object at every call."""
        if self.copied is None:
            self.copied = self._new_network()
        self.copied.load_state_dict(averaged)
        if isinstance(self.copied, BoundModel):
            self.copied.take_scales(self.averaged)
        return self.copied

    def save_pipeline(self) -> None:
        """The finished pipeline in --output_dir itself; model_index.json comes last, so that it never names a half."""
        averaged = self.whole_average()
        if self.accelerator.is_main_process:
            with explained_failure(self.output_dir), atomic_folder(self.output_dir / "pipeline") as folder:
                pipeline = self.pipeline(averaged)
                pipeline.save_pretrained(folder)
                if isinstance(pipeline, VDMPipeline) and isinstance(pipeline.scheduler, VDMScheduler):
                    write_travelling_code(folder)  # with it the folder loads where this package is not
                write_json(folder / ARGUMENTS_FILE, self.description())
            written = self.output_dir / "pipeline"
            index = "config.json" if self.args.model.model in ("vae", "hvae") else "model_index.json"
            names = [path.name for path in written.iterdir() if path.name != index]
            (self.output_dir / index).unlink(missing_ok=True)
            for name in [*names, index]:
                if (self.output_dir / name).exists():
                    discard(self.output_dir / name)
                (written / name).rename(self.output_dir / name)
            discard(written)
            self.accelerator.print(f"saved the pipeline in {self.output_dir}")
        self.accelerator.wait_for_everyone()

    def publish(self) -> None:
        """The model card in --output_dir, and with --push_to_hub the model, its card and its pictures on the Hub."""
        if self.accelerator.is_main_process:
            images = {}
            for name, picture in self.last_samples.items():
                shutil.copyfile(picture, self.output_dir / name)
                images[name] = PICTURES[name].format(steps=self.args.diffusion.ddpm_num_inference_steps)
            if self.args.model.model in ("vae", "hvae") and self.last_samples:
                images[SAMPLES_FILE] = "Samples, not selected."
            write_model_card(self.output_dir, self.model_description(images))
            if self.repo_id is not None:
                run = self.args.run
                # through the queue of the checkpoints' pushes, so that none of them overtakes it
                push = publish_folder(
                    self.output_dir,
                    self.repo_id,
                    private=run.hub_private_repo or None,
                    token=run.hub_token,
                    run_as_future=True,
                )
                assert isinstance(push, Future)
                try:
                    push.result()
                except HUB_ERRORS as error:
                    again = (
                        "from vdm_diffusers.hub import publish_folder; "
                        f"publish_folder({str(self.output_dir)!r}, {self.repo_id!r})"
                    )
                    raise SaveError(
                        f"the model lies in {self.output_dir}, and was not pushed to {self.repo_id}: "
                        f"{one_line(error)} To push it again: "
                        f"python -c {shlex.quote(again)}"
                    ) from error
                self.accelerator.print(f"published {self.repo_id}")
        self.accelerator.wait_for_everyone()

    def push_in_background(self, folder: Path, message: str) -> None:
        """Queue the model in `folder` for the Hub.

        A push that fails is reported, and costs the run nothing but that push.
        """

        def report(push: Future[Any]) -> None:
            if push.exception() is not None:
                self.accelerator.print(f"warning: {message} was not pushed to {self.repo_id}: {push.exception()}")

        run = self.args.run
        try:
            push = publish_folder(
                folder,
                str(self.repo_id),
                private=run.hub_private_repo or None,
                commit_message=message,
                token=run.hub_token,
                run_as_future=True,
            )
        except OSError as error:  # no room for the copy that is pushed
            self.accelerator.print(f"warning: {message} was not pushed to {self.repo_id}: {error}")
            return
        assert isinstance(push, Future)
        push.add_done_callback(report)

    def model_description(self, images: dict[str, str]) -> ModelDescription:
        """What the model card says: what was trained on what, and the last evaluation."""
        args, seed = self.args, self.args.optimization.seed
        provenance, kind = Provenance.of_this_run(seed), args.model.model
        schedule = None if kind in ("vae", "hvae") else self.time.scheduler().noise_schedule
        identifier = "sklearn.datasets.load_digits" if is_digits(args.data) else self.train_images.source
        on_hub = args.data.dataset_name is not None and not Path(args.data.dataset_name).exists()
        measurements = []
        if self.last_evaluation is not None:
            result = self.last_evaluation
            terms = {term: result.get(term) for term in TERMS}
            data = EvaluationData(
                name=self.eval_images.source,
                identifier=identifier,
                version=f"blake2b {self.eval_images.fingerprint()}",
                split=evaluation_split(args.data),
                num_images=result["num_images"],
                config=args.data.dataset_config_name,
            )
            measurements.append(
                Measurement(
                    **without_nan(
                        {
                            name: result[name]
                            for name in ("bits_per_dim", "standard_error", "sampling_error", "is_bound")
                        }
                    ),
                    method="ELBO" if self.is_latent else f"ELBO in {result['method']} time",
                    num_steps=args.diffusion.ddpm_num_steps if result["method"] == "discrete" else None,
                    log_snr_max=schedule and schedule.log_snr_max,
                    log_snr_min=schedule and schedule.log_snr_min,
                    num_model_evaluations=result["num_model_evaluations"],
                    data=data,
                    provenance=provenance,
                    **terms,
                )
            )
        channels, height, width = self.train_images.images.shape[1:]
        parameters = sum(p.numel() for p in self.network.parameters())
        loss = "the bound" if schedule is None else f"{args.diffusion.loss}, schedule {schedule_name(args.diffusion)}"
        return ModelDescription(
            title=(self.repo_id or self.output_dir.resolve().name).split("/")[-1],
            summary=(
                f"A {MODEL_NAMES[kind]} of images of {height}x{width} pixels, {channels} channel(s), "
                f"{self.num_levels} levels."
            ),
            license=args.run.hub_license,
            training=(
                f"Trained on {self.train_images.name}: {self.step} optimiser steps of {self.global_batch} "
                f"images, loss {loss}, {parameters / 1e6:.2f}M weights{', averaged' if self.ema else ''}."
            ),
            training_data=[identifier] if on_hub else [],
            provenance=provenance,
            duration=f"{self.seconds() / 60:.1f} minutes, evaluations included",
            measurements=measurements,
            limitations=[
                f"It knows the kind of images it was trained on, at {height}x{width} pixels; nothing else was "
                "examined."
            ],
            location=self.repo_id or str(self.output_dir),
            images=images,
            num_inference_steps=args.diffusion.ddpm_num_inference_steps,
        )

    def _load_weights(self, checkpoint: Path) -> None:
        state = checkpoint / STATE_FOLDER
        position = json.loads((state / "state.json").read_text(encoding="utf-8"))
        self.step, self.images_seen = position["step"], position["images_seen"]
        self.started -= position["seconds"]
        self.skipped, self.skipped_in_a_row = position.get("skipped", 0), position.get("skipped_in_a_row", 0)
        try:
            self.network.load_state_dict(load_file(state / "weights.safetensors"))
            self.time.load(state)
            if self.is_latent:
                averaged = load_saved(self.args.model.model, checkpoint)
                for model in [self.network] if self.ema is None else [self.network, self.ema.model]:
                    model.take_scales(averaged)
            elif self.ema is not None:
                averaged = VDMPipeline.from_pretrained(checkpoint).unet
            if self.ema is not None:
                self.ema.model.load_state_dict(averaged.state_dict())
            if self.changes is not None:
                self.changes.waited = position.get("evaluations_without_gain", 0)
                if (self.output_dir / BEST_FOLDER / "evaluation.json").is_file():
                    self.changes.best = VDMPipeline.from_pretrained(self.output_dir / BEST_FOLDER).unet.state_dict()
        except RuntimeError as error:
            raise CheckpointError(
                f"{checkpoint} is of another network than the arguments describe: {error}"
            ) from error

    def _load_stream(self, checkpoint: Path) -> None:
        assert self.stream is not None
        path = checkpoint / STATE_FOLDER / "streams.json"
        if not path.is_file():
            raise CheckpointError(f"{checkpoint} is of a run without --streaming: it cannot go on with it.")
        streams = json.loads(path.read_text(encoding="utf-8"))
        self.stream.load_state_dict(streams[self.accelerator.process_index % len(streams)])

    def _load_optimizer(self, checkpoint: Path) -> None:
        state = checkpoint / STATE_FOLDER
        optimizer = torch.load(state / "optimizer.pt", map_location="cpu", weights_only=True)
        if self.engine is not None:
            self.engine.load_gathered_optimizer(optimizer)
        elif self.sharding is None:
            self.optimizer.load_state_dict(optimizer)
        else:
            load_gathered_optimizer(self.optimizer, optimizer)
        if self.accelerator.scaler is not None and (state / "scaler.pt").is_file():
            self.accelerator.scaler.load_state_dict(torch.load(state / "scaler.pt", weights_only=True))


def micro_batches(optimization: OptimizationArguments, num_processes: int) -> int:
    """Forward passes to an optimiser step: as asked, or as many as --global_batch_size takes on this number of
    processes.
    """
    asked = optimization.global_batch_size
    if asked is None:
        return optimization.gradient_accumulation_steps
    at_once = optimization.train_batch_size * num_processes
    if asked % at_once:
        raise SetupError(
            f"--global_batch_size {asked} must be a multiple of --train_batch_size {optimization.train_batch_size} "
            f"times {num_processes} "
            "process(es): change --train_batch_size."
        )
    return asked // at_once


def make_accelerator(args: Arguments) -> Accelerator:
    """Accelerate's view of the machine, with the tracker."""
    logger = None if args.run.logger == "none" else args.run.logger
    output_dir = args.run.output_dir
    folders = ProjectConfiguration(project_dir=output_dir, logging_dir=os.path.join(output_dir, args.run.logging_dir))
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.optimization.gradient_accumulation_steps,
            mixed_precision=chosen_precision(args.optimization.mixed_precision),
            log_with=logger,
            project_config=folders,
            kwargs_handlers=[
                # the others wait while one downloads data or draws samples
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),
                # the stages of a VAE with a diffusion prior do not reach all weights
                DistributedDataParallelKwargs(find_unused_parameters=args.model.model == "latent_vdm"),
            ],
        )
    except (ValueError, ImportError) as error:  # what this device cannot do, or what is not installed
        raise SetupError(str(error)) from error
    # the launcher's environment for DeepSpeed has one of its own
    accelerator.gradient_accumulation_steps = micro_batches(args.optimization, accelerator.num_processes)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would train in float32
        raise SetupError("--mixed_precision fp16 needs a GPU: on a CPU take bf16, or no.")
    return accelerator


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    args = parse_arguments(argv)
    diffusers_logging.set_verbosity_error()
    try:
        accelerator = make_accelerator(args)
        with contextlib.ExitStack() as stack:
            Training(args, accelerator, stack).train()
    except (SetupError, DataError, CheckpointError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # Accelerate itself may be what failed
            print(f"train.py: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except SaveError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        print(
            f"train.py: error: the disk has no room: {error}. Make some, and go on with --resume_from_checkpoint "
            "latest.",
            file=sys.stderr,
        )
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
