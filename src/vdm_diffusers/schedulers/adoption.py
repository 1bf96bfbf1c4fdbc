"""Configurations of Diffusers' schedulers, read as their own class reads them, or refused with the class that is
right.

A Diffusers config does not describe a model by itself: what it leaves out stands in the signature of the class that
wrote it, some classes change their table of betas afterwards, and others have other timesteps or another path. Here a
config becomes that of a `VDMScheduler` with the same table of log SNRs and the same prediction, or it is refused.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..noise_schedules import log_snr_at_zero_end, log_snr_from_betas
from ..numerics import on_cpu
from .beta_tables import same_to_rounding
from .configuration import betas_of, betas_of_log_snrs

# Which model a config is for, and how its samples are limited: as the class that wrote it has it, by default too.
_OWN_TO_THE_MODEL = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "snr_shift_scale",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
)
_TABLE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
_SAME_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_SAME_SIGMA = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_FLOWS = ("FlowMatch", "FlowMap", "Helios", "Piflow", "MiniMaxH3", "LTXEulerAncestralRF", "VDMFlow")
_SIGMAS = ("EDM", "VDMSigma", "CosineDPMSolver", "KarrasVe", "ScoreSdeVe", "CMStochasticIterative")


def adopted(config: Mapping[str, Any], own: type) -> dict[str, Any]:
    """`config`, written by any class, in the words of the class `own`: what its own class adds by default and by habit
    is written out.

    Raises:
        ValueError: the config is of a model that no table of betas with its timesteps describes; names the class to
            use.
    """
    values = dict(config)
    name = values.get("_class_name") or _class_of(values)
    if name == own.__name__ or not isinstance(name, str):
        return values
    defaults = _defaults(name)
    if (reason := other_model(name, values)) is not None:
        if name == "EDMEulerScheduler":
            # Diffusers exchanges this class's configurations with DDPMScheduler's in silence. One with betas only
            # visited it; another is refused when it is used.
            return values if values.keys() >= set(_TABLE) else values | {"_refused": reason}
        _refuse(reason, values)
    written = {key for key in _OWN_TO_THE_MODEL if key in defaults or key in values}
    values |= {key: defaults[key] for key in written - values.keys()}
    if name == "UnCLIPScheduler":  # its table is always this one
        values |= {"beta_schedule": "squaredcos_cap_v2", "trained_betas": None}
        written |= {"trained_betas"}
    missing = [key for key in _TABLE if key not in values]
    no_table = "beta_schedule" not in defaults if defaults else values.get("trained_betas") is None
    if missing and no_table:
        raise ValueError(
            f"a configuration of {name} describes no table of betas (no `{missing[0]}`), which VDMScheduler needs. "
            f"Keep {name}, or "
            "make a VDMScheduler that says what the model was trained with."
        )
    shift = float(values.get("snr_shift_scale") or 1)
    if shift != 1:  # CogVideoX's: it stands in the betas from here on
        betas = _shifted_betas(values, shift)
        values |= {"trained_betas": betas, "rescale_betas_zero_snr": False, "snr_shift_scale": 1.0}
    if (
        unset := config.get("_use_default_values")
    ) is not None:  # the keys for which Diffusers takes the new class's default
        same = {p.name for p in inspect.signature(own).parameters.values() if values.get(p.name) == p.default}
        values["_use_default_values"] = [key for key in unset if key not in written or key in same]
    return values


def _refuse(reason: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError, or warn of what DDPMScheduler takes in silence and pipelines of Diffusers' tests have."""
    if not values.keys() >= set(_TABLE):
        raise ValueError(reason)
    if values.get("use_flow_sigmas") and values.get("prediction_type", "epsilon") != "flow_prediction":
        warnings.warn(f"{reason} Here its betas are used instead, as DDPMScheduler does.", stacklevel=4)
    elif values.get("timestep_type") == "continuous":
        warnings.warn(f"{reason} Here it is fed those indices, as DDPMScheduler does.", stacklevel=4)
    else:
        raise ValueError(reason)


