"""The precision that a network's arithmetic is fast in, asked of the device."""

from __future__ import annotations

from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")
_CPU_UNITS = {"amx_bf16", "avx512_bf16", "bf16"}  # what Linux calls them on x86 and on ARM


def fast_in_bf16(device: torch.device) -> bool:
    """Whether the device has units for bf16. Without them it is emulated, ten times as slow as float32 on a CPU."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not _CPU_INFO.is_file():
        return False
    return bool(_CPU_UNITS & set(_CPU_INFO.read_text(encoding="utf-8").split()))


def default_device() -> torch.device:
    """Where Accelerate will train: a GPU if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def chosen_precision(asked: str, device: torch.device | None = None) -> str:
    """What --mixed_precision means on this device: `auto` is bf16 where the device has units for it, else no."""
    if asked != "auto":
        return asked
    return "bf16" if fast_in_bf16(device or default_device()) else "no"


def slow_bf16(precision: str, device: torch.device) -> str | None:
    """A warning where bf16 was asked of a CPU that has no units for it."""
    if precision != "bf16" or device.type != "cpu" or not _CPU_INFO.is_file() or fast_in_bf16(device):
        return None
    return (
        "warning: this CPU has no units for bf16, which takes some ten times as long as float32 here: "
        "--mixed_precision auto"
    )
