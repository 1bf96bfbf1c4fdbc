"""What a run is made of, in the order in which it is made: division, folder, images, network, optimiser, loop."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import (
    set_seed,
)
from arguments import ARGUMENTS_FILE
from changes import Changes
from checkpoints import (
    CheckpointWriter,
    find_checkpoint,
    list_checkpoints,
    required_bytes,
    write_json,
)
from class_labels import check_labels
from data import (
    DataError,
    ImageStream,
    evaluation_split,
    figure_name,
    first_images,
    load_splits,
    overlap,
)
from diffusers.optimization import get_scheduler
from diffusion import DiffusionTask, make_scheduler, schedule_name
from ema import EMA
from latent_models import (
    LatentTask,
    make_latent_model,
    make_stages,
)
from networks import compile_network, make_network, no_class_label
from optimizers import make_optimizer
from output_folder import set_aside
from precision import slow_bf16
from randomness import DataOrder
from sharding import in_precision, requested_sharding, shard
from stopping import StopSignal
from time_learning import TimeLearning
from zero import ZeroEngine, requested_zero

from vdm_diffusers.models.labels import num_classes

from .launch import (
    SetupError,
    changed_arguments,
    hub_repository,
    idle_cores,
    num_train_steps,
    prepare_output_dir,
    warmup_steps,
)
from .records import Batches, Log, Meter
from .saving import load_optimizer, load_stream, load_weights

if TYPE_CHECKING:
    from train import Training


def divide(training: Training) -> Any:
    """Whether FSDP or DeepSpeed divides weights or states among the processes; DeepSpeed's configuration, or None."""
    args, accelerator, optimization = training.args, training.accelerator, training.args.optimization
    try:
        training.sharding, zero = requested_sharding(accelerator), requested_zero(accelerator)
    except ValueError as error:
        raise SetupError(str(error)) from error
    if (training.sharding or zero) and (training.is_latent or optimization.optimizer == "muon"):
        what = (
            "--optimizer muon needs whole matrices"
            if not training.is_latent
            else f"--model {args.model.model} is small"
        )
        raise SetupError(
            f"{what}: {'FSDP divides them' if training.sharding else 'DeepSpeed divides their gradients'}. "
            "Use training/accelerate_configs/ddp.yaml or --optimizer adamw."
        )
    if zero and optimization.channels_last:
        raise SetupError("--channels_last: DeepSpeed lays all weights out in one row.")
    return zero


