"""Where the steps of a flow-matching sampler are: `FlowMatchEulerDiscreteScheduler`'s sigmas, in float64.

The sigmas are spread over (0, 1], shifted, stretched, and respaced, in this order, as a config says:

    even         u from sigma_max to sigma_min, or what is handed in
    shifted      shift u / (1 + (shift - 1) u), or with `use_dynamic_shifting` by mu, which the pipeline computes from
    the resolution stretched    so that the last is `shift_terminal`
    respaced     between the same ends: Karras, exponential or beta

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers"; Karras et al. 2022; Lee et al. 2024, "Beta Sampling
    is All You Need"; `FlowMatchEulerDiscreteScheduler`, whose samples these give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
TIME_SHIFTS = ("exponential", "linear")
Numbers = Sequence[float] | Tensor | NDArray[Any]
Values = NDArray[np.float64]


def numbers(value: Numbers) -> Values:
    """(n,) float64."""
    host = value.detach().cpu() if isinstance(value, Tensor) else value
    return np.asarray(host, dtype=np.float64)


def place_sigmas(
    config: Mapping[str, Any],
    *,
    num_steps: int | None,
    sigmas: Numbers | None,
    timesteps: Numbers | None,
    mu: float | None,
    shift: float,
    ends: tuple[float, float],
) -> Values:
    """(n,) float64 sigmas of the steps, descending, before any inversion.

    Arguments:
        num_steps: n; may be left out with `sigmas` or `timesteps`.
        sigmas, timesteps: what is handed in, before the shift. The sigmas of timesteps alone are timesteps / T.
        mu: of a dynamic shift. shift: of a static one.
        ends: the largest and the smallest sigma of even steps.
    Raises:
        ValueError: nothing says how many steps; lengths that differ; `mu` missing, or given where it means nothing;
            sigmas that do not descend inside (0, 1].
    """
    given = [len(v) for v in (sigmas, timesteps) if v is not None] + ([] if num_steps is None else [num_steps])
    if not given or len(set(given)) > 1:
        raise ValueError(
            "say how many steps: pass `num_inference_steps`, `sigmas` or `timesteps`, of one length where there are "
            "several, got "
            f"{given or 'none of them'}."
        )
    if given[0] < 1 or int(given[0]) != given[0]:
        raise ValueError(f"`num_inference_steps` must be a positive integer, got {given[0]}.")
    if sigmas is not None:
        chosen = numbers(sigmas)
    elif timesteps is not None:
        chosen = numbers(timesteps) / config["num_train_timesteps"]
    else:
        chosen = np.linspace(*ends, int(given[0]))
    check_sigmas(
        chosen, "`sigmas`" if timesteps is None or sigmas is not None else "`timesteps` / num_train_timesteps"
    )
    return respaced(stretched(shifted(chosen, config, mu, shift), config["shift_terminal"]), config)


def check_sigmas(sigmas: Values, name: str) -> None:
    """Raise ValueError unless sigmas descend inside (0, 1]."""
    if sigmas.ndim != 1 or not len(sigmas):
        raise ValueError(f"{name} must be a list of at least one number, got shape {sigmas.shape}.")
    if not bool(((sigmas > 0) & (sigmas <= 1 + 1e-6)).all()):
        first = sigmas[~((sigmas > 0) & (sigmas <= 1 + 1e-6))][0]
        raise ValueError(
            f"{name} must lie in (0, 1], 1 being pure noise, got {first:g}. The end at 0 is added: leave it out."
        )
    if bool((np.diff(sigmas) > 0).any()):
        raise ValueError(f"{name} must descend, from noise to data, got {sigmas[0]:g} to {sigmas[-1]:g}.")


def shifted(sigmas: Values, config: Mapping[str, Any], mu: float | None, shift: float) -> Values:
    """The sigmas after a static shift, or a dynamic one by mu.

    Raises:
        ValueError: `mu` missing under dynamic shifting, or one that is not positive where the shift is linear.
    """
    if not config["use_dynamic_shifting"]:
        return shift * sigmas / (1 + (shift - 1) * sigmas)
    if mu is None:
        raise ValueError(
            "`mu` must be passed to `set_timesteps`, because this config has use_dynamic_shifting=True: pipelines "
            "compute it from the "
            "image's size. To shift by a constant, set use_dynamic_shifting=False and `shift`."
        )
    return time_shift(config["time_shift_type"], float(mu), 1.0, sigmas)


def time_shift(kind: str, mu: float, power: float, sigmas: Any) -> Any:
    """m / (m + (1 / sigma - 1)^power), m being e^mu for the exponential shift and mu for the linear one."""
    if kind not in TIME_SHIFTS:
        raise ValueError(f"`time_shift_type` must be one of {', '.join(TIME_SHIFTS)}, got {kind!r}.")
    m = math.exp(mu) if kind == "exponential" else mu
    return m / (m + (1 / sigmas - 1) ** power)


def stretched(sigmas: Any, terminal: float | None) -> Any:
    """1 - sigma times what makes the last sigma `terminal`; None or 0: the sigmas themselves."""
    if not terminal:
        return sigmas
    return 1 - (1 - sigmas) * ((1 - terminal) / (1 - sigmas[-1]))


def respaced(sigmas: Values, config: Mapping[str, Any]) -> Values:
    """Between the same ends, spaced as one of `SPACINGS` says.

    Raises:
        ImportError: beta spacing without scipy.
    """
    high, low, ramp = float(sigmas[0]), float(sigmas[-1]), np.linspace(0, 1, len(sigmas))
    if config["use_karras_sigmas"]:
        root_high, root_low = high ** (1 / 7), low ** (1 / 7)
        return np.asarray((root_high + ramp * (root_low - root_high)) ** 7)
    if config["use_exponential_sigmas"]:
        return np.exp(np.linspace(math.log(high), math.log(low), len(sigmas)))
    if config["use_beta_sigmas"]:
        try:
            from scipy.stats import beta
        except ImportError:
            raise ImportError("`use_beta_sigmas` needs scipy: pip install scipy") from None
        return np.asarray(low + beta.ppf(1 - ramp, 0.6, 0.6) * (high - low))
    return sigmas


def flow_table(num_train_timesteps: int, shift: float | None) -> Tensor:
    """(T,) float64, the sigmas that a model is trained on, descending from 1: i / T shifted; None: not shifted."""
    even = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float64) / num_train_timesteps
    return even if shift is None else shift * even / (1 + (shift - 1) * even)
