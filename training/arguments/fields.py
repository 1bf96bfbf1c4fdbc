"""What a single argument is: its default, its help text, and the values that it may take.

Everything that is known about an argument stands where it is declared, so that a new one cannot be forgotten in a list
elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any

LARGEST_SAID = 2**20  # a limit beyond that is no advice, and left out of messages that are about the other end
LARGEST_INTEGER = 2**53  # whole numbers up to here are exact in float64, and in JSON


@dataclass(frozen=True)
class Bounds:
    """The values that a number may take: an interval whose ends belong to it, or do not (`open_low`, `open_high`)."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def hold(self, value: float) -> bool:
        """Whether `value` lies within."""
        above = self.low < value if self.open_low else self.low <= value
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low, high = math.isfinite(self.low), math.isfinite(self.high) and self.high < LARGEST_SAID
        if low and high:
            return f"lie in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"
        if low and not self.low:
            return "be positive" if self.open_low else "not be negative"
        return f"be at least {self.low:g}" if low else "be a number"


ANY_NUMBER = Bounds()
POSITIVE = Bounds(0, open_low=True)
NOT_NEGATIVE = Bounds(0)
SHARE = Bounds(0, 1, open_high=True)
LOG_SNR = Bounds(-100, 100)


def argument(
    default: Any,
    help: str,
    *,
    alias: str | None = None,
    bounds: Bounds | None = None,
    basic: bool = False,
    path: bool = False,
) -> Any:
    """A field of a dataclass of arguments; a list as default is copied for each instance.

    Arguments:
        bounds: of the number, or of every number of the list. Every argument that is a number has some.
        basic: whether plain `--help` explains it.
        path: whether it names a file or a folder, so that a leading `~` means the home folder.
    """
    metadata = {"help": help, "alias": alias, "bounds": bounds, "basic": basic, "path": path}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(declared: dataclasses.Field[Any]) -> Any:
    """The default of an argument; a list is a new one."""
    if declared.default_factory is not dataclasses.MISSING:
        return declared.default_factory()
    return declared.default


def check_values(arguments: Any) -> None:
    """Make sure that every value of a dataclass of arguments is one that its field allows; `~` in paths is expanded.

    Raises:
        ValueError: a number outside its bounds or not finite, an empty string or list. The message names the argument.
    """
    for declared in dataclasses.fields(arguments):
        name, value = declared.name, getattr(arguments, declared.name)
        if value is None or isinstance(value, bool):
            continue
        if isinstance(value, (str, list)) and (not value or (isinstance(value, str) and not value.strip())):
            raise ValueError(f"--{name} must not be empty.")
        if declared.metadata["path"]:
            if "\0" in value:
                raise ValueError(f"--{name} must be a path, got {value!r}.")
            setattr(arguments, name, os.path.expanduser(value))
        bounds = declared.metadata["bounds"]
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, str):
                continue
            if not math.isfinite(number) or (isinstance(number, int) and abs(number) > LARGEST_INTEGER):
                raise ValueError(f"--{name} must be a finite number, got {number}.")
            if not bounds.hold(number):
                high = number > bounds.high >= LARGEST_SAID
                raise ValueError(f"--{name} must {f'be at most {bounds.high:g}' if high else bounds}, got {number}.")
