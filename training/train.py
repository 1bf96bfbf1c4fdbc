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

from arguments import Arguments, parse_arguments

if __name__ == "__main__":
    parse_arguments()  # --help and what cannot be are answered before the seconds that the imports below take

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from changes import Changes
from checkpoints import CheckpointError, CheckpointWriter, SaveError, list_checkpoints
from data import DataError, ImageSet, ImageStream
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging as diffusers_logging
from diffusion import DiffusionTask, Losses, Rows
from ema import EMA
from latent_models import LatentModel, LatentTask, Stage
from optimizers import clip_gradients
from randomness import seed_dropout
from run.constants import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    METRICS_FILE,
    NO_ROOM,
)
from run.launch import (
    SetupError,
    check_launch,
    make_accelerator,
)
from run.looking import draw_sample_grid, evaluate
from run.publishing import publish
from run.records import Batches, Log, Meter, duration, peak_memory
from run.saving import save_checkpoint, save_pipeline
from run.setup import announce, divide, load_images, make_the_network, make_the_optimizer, open_folder, prepare_loop
from sharding import Sharding, clip_divided_gradients, gathered
from stopping import StopSignal, Terminated
from time_learning import TimeLearning
from torch import Tensor, nn
from tqdm.auto import tqdm
from zero import ZeroEngine

from vdm_diffusers import VDMFlowScheduler, VDMPipeline, VDMScheduler


class Training:
    """A run: what is trained, on what, and where it stands. `run.setup` makes its parts, in this order."""

    args: Arguments
    accelerator: Accelerator
    sharding: Sharding | None  # FSDP's
    output_dir: Path
    repo_id: str | None  # on the Hub
    warnings: list[str | None]
    changes: Changes | None
    last_evaluation: dict[str, Any] | None
    last_samples: dict[str, Path]  # pictures of the model card
    stream: ImageStream | None
    train_images: ImageSet
    eval_images: ImageSet
    num_levels: int
    figure: str  # what the bits/dim are called
    network: Any
    network_class: Any
    num_classes: int | None
    ema: EMA | None
    scheduler: VDMScheduler | VDMFlowScheduler
    time: TimeLearning
    step: int
    images_seen: int
    skipped: int  # optimiser steps whose gradient was not finite
    skipped_in_a_row: int
    started: float  # moved back by what earlier parts of the run took
    logged_step: int
    training_seconds: float  # since the last entry of the log
    first_rate: float | None  # images a second, as the first entry had it
    model: Any  # the network, wrapped for several processes
    optimizer: Any
    engine: ZeroEngine | None
    take_step: Callable[[], Any]
    parameters: list[nn.Parameter]
    rows: int  # images of a micro-batch
    global_batch: int
    num_steps: int
    writer: CheckpointWriter
    copied: Any  # on the CPU, of the averaged network, for the background writer
    stages: Sequence[Stage]
    learning_rate_factors: dict[Stage, Callable[[int], float]]
    batches: Batches | ImageStream
    task: LatentTask | DiffusionTask
    meter: Meter
    log: Log
    stop: StopSignal

    def __init__(self, args: Arguments, accelerator: Accelerator, stack: contextlib.ExitStack) -> None:
        self.args, self.accelerator = args, accelerator
        check_launch(accelerator)
        zero = divide(self)
        resume_from = open_folder(self, stack)
        load_images(self)
        make_the_network(self, resume_from)
        optimizer = make_the_optimizer(self, zero, resume_from)
        prepare_loop(self, optimizer, resume_from, stack)

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
        announce(self)
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
                    save_checkpoint(self)
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
        save_pipeline(self)  # before anything that may fail
        with self.stop.at_once():
            if run.eval_steps != 0:
                evaluate(self)
            if run.sample_steps != 0:
                draw_sample_grid(self)
        publish(self)
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
                evaluate(self)
            if run.sample_steps and self.step % run.sample_steps == 0:
                draw_sample_grid(self)

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

    # --- looking at it

    # --- saving and loading


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
