"""Independent repetitions of an estimate, and the work that they are: done here, shared among processes, or kept on
disk.

Estimators that are no sum over sites (`vdm_diffusers.likelihood.evaluate_importance_weighted`,
`probability_flow.evaluate_flow`, `latent_evaluation.evaluate_latent_likelihood`) are repeated with independent noise;
the scatter of the repetitions is their error. `likelihood.evaluate_bound` has an error from shifted lattices instead,
and shares the runner and the rule for how to go on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

_LEAST_FREEDOM = 8  # degrees of freedom of an error that decides how many repetitions follow

Runner = Callable[[Sequence[tuple[str, Callable[[], Tensor]]]], list[Tensor]]
"""Runs named pieces of work and returns their results in order.

`run_all` does them here and now; other runners distribute the pieces over processes or cache them on disk by name.
"""


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

    def room(self, cost: float, done: int) -> int:
        """How much more may follow what was `done`, at `cost` evaluations each."""
        if self.max_model_evaluations is None:
            return 1 << 62
        return max(0, int(self.max_model_evaluations / cost) - done)

    def next_round(self, error_of_one: float, done: int, most: int, least: int) -> int:
        """How many more are to follow what was `done`, in multiples of `least`, at most about `most`; 0: the target is
        reached.

        `error_of_one` is the error of an estimate from one alone, itself an estimate: two fifths more are taken than
        it asks for.
        """
        if self.target_standard_error is None:
            return 0
        missing = 1.4 * (error_of_one / self.target_standard_error) ** 2 - done
        return max(0, math.ceil(min(missing, most) / least) * least)


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
        cost: evaluations of one repetition of one image. None: it shows only as they run; then two repetitions come
            first, and the budget says how many follow.
        separate_images: whether images are independent of each other within a repetition.
    Raises:
        ValueError: a budget that does not allow the first repetitions.
    """
    if cost is not None:
        budget.check(cost * first * num_images, f"{cost * first} x {num_images}")
    done = 0

    def more(size: int) -> Tensor:
        """(1 + V, R, N) of `size` further repetitions."""
        nonlocal done
        flat = torch.arange(done * num_images, (done + size) * num_images)
        work = [
            (f"{done}-{size}-{i}", partial(draw, part % num_images, part // num_images))
            for i, part in enumerate(flat.split(batch_size))
        ]
        done += size
        return torch.cat(runner(work), dim=1).unflatten(1, (size, num_images))

    def error_of(found: Tensor) -> float:
        nats = found[1] if separate_images else found[1].sum(1, keepdim=True)
        return math.sqrt(float(nats.var(0).sum()) / len(nats)) / num_images / num_dims / math.log(2)

    def room(*parts: Tensor) -> int:
        found = sum(float(part[0].sum()) for part in parts) / max(done, 1)
        # a cost that only shows as they run may come out a little higher
        return max(0, budget.room(found, done) if cost is not None else budget.room(1.3 * found, 0) - done)

    decided = more(first if cost is not None or budget.max_model_evaluations is None else 2)
    if decided.shape[1] < first and (size := min(first - decided.shape[1], room(decided))) > 0:
        decided = torch.cat([decided, more(size)], dim=1)
    reported = decided[:, :0]
    # independent repetitions decide how many follow: an estimate that stops where its own error is low stops where it
    # is low itself
    fewest = max(2, math.ceil(_LEAST_FREEDOM / (num_images if separate_images else 1)) + 1)
    while budget.target_standard_error is not None:
        number, deciding = reported.shape[1], decided.shape[1]
        missing = max(fewest, number // 8) - deciding
        error_of_one = error_of(decided) * math.sqrt(deciding)
        size = (
            missing
            if missing > 0
            else budget.next_round(error_of_one, number, max(number, deciding), 1 if number else 2)
        )
        size = min(size, allowed := room(decided, reported))
        if size > 0 and missing > 0:
            decided = torch.cat([decided, more(size)], dim=1)
        elif size > 0:
            reported = torch.cat([reported, more(size)], dim=1)
        if size <= 0 or size == allowed:
            break
    if reported.shape[1] < 2 or (size == allowed and reported.shape[1] < decided.shape[1]):
        reported, decided = decided, reported
    spent = int(reported[0].sum() + decided[0].sum())
    return Repetitions(reported[1:].mean(1), reported.shape[1], error_of(reported), spent)


def mix_seed(seed: int, *parts: int | str) -> int:
    """A seed made of several: the same on every machine, and unrelated for neighbouring parts."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