def other_model(name: str, values: Mapping[str, Any]) -> str | None:
    """Why the class `name` with this config is not for a variance-preserving model with integer timesteps; None if it
    may be.
    """
    instead = "Use VDMFlowScheduler.from_config(config), or keep the scheduler that the pipeline came with."
    if name.startswith(_FLOWS) and name not in (*_SAME_FLOW, "VDMFlowScheduler"):
        instead = f"Keep {name}."
    if name.startswith(_FLOWS):
        return (
            f"{name} is for models of the straight path z = (1 - s) x + s eps, and VDMScheduler samples "
            "variance-preserving ones. "
            f"{instead}"
        )
    if values.get("use_flow_sigmas"):
        return (
            f"this configuration of {name} has use_flow_sigmas=True: its model was trained on the flow path z = (1 - "
            "s) x + s eps, and "
            f"VDMScheduler samples variance-preserving models. {instead}"
        )
    if name.startswith(_SIGMAS):
        ours = (
            f"Use VDMSigmaScheduler.from_config(config), or keep {name}." if name in _SAME_SIGMA else f"Keep {name}."
        )
        return (
            f"{name} is for networks in sigma space, z = x + s eps, which are fed functions of s, and VDMScheduler "
            "samples "
            f"variance-preserving ones. {ours}"
        )
    if values.get("timestep_type") == "continuous":
        return (
            f"this configuration of {name} has timestep_type='continuous': its network is fed 0.25 ln(sigma), and "
            "VDMScheduler's is "
            "fed the indices of a table. Keep the scheduler that the pipeline came with."
        )
    return None


def adopted_flow(config: Mapping[str, Any], own_class: str) -> dict[str, Any]:
    """`config`, written by any flow-matching scheduler, in the words of `own_class`.

    Taken are the three classes of `FlowMatchEulerDiscreteScheduler`'s path and time, and multistep solvers with
    `use_flow_sigmas`, whose `flow_shift` is the shift.

    Raises:
        ValueError: the config is of another kind of model; names the class to use.
    """
    values = dict(config)
    possible = [values["_class_name"]] if values.get("_class_name") else _classes_of(values)
    name = possible[0] if possible else None
    if len(possible) > 1 and any(other in _SAME_FLOW for other in possible):
        raise ValueError(
            f"this configuration does not say whose it is, and may be of {' or '.join(possible)}, which are of "
            "different models. Pass "
            "{**config, '_class_name': ...} with the right one."
        )
    if name == own_class or not isinstance(name, str):
        return values
    if name in _SAME_FLOW:
        return values
    if values.get("use_flow_sigmas") and not name.startswith(_FLOWS):
        kind = values.get("prediction_type", _defaults(name).get("prediction_type"))
        shift = values.get("flow_shift", _defaults(name).get("flow_shift") or 1.0)
        values |= {"shift": 1.0 if shift is None else float(shift), "prediction_type": kind}
        unset = values.get("_use_default_values", [])
        values["_use_default_values"] = [key for key in unset if key not in ("shift", "prediction_type")]
        return {
            key: value for key, value in values.items() if key not in (*_TABLE[1:], "stochasticity", "multistep_order")
        }
    if name in _SAME_SIGMA or name == "VDMSigmaScheduler":
        raise ValueError(
            f"{name} is for networks in sigma space, and VDMFlowScheduler samples those of the straight path z = (1 - "
            "s) x + s eps. Use "
            "VDMSigmaScheduler.from_config(config)."
        )
    if name.startswith((*_FLOWS, *_SIGMAS)):
        raise ValueError(
            f"{name} is for models with a time or a chain of its own, which VDMFlowScheduler does not have. Keep "
            f"{name}."
        )
    raise ValueError(
        f"{name} is for variance-preserving models, and VDMFlowScheduler samples those of the straight path z = (1 - "
        "s) x + s eps. Use "
        "VDMScheduler.from_config(config)."
    )


