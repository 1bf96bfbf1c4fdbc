"""What a run says of itself: batches on their way, the losses of many steps, the log and its trackers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import resource
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from arguments import Arguments
from checkpoints import (
    without_nan,
    write_text,
)
from data import (
    ImageSet,
)
from diffusion import Losses
from randomness import DataOrder
from torch import Tensor

from vdm_diffusers import VDMFlowScheduler, VDMScheduler

from .constants import (
    BATCHES_HELD,
    BYTES_KEPT_ON_DEVICE,
    METRICS_FILE,
    NUM_BINS,
)
from .launch import (
    SetupError,
)

if TYPE_CHECKING:
    pass


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
