"""The file: magic, version, a header that says what is needed to read it, and the bits.

    bytes    what
    4        b"VDMC"
    1        version
    4        length of the header, little endian
    n        the header: zlib-compressed JSON
    8        BLAKE2b of header and bits
    m        the bits: 32-bit words, little endian, the last on top

A file that was damaged, cut short or made by another version is refused before anything is decoded.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"VDMC"
VERSION = 1
LONGEST_HEADER = 1 << 20


class FileError(ValueError):
    """The bytes are no whole file of this kind, or of another model."""


@dataclass(frozen=True)
class Header:
    """What a receiver must know besides the model.

    Attributes:
        shape: (C, H, W) of an image. num_levels, pixel_encoding: what its integers are.
        model: digest of weights and configs. chain: digest of the chain's numbers. probe: digest of what the network
            answers here.
        images: digest of all images.
        num_steps, grid, variance_type: which chain, as asked for; grid: a name, log SNRs, or None.
        batches: how many images were coded together, in order.
        threads: of torch, while the network ran.
        seed_words: 32-bit words that the stack began with; seed: of their generator; None: they were given, and come
            back.
        labels: class of each image, or None.
    """

    shape: tuple[int, int, int]
    num_levels: int
    pixel_encoding: str
    model: str
    chain: str
    probe: str
    images: str
    num_steps: int | None
    grid: Any
    variance_type: str
    batches: tuple[int, ...]
    threads: int
    seed_words: int
    seed: int | None
    labels: tuple[int, ...] | None = None


def pack(header: Header, words: NDArray[np.uint32]) -> bytes:
    """The bytes of a file."""
    described = json.dumps(asdict(header), separators=(",", ":"))
    packed, bits = zlib.compress(described.encode(), 9), words.astype("<u4").tobytes()
    return MAGIC + struct.pack("<BI", VERSION, len(packed)) + packed + _digest(packed, bits) + bits


def unpack(data: bytes) -> tuple[Header, NDArray[np.uint32]]:
    """The header and the bits of a file.

    Raises:
        FileError: see the module.
    """
    start = len(MAGIC) + 5
    if len(data) < start or data[: len(MAGIC)] != MAGIC:
        raise FileError("this is no file of vdm_diffusers.compression: it does not begin with VDMC.")
    version, length = struct.unpack("<BI", data[len(MAGIC) : start])
    if version != VERSION:
        raise FileError(
            f"the file is of version {version}, and this package reads version {VERSION}: use the package that wrote "
            "it."
        )
    if length > LONGEST_HEADER or len(data) < start + length + 8:
        raise FileError("the file is cut short, or its beginning is damaged.")
    packed, digest, bits = (
        data[start : start + length],
        data[start + length : start + length + 8],
        data[start + length + 8 :],
    )
    if len(bits) % 4 or digest != _digest(packed, bits):
        raise FileError("the file is damaged or cut short: its checksum is another. Get it again.")
    try:
        engine = zlib.decompressobj()
        text = engine.decompress(packed, LONGEST_HEADER)
        values = json.loads(text)
        header = Header(
            **{f.name: _tuples(values[f.name]) if f.name != "grid" else values[f.name] for f in fields(Header)}
        )
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise FileError(
            "the file's header cannot be read, though its checksum is right: it was not made by this package."
        ) from error
    if not _is_possible(header):
        raise FileError("the file's header says what cannot be: it was not made by this package.")
    return header, np.frombuffer(bits, dtype="<u4").astype(np.uint32)


def _is_possible(header: Header) -> bool:
    """Whether numbers are whole and of a size that nothing is made of in vain: a forged header must not fill the
    memory.
    """

    def whole(value: Any, most: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most

    sizes = header.shape if isinstance(header.shape, tuple) and len(header.shape) == 3 else (0,)
    batches = header.batches if isinstance(header.batches, tuple) else (0,)
    return (
        all(whole(value, 1 << 16) for value in sizes)
        and math.prod(sizes) <= 1 << 26
        and all(whole(value, 1 << 16) for value in batches)
        and whole(header.threads, 1 << 10)
        and whole(header.num_levels, 1 << 24)
        and whole(header.seed_words, 1 << 28)
        and (header.num_steps is None or whole(header.num_steps, 1 << 17))
    )


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.digest()
