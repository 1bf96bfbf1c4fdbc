"""Independent repetitions of an estimate, and the work that they are: done here, shared among processes, or kept on disk.

Estimators that are no sum over sites (`vdm_diffusers.likelihood.evaluate_importance_weighted`, `probability_flow.evaluate_flow`,
`latent_evaluation.evaluate_latent_likelihood`) are repeated with independent noise; the scatter of the repetitions is their error.
`likelihood.evaluate_bound` has an error from shifted lattices instead, and shares the runner and the rule for how to go on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Runner = Callable[[Sequence[tuple[str, Callable[[], Tensor]]]], list[Tensor]]
"""Runs named pieces of work and returns their results in order. Others than the plain one share the work, or keep the results."""


def run_all(work: Sequence[tuple[str, Callable[[], Tensor]]]) -> list[Tensor]:
    """The plain runner: everything, here and now."""
    return [compute() for _, compute in work]


@dataclass(frozen=True)
class Budget:
    """How far to go beyond what was asked for first.

    Attributes:
        target_standard_error: in the unit of the report, or None: not at all.
        max_model_evaluations: stop before more than these, reached or not.
    Raises:
        ValueError: a target that is not positive.
    """

    target_standard_error: float | None = None
    max_model_evaluations: int | None = None

    def __post_init__(self) -> None:
        if self.target_standard_error is not None and not self.target_standard_error > 0:
            raise ValueError(f"`target_standard_error` must be positive, got {self.target_standard_error}.")

    def check(self, evaluations: int, what: str) -> None:
        """Raise ValueError unless the first evaluations fit."""
        if self.max_model_evaluations is not None and self.max_model_evaluations < evaluations:
            raise ValueError(
                f"`max_model_evaluations` must allow `num_samples` for each image, {what} = {evaluations}, got "
                f"{self.max_model_evaluations}."
            )

    def next_round(self, error: float, done: int, spent: int, least: int) -> int:
        """How much more of what was `done` at the cost of `spent` evaluations; 0: enough.

        As much as the present error asks for, but no more than there is already: the error is itself an estimate.
        """
        if self.target_standard_error is None or error <= self.target_standard_error:
            return 0
        size = max(least, math.ceil(done * min(1.0, 1.1 * (error / self.target_standard_error) ** 2 - 1)))
        size = math.ceil(size / least) * least
        if self.max_model_evaluations is not None:
            allowed = (self.max_model_evaluations - spent) * done // spent
            size = min(size, allowed // least * least)
        return max(size, 0)


@dataclass(frozen=True, eq=False)
class Repetitions:
    """What was found.

    Attributes:
        values: (V, N) means over the repetitions, of each image; the first are the nats.
        number: R, how many repetitions.
        standard_error: of the mean of the nats over the images, in bits/dim.
        num_model_evaluations: in all.
    """

    values: Tensor
    number: int
    standard_error: float
    num_model_evaluations: int


def repeat(
    draw: Callable[[Tensor, Tensor], Tensor],
    num_images: int,
    num_dims: int,
    first: int,
    *,
    batch_size: int,
    budget: Budget,
    cost: int | None,
    runner: Runner = run_all,
    separate_images: bool = True,
) -> Repetitions:
    """`first` repetitions for every image, and more where the budget asks for them.

    Arguments:
        draw: (images (M,), repetitions (M,)) -> (1 + V, M) float64: the evaluations that each took, and its values.
        first: at least 2.
        batch_size: what `draw` is given at a time, at most.
        cost: evaluations of one repetition of one image. None: it shows only as they run; then two repetitions come first, and the
            budget says how many follow.
        separate_images: whether images are independent of each other within a repetition.
    Raises:
        ValueError: a budget that does not allow the first repetitions.
    """
    if cost is not None:
        budget.check(cost * first * num_images, f"{cost * first} x {num_images}")
    rounds: list[Tensor] = []
    names: list[str] = []
    size = first if cost is not None or budget.max_model_evaluations is None else 2
    while size > 0:
        done = sum(r.shape[1] for r in rounds)
        names.append(str(size))
        flat = torch.arange(done * num_images, (done + size) * num_images)
        work = [
            (f"{'-'.join(names)}-{i}", partial(draw, part % num_images, part // num_images))
            for i, part in enumerate(flat.split(batch_size))
        ]
        rounds.append(torch.cat(runner(work), dim=1).unflatten(1, (size, num_images)))
        everything = torch.cat(rounds, dim=1)  # (1 + V, R, N)
        nats, spent, number = everything[1], int(everything[0].sum()), done + size
        sums = nats if separate_images else nats.sum(1, keepdim=True)
        error = math.sqrt(float(sums.var(0).sum()) / number) / num_images / num_dims / math.log(2)
        if number < first:
            allowed = (budget.max_model_evaluations or 0) * number // spent
            size = max(0, min(first, allowed) - number)
            if size > 0:
                continue
        size = budget.next_round(error, number, spent, 1)
    return Repetitions(everything[1:].mean(1), number, error, spent)


def mix_seed(seed: int, *parts: int | str) -> int:
    """A seed made of several: the same on every machine, and unrelated for neighbouring parts."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
