"""What training changed: the held-out bits/dim against the last evaluation and against the best one, with small
errors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from class_labels import labels_to_evaluate
from data import ImageSet
from randomness import generator_for
from torch import nn

from vdm_diffusers import VDMPipeline, compare_likelihood


@dataclass
class Changes:
    """The weights of earlier evaluations, and what the latest ones gained on them.

    Both sets of weights see the same images, noise levels and noise: the difference is known a hundred times better
    than either figure.

    Attributes:
        num_samples: evaluations of each network for an image.
        seed, batch_size: as of the evaluation.
        process_index, num_processes: the images are shared out among the processes.
        waited: evaluations in a row that were not better than the best.
    """

    num_samples: int
    seed: int
    batch_size: int
    process_index: int = 0
    num_processes: int = 1
    waited: int = 0
    last: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    best: dict[str, torch.Tensor] | None = field(default=None, repr=False)

    def measure(
        self, averaged: nn.Module, pipeline_of: Callable[[Any], VDMPipeline], images: ImageSet
    ) -> dict[str, float]:
        """`since_last`, `since_best` and their errors in bits/dim (negative: better), and whether these weights are
        the best so far.

        A gain on the best counts if it is larger than its error.
        """
        result: dict[str, float] = {}
        since_best = -math.inf
        for name, weights in (("last", self.last), ("best", self.best)):
            if weights is None:
                continue
            if name == "best" and self.best is self.last:  # one comparison says both
                result["since_best"], result["since_best_error"] = result["since_last"], result["since_last_error"]
            else:
                earlier = copy.deepcopy(averaged)
                earlier.load_state_dict(weights)
                difference, error = self._difference(pipeline_of(averaged), pipeline_of(earlier.eval()), images)
                result[f"since_{name}"], result[f"since_{name}_error"] = difference, error
        if self.best is not None:
            since_best = result["since_best"] + result["since_best_error"]
        self.last = {name: value.detach().to("cpu", copy=True) for name, value in averaged.state_dict().items()}
        is_best = since_best < 0
        if is_best:
            self.best, self.waited = self.last, 0
        else:
            self.waited += 1
        return result | {"is_best": float(is_best), "evaluations_without_gain": float(self.waited)}

    def _difference(self, new: VDMPipeline, old: VDMPipeline, images: ImageSet) -> tuple[float, float]:
        mine = torch.arange(self.process_index, len(images), self.num_processes)
        parts: list[tuple[float, float, int]] = []
        if len(mine):
            labels = labels_to_evaluate(new.unet, images)
            learned = str(new.scheduler.config.variance_type).startswith("learned")
            given: dict[str, Any] = {} if labels is None else {"class_labels": labels[mine]}
            report = compare_likelihood(
                new,
                old,
                images.images[mine],
                method="discrete" if learned else None,
                num_samples=self.num_samples,
                batch_size=self.batch_size,
                generator=generator_for(self.seed, "changes", self.process_index),
                progress_bar=False,
                **given,
            )
            parts.append((report.difference, report.standard_error, len(mine)))
        if self.num_processes > 1:
            parts = gather_object(parts)
        total = sum(count for *_, count in parts)
        difference = sum(value * count for value, _, count in parts) / total
        return difference, math.sqrt(sum((error * count) ** 2 for _, error, count in parts)) / total


def one_line(changes: dict[str, float]) -> str:
    """The changes for people."""
    texts = [
        f"{changes[f'since_{name}']:+.4f} +- {changes[f'since_{name}_error']:.4f} since the {what}"
        for name, what in (("last", "last evaluation"), ("best", "best"))
        if f"since_{name}" in changes
    ]
    return "; ".join(texts)
