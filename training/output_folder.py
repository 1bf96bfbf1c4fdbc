"""The folder of a run: one run at a time, nothing removed that a run of ours did not write, abandoned checkpoints set
aside.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arguments import ARGUMENTS_FILE
from checkpoints import CheckpointError, clean_up, discard, list_checkpoints, step_of, verify, write_text

LOCK_FILE = "run.lock"
_HEARTBEAT = 10.0  # seconds
_SILENT = 60.0  # seconds without a heartbeat after which a run on another machine is taken to have ended


class FolderError(RuntimeError):
    """The folder cannot be used as asked; the message says what to do."""


class RunLock:
    """Holds a folder for one run: a file that names the holder's machine and process, and is touched while the run
    lives.

    A lock whose process is gone, or which another machine has not touched for a minute, is taken over.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Raise FolderError that says who holds the folder, or hold it."""
        holder = self._holder()
        if holder is not None:
            raise FolderError(
                f"--output_dir {self.path.parent} is in use by process {holder['pid']} on {holder['host']}, which "
                "trains there. Give "
                f"another folder, or wait. (If that process is none of yours, remove {self.path}.)"
            )
        write_text(self.path, json.dumps(_this_process()))
        self._thread = threading.Thread(target=self._touch, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder free, if this process holds it."""
        if self._thread is not None:
            self._ended.set()
            self._thread = None
            self.path.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._ended.wait(_HEARTBEAT):
            with contextlib.suppress(OSError):  # a full or absent disk is reported by those who need it
                os.utime(self.path)

    def _holder(self) -> dict[str, Any] | None:
        """The living process that holds the folder."""
        try:
            holder, touched = json.loads(self.path.read_text(encoding="utf-8")), self.path.stat().st_mtime
            pid, host = int(holder["pid"]), str(holder["host"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # half of a file is nobody's
        own = _this_process()
        if host != own["host"]:
            return holder if time.time() - touched < _SILENT else None
        if pid == own["pid"] or _start_of(pid) is None or _start_of(pid) != holder.get("start"):
            return None
        return holder


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_of(os.getpid())}


def _start_of(pid: int) -> str | None:
    """When a process began, as far as the system says; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:  # no /proc, or no such process
        os.kill(pid, 0)
    except OSError:
        return None
    return "alive"


def is_ours(output_dir: Path) -> bool:
    """Whether a run of this script has written into the folder."""
    return (output_dir / ARGUMENTS_FILE).is_file() or bool(list_checkpoints(output_dir))


def check_output_dir(output_dir: Path, own_files: Sequence[str], *, resume: bool, overwrite: bool) -> None:
    """Raise FolderError if the folder is occupied by something that this run neither resumes nor may replace."""
    if output_dir.exists() and not output_dir.is_dir():
        raise FolderError(f"--output_dir {output_dir} is a file.")
    if not output_dir.is_dir() or resume or not _contents(output_dir):
        return
    if not overwrite:
        raise FolderError(
            f"--output_dir {output_dir} is not empty. Give another one, --resume_from_checkpoint latest to go on with "
            "the run in it, "
            "or --overwrite_output_dir to start anew."
        )
    taken = [] if is_ours(output_dir) else [name for name in own_files if (output_dir / name).exists()]
    if taken:
        raise FolderError(
            f"--overwrite_output_dir: {output_dir} holds {taken[0]}, but no run of this script (there is no "
            f"{ARGUMENTS_FILE} in it), so "
            "nothing of it is removed. Give another folder, or empty this one."
        )


def _contents(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != LOCK_FILE]


def start_anew(output_dir: Path, own_files: Sequence[str], logging_dir: str) -> None:
    """Remove what an earlier run wrote into its folder, and nothing outside of it."""
    if not is_ours(output_dir):
        return
    clean_up(output_dir)
    logs = output_dir / logging_dir
    inside = logs.resolve().is_relative_to(output_dir.resolve()) and logs.resolve() != output_dir.resolve()
    for path in [
        *list_checkpoints(output_dir),
        *(output_dir / name for name in own_files),
        *([logs] if inside else []),
    ]:
        if path.exists() or path.is_symlink():
            discard(path)


def set_aside(output_dir: Path, resumed: Path | None) -> list[str]:
    """Rename the checkpoints that the run does not go on from; returns what is to be said of it.

    These are the later ones of the branch that is left, and those that are damaged or were never whole: under their
    names they would be resumed by "latest" and crowd out fresh ones. Nothing is removed.
    """
    step = -1 if resumed is None else step_of(resumed)
    own = resumed is not None and resumed.resolve().parent == output_dir.resolve()
    said = []
    for folder in list_checkpoints(output_dir):
        if own and folder.resolve() == resumed.resolve():  # type: ignore[union-attr]
            continue
        reason = None
        if not own or step_of(folder) > step:
            reason = "abandoned"
        try:
            verify(folder)
        except CheckpointError:
            reason = "damaged"
        if reason is None:
            continue
        number, target = 1, output_dir / f"{reason}-{folder.name}"
        while target.exists():
            number += 1
            target = output_dir / f"{reason}-{folder.name}-{number}"
        folder.rename(target)
        said.append(f"{folder.name} is {reason}: set aside as {target.name}")
    return said
