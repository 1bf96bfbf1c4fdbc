"""Checkpoints that are whole or absent.

A folder is written under a temporary name, with a manifest of checksums as its last file; everything is flushed to the
disk, and then one rename gives it its name. A process may be killed at any moment: what is called `checkpoint-N` is
whole, and a reader verifies the manifest before it believes so (a disk may lose what a kill does not). Folders are
pruned by first renaming them away, for the same reason.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vdm_diffusers.manifest import MANIFEST as MANIFEST
from vdm_diffusers.manifest import CheckpointError, verify, write_manifest

_TEMPORARY = ".incomplete-"
_DISCARDED = ".discarded-"
_NAME = re.compile(r"checkpoint-(\d+)")


class SaveError(RuntimeError):
    """A checkpoint could not be written; those before it are whole."""


class CheckpointWriter:
    """Writes one checkpoint at a time: at once, or in a thread while training goes on.

    A kill meets the thread as it would meet the process: the folder is whole or absent.
    """

    def __init__(self, *, in_background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Write as soon as the last one is written.

        Raises:
            SaveError: this one could not be written, or (in the background) the last one.
        """
        self.wait()
        if self._pool is None:
            write()
        else:
            self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Return when nothing is left to write; raises SaveError as `submit` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise SaveError if the last one has failed by now, without waiting for it."""
        if self._pending is not None and self._pending.done():
            self.wait()


@contextlib.contextmanager
def explained_failure(output_dir: Path) -> Iterator[None]:
    """Turn what a disk answers while a checkpoint is written into a SaveError that says what is left."""
    try:
        yield
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors wrap the system's errors in their own
        kept = list_checkpoints(output_dir)
        raise SaveError(
            f"the checkpoint could not be written: {error}. {shutil.disk_usage(output_dir).free / 1e6:.0f} MB are "
            f"free in {output_dir}. "
            f"The last good checkpoint, {kept[-1].name if kept else 'none yet'}, is untouched: make room, or lower "
            "--checkpoints_total_limit, and go on with --resume_from_checkpoint latest."
        ) from error


def required_bytes(bytes_of_one: int, num_saves: int, limit: int, num_present: int) -> int:
    """Free bytes that a run's checkpoints will take: those kept and the one being written, less those that are there
    already.
    """
    kept = num_saves if limit == 0 else min(num_saves, limit + 1)
    return bytes_of_one * max(1, kept - (num_present if limit else 0))


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Write a folder that appears as `target`, whole, when the block ends, replacing an older one; or not at all.

    Raises:
        OSError: from the block or the flush, e.g. a full disk; the unfinished folder has been removed.
    """
    temporary = target.parent / f"{_TEMPORARY}{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        write_manifest(temporary)
        _flush_tree(temporary)
        if target.exists():
            discard(target)
        temporary.rename(target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def discard(path: Path) -> None:
    """Remove a file or folder; a kill in the middle leaves nothing under its name."""
    gone = path.parent / f"{_DISCARDED}{path.name}"
    _remove(gone)
    path.rename(gone)
    _remove(gone)


def clean_up(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder`."""
    for pattern in (f"{_TEMPORARY}*", f"{_DISCARDED}*"):
        for path in folder.glob(pattern):
            _remove(path)


def step_of(folder: Path) -> int:
    """The optimiser step in a checkpoint's name; -1 for another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in `output_dir`, oldest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def find_checkpoint(output_dir: Path, wanted: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, verified, and warnings about damaged ones passed over.

    Arguments:
        wanted: "latest" (None is returned if there is none), or a path, or the name of a folder in `output_dir`.
    Raises:
        CheckpointError: the named checkpoint is missing or damaged, or there are checkpoints and all are damaged.
    """
    if wanted != "latest":
        folder = next((path for path in (Path(wanted), output_dir / wanted) if path.is_dir()), None)
        if folder is None:
            present = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
            raise CheckpointError(
                f"--resume_from_checkpoint {wanted}: no such folder. Checkpoints in {output_dir}: {present}."
            )
        verify(folder)
        return folder, []
    warnings: list[str] = []
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            verify(folder)
        except CheckpointError as error:
            warnings.append(f"passed over: {error}")
        else:
            return folder, warnings
    if warnings:
        raise CheckpointError(
            f"no checkpoint in {output_dir} is whole: {' '.join(warnings)} Remove them to start anew."
        )
    return None, []


def prune(output_dir: Path, limit: int) -> None:
    """Keep the newest `limit` checkpoints; 0 keeps all."""
    for folder in list_checkpoints(output_dir)[:-limit] if limit else []:
        discard(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is whole or absent."""
    write_text(path, json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """Nested values with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole, or as it was before."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
