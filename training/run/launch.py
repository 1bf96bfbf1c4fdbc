"""What is checked and made before a run starts: the processes, the folder, the repository, how many steps."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    broadcast_object_list,
)
from arguments import ARGUMENTS_FILE, Arguments, OptimizationArguments, RunArguments
from checkpoints import (
    clean_up,
)
from output_folder import FolderError, RunLock, check_output_dir, start_anew
from precision import chosen_precision

from vdm_diffusers.hub import (
    HUB_ERRORS,
    check_hub_access,
)

from .constants import (
    OWN_FILES,
)

if TYPE_CHECKING:
    pass


class SetupError(RuntimeError):
    """The run cannot start as asked; the message says what to do."""


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
