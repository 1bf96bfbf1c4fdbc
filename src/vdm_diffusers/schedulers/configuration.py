"""A scheduler's config: what may stand in it, and the timeline and tables of betas that it means."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..noise_schedules import (
    BETA_SCHEDULES,
    LOG_SNR_SCHEDULES,
    NoiseSchedule,
    ShiftedSchedule,
    TabulatedNoiseSchedule,
    log_snr_from_betas,
    make_betas,
)
from ..numerics import on_cpu
from ..prediction import check_prediction_type
from ..reverse_variance import VARIANCE_TYPES, OptimalVariance
from ..step_grids import GRIDS, SPACINGS
from ..timelines import BetaTableTimeline, LogSNRTimeline, Timeline

MAX_TIMESTEPS = 10**6  # tables of that many are made: a config must not fill the memory
MAX_KNOTS = 64  # of an optimal variance for each frequency, which travels in the config


def is_in_log_snr(config: Mapping[str, Any]) -> bool:
    """Whether the config's schedule is given in log SNR, and not by a table of betas."""
    return config["trained_betas"] is None and config["beta_schedule"] in LOG_SNR_SCHEDULES


def plain(key: str, value: Any) -> Any:
    """`value` of the config's `key` in what JSON can hold: NumPy's and torch's numbers and arrays become Python's.

    Raises:
        ValueError: a value that JSON cannot hold.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(key, entry) for entry in value]
    if isinstance(value, Mapping):
        return {name: plain(key, entry) for name, entry in value.items()}
    raise ValueError(f"`{key}` must be a number, a string, a list or a dict, as it is saved in JSON, got {value!r}.")


def unset_keys(init: Callable[..., Any], config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The config's `_use_default_values` as Diffusers means it, the keys that nobody set; without it where the config
    has none.

    Diffusers counts arguments that were passed by position among them, and drops them where another class takes the
    config.
    """
    name, parameters = "_use_default_values", inspect.signature(init).parameters
    if name not in config:  # of a scheduler that was saved: all stand in its file
        return {}
    return {name: [key for key in config[name] if key not in parameters or config[key] == parameters[key].default]}


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError, which names the key and what is possible, unless a scheduler can be made of `config`."""
    _check_choices(config)
    _check_numbers(config)
    if "optimal" in (config["variance_type"], config["step_grid"]) and config["optimal_variance"] is None:
        raise ValueError(
            "`variance_type='optimal'` (and `step_grid='optimal'`) needs `optimal_variance={'log_snr': [...], 'mse': "
            "[...]}`: "
            "the measured E|x - x_hat|^2 / D against log SNR."
        )
    if config["optimal_variance"] is not None:
        optimal = OptimalVariance.from_config(config["optimal_variance"])
        if optimal.shape is not None and len(optimal.log_snr) > MAX_KNOTS:
            raise ValueError(
                f"`optimal_variance` for each frequency must have at most {MAX_KNOTS} log SNRs, got "
                f"{len(optimal.log_snr)}."
            )
    table = config["log_snr_table"]
    if table is not None and not is_in_log_snr(config):
        raise ValueError(
            f"`log_snr_table` needs a schedule in log SNR ({', '.join(LOG_SNR_SCHEDULES)}), got beta_schedule = "
            f"{config['beta_schedule']!r}."
        )
    if table is not None and len(table) < 2:
        raise ValueError(f"`log_snr_table` must be a list of at least two log SNRs, got {table}.")


def _check_choices(config: Mapping[str, Any]) -> None:
    check_prediction_type(config["prediction_type"])
    for key, choices in [
        ("beta_schedule", (*BETA_SCHEDULES, *LOG_SNR_SCHEDULES)),
        ("timestep_spacing", SPACINGS),
        ("multistep_order", (1, 2)),
        ("final_step", ("latent", "mean")),
        ("step_grid", (*GRIDS, None)),
    ]:
        if key == "beta_schedule" and config["trained_betas"] is not None:
            continue  # it is not looked at
        if config[key] not in choices:
            raise ValueError(f"`{key}` must be one of {', '.join(map(str, choices))}, got {config[key]!r}.")
    if config["variance_type"] not in (*VARIANCE_TYPES, None):  # None stands in the configurations of DPM-Solver
        warnings.warn(
            f"`variance_type` {config['variance_type']!r} is not one of {', '.join(VARIANCE_TYPES)}: it acts as "
            "'fixed_small'.",
            stacklevel=6,
        )


def _check_numbers(config: Mapping[str, Any]) -> None:
    count = config["num_train_timesteps"]
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_TIMESTEPS:
        raise ValueError(f"`num_train_timesteps` must be an integer in 1..{MAX_TIMESTEPS}, got {count!r}.")
    betas = config["trained_betas"]
    if betas is not None and not 1 <= len(betas) <= MAX_TIMESTEPS:
        raise ValueError(f"`trained_betas` must be a list of 1..{MAX_TIMESTEPS} betas, got {len(betas)}.")
    stochasticity = config["stochasticity"]
    if not 0 <= stochasticity < math.inf:
        raise ValueError(
            "`stochasticity` must be a finite number that is not negative (0 deterministic, 1 ancestral, above 1 "
            "noisier), "
            f"got {stochasticity}."
        )


@on_cpu
def timeline_of(config: Mapping[str, Any]) -> Timeline:
    """What the timesteps of a scheduler with this config mean.

    Raises:
        ValueError: end points or a table that are no schedule.
    """
    if is_in_log_snr(config):
        high, low = config["log_snr_max"], config["log_snr_min"]
        return LogSNRTimeline(config["num_train_timesteps"], high, low, _log_snr_schedule(config, high, low))
    betas = betas_of(config)
    return BetaTableTimeline(log_snr_from_betas(betas, zero_terminal_snr=config["rescale_betas_zero_snr"]))


def _log_snr_schedule(config: Mapping[str, Any], high: float, low: float) -> NoiseSchedule:
    if config["log_snr_table"] is not None:
        table = TabulatedNoiseSchedule(torch.tensor(config["log_snr_table"], dtype=torch.float64))
        if not (table.log_snr_max <= high and table.log_snr_min >= low):
            raise ValueError(
                f"`log_snr_table` must stay between log_snr_max = {high} and log_snr_min = {low}, got "
                f"{table.log_snr_max} to "
                f"{table.log_snr_min}."
            )
        return table
    shift = config["log_snr_shift"]
    schedule = LOG_SNR_SCHEDULES[config["beta_schedule"]](high - shift, low - shift)
    return ShiftedSchedule(schedule, shift) if shift else schedule


def betas_of(config: Mapping[str, Any]) -> Tensor:
    """(T,) the betas of a config's table, before any rescaling, float64."""
    if config["trained_betas"] is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    return make_betas(config["beta_schedule"], config["num_train_timesteps"], config["beta_start"], config["beta_end"])