def adopted_sigma(config: Mapping[str, Any], own_class: str) -> dict[str, Any]:
    """`config`, written by either of EDM's schedulers, in the words of `own_class`.

    Raises:
        ValueError: the config is of another kind of model; names the class to use.
    """
    values = dict(config)
    name = values.get("_class_name") or _class_of(values)
    if name == own_class or not isinstance(name, str):
        return values
    if name not in _SAME_SIGMA:
        instead = (
            other_model(name, values)
            or f"{name} is for variance-preserving models. Use VDMScheduler.from_config(config)."
        )
        raise ValueError(f"VDMSigmaScheduler is for EDM's models in sigma space. {instead}")
    solver = name == "EDMDPMSolverMultistepScheduler" or "solver_order" in values
    if values.get("prediction_type") == "sample":
        raise ValueError(f"a network that predicts the sample itself is not preconditioned as EDM's: keep {name}.")
    if solver:
        defaults = _defaults("EDMDPMSolverMultistepScheduler")
        order, kind = (values.get(key, defaults[key]) for key in ("solver_order", "algorithm_type"))
        values |= {"multistep_order": min(order, 2), "stochasticity": float(kind == "sde-dpmsolver++")}
        values["_use_default_values"] = [
            key for key in values.get("_use_default_values", []) if key not in ("multistep_order", "stochasticity")
        ]
    return values


def is_of_kind(own_class: str, name: str, values: Mapping[str, Any]) -> bool:
    """Whether the class `name` with this config is for the models of `own_class`, "VDMFlowScheduler" or
    "VDMSigmaScheduler".
    """
    if own_class == "VDMSigmaScheduler":
        return name in _SAME_SIGMA
    return name in _SAME_FLOW or (bool(values.get("use_flow_sigmas")) and not name.startswith(_FLOWS))


def table_of(scheduler: Any, exact: Tensor) -> Tensor:
    """(T,) the log SNRs of the table that a stock scheduler object has, which may have been assigned after its
    construction.

    Arguments:
        exact: (T',) what its config says, in float64. Where the object's float32 `alphas_cumprod` is this to rounding,
            this it is.
    Raises:
        ValueError: the object has no such table.
    """
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas_cumprod, Tensor) or alphas_cumprod.ndim != 1:
        raise ValueError(
            f"`scheduler`, a {type(scheduler).__name__}, has no table `alphas_cumprod`, which the bound is computed "
            "from. Pass a "
            "VDMScheduler that says what the model was trained with."
        )
    real = alphas_cumprod.detach().double().cpu()
    table = real.log() - torch.log1p(-real)
    if len(exact) != len(real):
        return table
    same = same_to_rounding(real, exact.sigmoid())
    if 2 * int(same.sum()) < len(same):  # another table, which meets this one here and there
        return table
    return torch.where(same, exact, table)


def _class_of(values: Mapping[str, Any]) -> str | None:
    """The class that wrote a live config, which does not say it, by its keys; None for keys of our own, or of
    nobody's.

    A config with a table of betas needs no class: each value stands in it, by default or not.
    """
    possible = _classes_of(values)
    return next((name for name in possible if name in _SAME_FLOW), next(iter(possible), None))


def _classes_of(values: Mapping[str, Any]) -> list[str]:
    """Every class that may have written a live config; see `_class_of`."""
    keys = {key for key in values if not key.startswith("_")}
    if keys >= set(_TABLE):
        return ["a scheduler of Diffusers"]
    if "_use_default_values" not in values and "shift" not in keys and "sigma_max" not in keys:
        return []
    return [name for name in dir(diffusers) if name.endswith("Scheduler") and _parameters(name).keys() == keys]


def _defaults(name: str) -> dict[str, Any]:
    """The defaults of the class that Diffusers exports under this name; none if there is no such class."""
    return {key: p.default for key, p in _parameters(name).items() if p.default is not inspect.Parameter.empty}


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    found = getattr(diffusers, name, None)
    if not inspect.isclass(found):
        return {}
    parameters = inspect.signature(found.__init__).parameters.values()
    return {p.name: p for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD}


@on_cpu
def _shifted_betas(values: Mapping[str, Any], shift: float) -> list[float]:
    """The betas of a table whose SNR is divided by `shift`, before any rescaling to zero terminal SNR."""
    table = log_snr_from_betas(betas_of(values)) - torch.tensor(shift, dtype=torch.float64).log()
    if values.get("rescale_betas_zero_snr"):
        table = log_snr_at_zero_end(torch.nn.functional.logsigmoid(table))
    return betas_of_log_snrs(table).tolist()
