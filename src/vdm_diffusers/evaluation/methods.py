"""The ways to evaluate a likelihood, each with the options that mean something to it.

    evaluate_likelihood(pipe, images, method=Discrete(num_steps=50, grid="optimal"))
    evaluate_likelihood(pipe, images, method="discrete", num_steps=50, grid="optimal")   # the same, in words

An option of another method is refused: it would have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from vdm_diffusers.evaluation.chains import Grid
from vdm_diffusers.numerics import whole_number
from vdm_diffusers.probability_flow import Dequantization, Divergence


@dataclass(frozen=True, eq=False)
class Continuous:
    """The bound in continuous time: the diffusion term is an integral over log SNR (Kingma et al. 2021, equation 17).

    Attributes:
        variance_type: the reverse variance of a table of betas' last step, instead of the scheduler's.
        variance_reduction: place evaluations where they are worth most, and use control variates.
    """

    name: ClassVar[str] = "continuous"
    variance_type: str | None = None
    variance_reduction: bool = True


@dataclass(frozen=True, eq=False)
class Discrete:
    """The bound of a chain of `num_steps` steps (Ho et al. 2020, equation 5).

    Attributes:
        num_steps: steps of the chain; None: the scheduler's `num_train_timesteps`.
        grid: where they are: "time", "log_snr", "optimal", or decreasing log SNRs; None: the scheduler's own choice.
        variance_type: the reverse variance, instead of the scheduler's.
        variance_reduction: place evaluations where they are worth most, and use control variates.
    """

    name: ClassVar[str] = "discrete"
    num_steps: int | None = None
    grid: Grid | Sequence[float] | Tensor | None = None
    variance_type: str | None = None
    variance_reduction: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", whole_number("num_steps", self.num_steps))


@dataclass(frozen=True, eq=False)
class ImportanceWeighted:
    """The K-sample bound of that chain, tighter than the ELBO (Burda et al. 2016): K is half of `num_samples`.

    Attributes:
        num_steps, grid, variance_type: as in [`Discrete`].
    """

    name: ClassVar[str] = "importance_weighted"
    num_steps: int | None = None
    grid: Grid | Sequence[float] | Tensor | None = None
    variance_type: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", whole_number("num_steps", self.num_steps))


@dataclass(frozen=True, eq=False)
class ProbabilityFlow:
    """-ln p of the probability-flow ODE (Song et al. 2021, equation 39), `num_samples` trajectories an image.

    Attributes:
        dequantization: "none" (the noise of z_0 and the softmax decoder), "uniform" or "truncated_normal".
        divergence: "hutchinson" (one fixed probe a trajectory, unbiased) or "exact" (D backward passes a step).
        tolerance: of the solver, relative and absolute.
    Raises:
        ValueError: a word that is none of these, or a tolerance that is not positive.
    """

    name: ClassVar[str] = "ode"
    dequantization: Dequantization = "none"
    divergence: Divergence = "hutchinson"
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        for name, allowed in (("dequantization", get_args(Dequantization)), ("divergence", get_args(Divergence))):
            if (text := getattr(self, name)) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {text!r}.")
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"`tolerance` must be a positive number, got {self.tolerance}.")


EstimationMethod = Continuous | Discrete | ImportanceWeighted | ProbabilityFlow
Method = Literal["continuous", "discrete", "ode", "importance_weighted"]
METHODS: tuple[str, ...] = get_args(Method)
_CLASSES: dict[str, type[EstimationMethod]] = {c.name: c for c in get_args(EstimationMethod)}


def chosen_method(method: Method | EstimationMethod, options: Mapping[str, Any]) -> EstimationMethod:
    """The method object that a word and separate options mean, or the object itself.

    Args:
        method: a word of `METHODS`, or a method object, which holds its own options.
        options: those that were given beside it; None: not given.
    Raises:
        ValueError: an unknown method, an option that means nothing to it, or options beside a method object.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not isinstance(method, str):
        if not isinstance(method, get_args(EstimationMethod)):
            classes = ", ".join(c.__name__ for c in _CLASSES.values())
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, or a {classes} object, got {method!r}.")
        if given:
            raise ValueError(
                f"`{next(iter(given))}` was given beside a method object: write "
                f"method={type(method).__name__}({next(iter(given))}=...)."
            )
        return method
    if method not in _CLASSES:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    own = {field.name for field in fields(_CLASSES[method])}
    for name, value in given.items():
        if name not in own:
            others = [word for word, c in _CLASSES.items() if name in {field.name for field in fields(c)}]
            raise ValueError(
                f"`{name}` belongs to method={' or '.join(map(repr, others))}, got {value} with method={method!r}: "
                "leave it out."
            )
    return _CLASSES[method](**given)