@on_cpu
def warn_of_odd_betas(config: Mapping[str, Any], timeline: Timeline) -> None:
    """Warn of a table of another length than the config says, and of betas outside (0, 1]."""
    if not isinstance(timeline, BetaTableTimeline):
        return
    betas, stated = betas_of(config), config["num_train_timesteps"]
    if len(betas) != stated:
        warnings.warn(
            f"`trained_betas` has {len(betas)} entries and `num_train_timesteps` is {stated}: the chain has "
            f"{len(betas)} steps.",
            stacklevel=6,
        )
    if not bool(((betas > 0) & (betas <= 1)).all()):
        warnings.warn(
            f"betas must lie in (0, 1], got values from {float(betas.min())} to {float(betas.max())}: steps that "
            "are undefined will raise when they are reached.",
            stacklevel=6,
        )


def betas_of_log_snrs(log_snrs: Tensor) -> Tensor:
    """(T,) the betas of a chain x_1..x_T with these log SNRs, float64: 1 - alpha_bar_i / alpha_bar_{i-1}."""
    log_alpha_bar = torch.nn.functional.logsigmoid(log_snrs)
    return -torch.expm1(torch.cat([log_alpha_bar[:1], log_alpha_bar.diff()]))


def betas_for_diffusers(alphas_cumprod: Tensor) -> list[float]:
    """Betas of which Diffusers' own float32 product comes out as `alphas_cumprod`, as nearly as float32 can.

    Diffusers rounds 1 - beta to float32 and takes the product: each beta is chosen so that the rounded product stays
    next to the exact one (error feedback), and among those that give the same rounding, so that the product in float64
    does too.
    """
    rounded, exact, betas = 1.0, 1.0, []  # the two running products: with 1 - beta in float32, and in float64
    for alpha_bar in alphas_cumprod.tolist():
        alpha = np.float32(alpha_bar / rounded)
        # any beta within half a unit of 1 - alpha is rounded to that alpha: take the one that is best in float64
        half = 0.49 * float(alpha - np.nextafter(alpha, np.float32(0)))
        low, high = max(1 - float(alpha) - half, 1e-3 * half), 1 - float(alpha) + half
        betas.append(min(max(1 - alpha_bar / exact, low), high))
        rounded, exact = rounded * float(alpha), exact * (1 - betas[-1])
    return betas
