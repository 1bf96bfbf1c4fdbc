"""The list of a folder's files with their checksums, by which a reader knows that the folder is whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or missing."""


def write_manifest(folder: Path) -> None:
    """Write the size and checksum of every file below `folder` into its manifest."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "blake2b": _checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=1), encoding="utf-8")


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its size and checksum."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no readable {MANIFEST} ({error}): it is not a whole checkpoint."
        ) from error
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["size"] or _checksum(path) != expected["blake2b"]:
            raise CheckpointError(
                f"{path} is missing or does not have the checksum of {MANIFEST}: the checkpoint is damaged."
            )


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