def open_folder(training: Training, stack: contextlib.ExitStack) -> Path | None:
    """Lock --output_dir and ask the Hub; the checkpoint to resume from, or None."""
    args, accelerator, optimization = training.args, training.accelerator, training.args.optimization
    training.output_dir, lock = prepare_output_dir(args, accelerator)
    stack.callback(lock.release)
    resume_from, training.warnings = None, [*args.notes, idle_cores(accelerator)]
    if args.run.resume_from_checkpoint:
        resume_from, passed_over = find_checkpoint(training.output_dir, args.run.resume_from_checkpoint)
        training.warnings += passed_over
        accelerator.wait_for_everyone()  # nothing is renamed before everybody has found it
        if accelerator.is_main_process:
            training.warnings += set_aside(training.output_dir, resume_from)
        accelerator.wait_for_everyone()
    # a login that is missing is found out now, not in days
    training.repo_id = hub_repository(args, training.output_dir) if accelerator.is_main_process else None
    training.last_evaluation = None
    training.changes = None
    if args.run.eval_change_samples and not training.is_latent:
        training.changes = Changes(
            num_samples=args.run.eval_change_samples,
            seed=optimization.seed,
            batch_size=args.run.eval_batch_size,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
    training.last_samples = {}  # pictures of the model card
    return resume_from


def load_images(training: Training) -> None:
    """The images to train on and to evaluate on, and what is odd about them."""
    args, accelerator, optimization = training.args, training.accelerator, training.args.optimization
    device = accelerator.device
    with accelerator.local_main_process_first():  # the others find what the first has downloaded
        training.stream = None
        if args.data.streaming:
            places = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
            split = args.data.train_split
            training.stream = ImageStream(args.data, split, optimization.seed, device=accelerator.device, **places)
            training.train_images = training.stream.first
            training.eval_images = first_images(args.data, evaluation_split(args.data), args.run.eval_max_images)
        else:
            training.train_images, training.eval_images = load_splits(args.data, optimization.seed)
    if args.run.eval_max_images is not None:
        training.eval_images = training.eval_images.first(args.run.eval_max_images)
    training.num_levels = args.data.num_levels or training.train_images.num_levels
    highest = max(training.train_images.highest, training.eval_images.highest)
    if highest >= training.num_levels:
        raise DataError(f"--num_levels {training.num_levels}: the images hold level {highest}.")

    if optimization.allow_tf32 and device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    training.warnings += [slow_bf16(accelerator.mixed_precision, device)]
    training.warnings += [*training.train_images.warnings, *training.eval_images.warnings]
    training.figure = figure_name(args.data, evaluation_split(args.data), conditional=args.model.class_conditional)
    if training.stream is None and accelerator.is_main_process:
        training.warnings += [overlap(training.train_images, training.eval_images)]


def make_the_network(training: Training, resume_from: Path | None) -> None:
    """The network, its average and the schedule, with the weights to go on with."""
    args, optimization, device = training.args, training.args.optimization, training.accelerator.device
    set_seed(optimization.seed)
    try:
        if training.is_latent:
            training.network = make_latent_model(args, training.train_images, training.num_levels)
        else:
            training.network = make_network(args, training.train_images)
            dropout = args.model.class_dropout
            check_labels(training.network, training.train_images, training.eval_images, class_dropout=dropout)
        training.scheduler = make_scheduler(args.diffusion)
    except ValueError as error:  # sizes or schedules that cannot be; the message says which
        raise SetupError(str(error)) from error
    training.time = TimeLearning(args.diffusion, training.scheduler, device)
    training.num_classes, training.network_class = num_classes(training.network), type(training.network)
    training.network.to(device).train()
    if optimization.gradient_checkpointing or (
        training.sharding is not None and training.sharding.gradient_checkpointing
    ):
        training.network.enable_gradient_checkpointing()
    if optimization.channels_last:
        training.network.to(memory_format=torch.channels_last)
    training.ema = None
    if optimization.use_ema:
        options = {"inv_gamma": optimization.ema_inv_gamma, "power": optimization.ema_power}
        training.ema = EMA(training.network, **options, max_decay=optimization.ema_max_decay)
    training.step = training.images_seen = training.logged_step = 0
    training.skipped = training.skipped_in_a_row = 0  # optimiser steps whose gradient was not finite
    training.training_seconds = 0.0  # since the last entry of the log
    training.first_rate = None  # images a second, as the first entry had it
    training.started = time.perf_counter()  # moved back by what earlier parts of the run took
    if resume_from is not None:
        load_weights(training, resume_from)
    if training.sharding is not None:
        shard(training.network, training.sharding, device, compile=optimization.compile)
        if training.ema is not None:
            shard(training.ema.model, training.sharding, device)
            training.ema.follow(training.network)
    elif optimization.compile:
        compile_network(training.network, device, training.train_images.images[0, 0].numel())


def make_the_optimizer(training: Training, zero: Any, resume_from: Path | None) -> torch.optim.Optimizer:
    """The optimiser and what takes a step with it: one process, several with whole weights, or FSDP or DeepSpeed."""
    accelerator, optimization = training.accelerator, training.args.optimization
    device = accelerator.device
    try:
        optimizer = make_optimizer(
            optimization.optimizer,
            training.network.named_parameters(),
            lr=optimization.learning_rate,
            betas=(optimization.adam_beta1, optimization.adam_beta2),
            weight_decay=optimization.adam_weight_decay,
            eps=optimization.adam_epsilon,
            fused=device.type in ("cpu", "cuda"),
        )
    except ValueError as error:
        raise SetupError(str(error)) from error
    training.engine = None
    if zero is not None:
        sizes = {"rows": optimization.train_batch_size, "accumulation": accelerator.gradient_accumulation_steps}
        limit = optimization.max_grad_norm or 0.0
        training.engine = ZeroEngine(training.network, optimizer, zero, accelerator, **sizes, max_grad_norm=limit)
        training.model, training.optimizer = training.engine, optimizer
    elif training.sharding is None:
        training.model, training.optimizer = accelerator.prepare(training.network, optimizer)
    else:
        training.model, training.optimizer = (
            in_precision(training.network, accelerator),
            accelerator.prepare_optimizer(optimizer),
        )
    # Accelerate's wrapper looks for an optional package on the disk at every step: needed for float16's scaling
    # alone
    training.take_step = optimizer.step if accelerator.scaler is None else training.optimizer.step
    training.parameters = list(
        training.network.parameters()
    )  # walking the modules at each step would cost a millisecond
    if resume_from is not None:
        load_optimizer(training, resume_from)
    return optimizer


def prepare_loop(
    training: Training, optimizer: torch.optim.Optimizer, resume_from: Path | None, stack: contextlib.ExitStack
) -> None:
    """How many steps of which rates, the batches, the task, the log: what the loop turns."""
    args, accelerator, optimization = training.args, training.accelerator, training.args.optimization
    device = accelerator.device
    training.rows = optimization.train_batch_size
    training.global_batch = training.rows * accelerator.num_processes * accelerator.gradient_accumulation_steps
    training.num_steps = num_train_steps(args, len(training.train_images), training.global_batch)
    training.writer = CheckpointWriter(in_background=args.run.async_checkpoints)
    training.copied = None  # on the CPU, of the averaged network, for the background writer
    if accelerator.is_main_process:
        check_disk(training)
    # The schedule is used as a function of the optimiser step: nothing to save, nothing that could count
    # otherwise.
    training.stages = make_stages(args, training.num_steps)
    training.learning_rate_factors = {
        stage: get_scheduler(
            optimization.lr_scheduler,
            optimizer,
            num_warmup_steps=warmup_steps(optimization.lr_warmup_steps, stage.end - stage.first),
            num_training_steps=stage.end - stage.first,
        ).lr_lambdas[0]
        for stage in training.stages
    }
    order = DataOrder(len(training.train_images), optimization.seed)
    training.batches = Batches(training.train_images, order, device) if training.stream is None else training.stream
    if resume_from is not None and training.stream is not None:
        load_stream(training, resume_from)
    common = {"seed": optimization.seed, "device": device, "random_flip": args.data.random_flip}
    if training.is_latent:
        training.task = LatentTask(training.stages, **common)
    else:
        training.task = DiffusionTask(
            args.diffusion,
            training.scheduler,
            num_levels=training.num_levels,
            num_classes=training.num_classes,
            class_dropout=args.model.class_dropout,
            dropped_label=no_class_label(training.network, training.train_images),
            learned_schedule=training.time.schedule,
            sampler=training.time.sampler,
            **common,
        )
    training.meter = Meter(training.scheduler, device)
    training.log = Log(accelerator, args, training.output_dir, training.step)
    training.stop = StopSignal(accelerator, args.run.max_minutes)
    stack.callback(training.stop.restore)
    if accelerator.is_main_process:
        write_json(training.output_dir / ARGUMENTS_FILE, training.description())
    if resume_from is not None:
        training.warnings += [changed_arguments(resume_from, args, training.global_batch)]
        accelerator.print(f"resuming from {resume_from} at step {training.step}")


def check_disk(training: Training) -> None:
    """Raise SetupError if the checkpoints cannot fit on the disk: now, and not in the night."""
    run = training.args.run
    weights = sum(p.numel() * p.element_size() for p in training.network.parameters())
    copies = 3 + (training.ema is not None)  # weights, AdamW's two moments, the average
    saves = math.ceil((training.num_steps - training.step) / run.checkpointing_steps)
    present = len(list_checkpoints(training.output_dir))
    needed = required_bytes(copies * weights, saves, run.checkpoints_total_limit, present)
    free = shutil.disk_usage(training.output_dir).free
    if needed > free:
        raise SetupError(
            f"the checkpoints need about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in --output_dir "
            f"{training.output_dir}. "
            "Give one on another disk, keep fewer (--checkpoints_total_limit), or save less often "
            "(--checkpointing_steps)."
        )


def announce(training: Training) -> None:
    """Say what will be done."""
    accelerator = training.accelerator
    for warning in filter(None, training.warnings):
        accelerator.print(warning)
    parameters = sum(p.numel() for p in training.network.parameters())
    shape = "x".join(map(str, training.train_images.images.shape[1:]))
    diffusion = training.args.diffusion
    objective = (
        "trained by its bound"
        if training.is_latent
        else (
            f"predicts {diffusion.prediction_type}, loss {diffusion.loss} in "
            f"{'discrete' if training.task.discrete else 'continuous'} time, schedule {schedule_name(diffusion)}"
        )
    )
    passes = training.num_steps * training.global_batch / len(training.train_images)
    epochs = f"{passes:.1f} epochs" if training.stream is None else "read in passing"
    divided = ", weights divided" if training.sharding else ", optimiser states divided" if training.engine else ""
    accelerator.print(
        f"training on {training.train_images.name} ({shape}, {training.num_levels} levels)\n"
        f"evaluating on {training.eval_images.name}\n"
        f"network: {training.network_class.__name__}, {parameters / 1e6:.2f}M weights; {objective}\n"
        f"{training.num_steps} optimiser steps of {training.global_batch} images ({training.rows} x "
        f"{accelerator.num_processes} process(es) x "
        f"{accelerator.gradient_accumulation_steps} micro-batch(es)), {epochs}, on "
        f"{accelerator.device}{divided}, precision {accelerator.mixed_precision}\n"
        f"writing to {training.output_dir}"
    )
