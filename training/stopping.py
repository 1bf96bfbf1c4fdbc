"""Being asked to stop: by a signal, or by the death of the launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

STOP_INTERVAL = 10  # optimiser steps between the processes' agreements on whether to stop
# what a terminal, a batch system and a lost connection send; Slurm announces the end of the time with SIGUSR1
# (--signal)
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Terminated(SystemExit):
    """A signal came and the state has been saved. The exit code is 128 + the signal's number, as shells report it."""


class StopSignal:
    """Whether a signal to stop has come, agreed among the processes. A second SIGINT interrupts at once, as ever.

    Arguments:
        max_minutes: after so many, it is as if SIGALRM had come.
    """

    def __init__(self, accelerator: Accelerator, max_minutes: float | None = None) -> None:
        self.accelerator = accelerator
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.number = 0
        self._may_leave = False
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        # `accelerate launch` with one process does not pass its signals on: it dies, and this process would train on
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.number).name

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While the block runs nothing is lost by leaving: a signal ends the process between two operations."""
        self._may_leave = True
        try:
            if self.number:
                raise Terminated(128 + self.number)
            yield
        finally:
            self._may_leave = False

    def _receive(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if self._may_leave:
            raise Terminated(128 + number)

    def agreed(self, step: int) -> bool:
        """True on every process or on none: one process looks at every step, several ask each other now and then."""
        if self._launcher is not None and not self.number and os.getppid() != self._launcher:
            self.number = signal.SIGTERM
        if self._deadline is not None and not self.number and time.monotonic() > self._deadline:
            self.number = signal.SIGALRM
        if self.accelerator.num_processes == 1:
            return bool(self.number)
        if step % STOP_INTERVAL:
            return False
        flag = torch.tensor(float(self.number), device=self.accelerator.device)
        largest = int(self.accelerator.gather(flag.reshape(1)).max())
        self.number = self.number or largest
        return bool(largest)
