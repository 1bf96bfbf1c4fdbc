"""The content server of the Hub's Xet storage, for `hub_double`: what `hf_xet` uploads and downloads, kept in memory.

A file is cut into chunks, chunks are gathered in xorbs, and a shard says of which chunks a file consists. The client
uploads xorbs and shards and asks for reconstructions; files that `HubDouble.put` was given are cut and stored here as
the client would. The formats are those of the public specification (https://huggingface.co/docs/xet). Hashes of our
own making are not BLAKE3: no client checks them.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

CHUNK = 2**16  # bytes of a chunk that is cut here
_WITH_VERIFICATION, _WITH_METADATA = 1 << 31, 1 << 30


class Term(NamedTuple):
    """A part of a file: chunks `start` to `end - 1` of a xorb, `size` bytes unpacked."""

    xorb: str
    start: int
    end: int
    size: int


class XetStore:
    """Xorbs by hash, and of each file its terms, its SHA-256 and its hash."""

    def __init__(self) -> None:
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, list[Term]] = {}  # by Xet hash
        self.hashes: dict[str, str] = {}  # SHA-256 -> Xet hash

    def put(self, content: bytes) -> str:
        """Store a file that no client has uploaded; its Xet hash."""
        sha = hashlib.sha256(content).hexdigest()
        if sha not in self.hashes:
            xet = hashlib.sha256(b"xet" + content).hexdigest()
            parts = [content[at : at + CHUNK] for at in range(0, len(content), CHUNK)]
            # a chunk: version 0, size as stored (3 bytes), 0 for "not compressed", size unpacked (3 bytes)
            sizes = [len(part).to_bytes(3, "little") for part in parts]
            chunks = [b"\0" + size + b"\0" + size + part for size, part in zip(sizes, parts, strict=True)]
            self.xorbs[xet] = b"".join(chunks)
            self.files[xet], self.hashes[sha] = [Term(xet, 0, len(parts), len(content))], xet
        return self.hashes[sha]

    def add_shard(self, shard: bytes) -> list[tuple[str, bytes]]:
        """Take note of the files that a shard describes: (SHA-256, content) of each."""
        added = []
        for xet, terms, sha in _files_of(shard):
            content = b"".join(b"".join(self.chunks(term)) for term in terms)
            if sha is not None and hashlib.sha256(content).hexdigest() != sha:
                raise ValueError(f"the shard says that the SHA-256 of {xet} is {sha}")
            sha = hashlib.sha256(content).hexdigest()
            self.files[xet], self.hashes[sha] = terms, xet
            added.append((sha, content))
        return added

    def chunks(self, term: Term) -> list[bytes]:
        """The unpacked chunks of a term."""
        xorb = self.xorbs[term.xorb]
        return [_unpack(xorb, start, stop) for start, stop in _spans(xorb)[term.start : term.end]]

    def reconstruction(self, xet: str, place: str, first: int = 0, last: int | None = None) -> dict | None:
        """What the client needs to fetch bytes `first` to `last` of a file: whole terms, and where their xorbs lie."""
        size = sum(term.size for term in self.files[xet])
        if first >= size:
            return None
        terms, fetch, at, skipped = [], {}, 0, 0
        for term in self.files[xet]:
            at += term.size
            if at <= first:
                skipped = at
                continue
            if last is not None and at - term.size > last:
                break
            spans, chunks = _spans(self.xorbs[term.xorb]), {"start": term.start, "end": term.end}
            terms.append({"hash": term.xorb, "unpacked_length": term.size, "range": chunks})
            lies = {"start": spans[term.start][0], "end": spans[term.end - 1][1] - 1}
            fetch.setdefault(term.xorb, []).append(
                {"range": chunks, "url": place.format(term.xorb), "url_range": lies}
            )
        return {"offset_into_first_range": first - skipped, "terms": terms, "fetch_info": fetch}


def _spans(xorb: bytes) -> list[tuple[int, int]]:
    """Where the chunks of a xorb begin and end; a footer may follow them."""
    spans, at = [], 0
    while at + 8 <= len(xorb) and xorb[at : at + 7] != b"XETBLOB":
        end = at + 8 + int.from_bytes(xorb[at + 1 : at + 4], "little")
        spans.append((at, end))
        at = end
    return spans


def _unpack(xorb: bytes, start: int, stop: int) -> bytes:
    scheme, size = xorb[start + 4], int.from_bytes(xorb[start + 5 : start + 8], "little")
    data = xorb[start + 8 : stop]
    data = data if scheme == 0 else _lz4_frame(data)
    if scheme == 2:  # every fourth byte first, then those after them
        ends = [(size + 3 - n) // 4 for n in range(4)]
        groups = iter([data[sum(ends[:n]) : sum(ends[: n + 1])] for n in range(4)])
        whole = bytearray(size)
        for n, group in enumerate(groups):
            whole[n::4] = group
        data = bytes(whole)
    if len(data) != size:
        raise ValueError(f"a chunk of {size} bytes has {len(data)}")
    return data


def _lz4_frame(data: bytes) -> bytes:
    """What an LZ4 frame holds; checksums are skipped."""
    if data[:4] != b"\x04\x22\x4d\x18":
        raise ValueError("no LZ4 frame")
    flags, at, out = data[4], 6, bytearray()
    at += (8 if flags & 8 else 0) + (4 if flags & 1 else 0) + 1
    while size := int.from_bytes(data[at : at + 4], "little"):
        length, at = size & 0x7FFFFFFF, at + 4
        block, at = data[at : at + length], at + length + (4 if flags & 16 else 0)
        if size >> 31:
            out += block
        else:
            _lz4_block(block, out)
    return bytes(out)


def _lz4_block(block: bytes, out: bytearray) -> None:
    at = 0

    def length(nibble: int) -> int:
        nonlocal at
        total, more = nibble, nibble == 15
        while more:
            total, more, at = total + block[at], block[at] == 255, at + 1
        return total

    while at < len(block):
        token, at = block[at], at + 1
        literals = length(token >> 4)
        out += block[at : at + literals]
        at += literals
        if at >= len(block):
            return
        offset, at = int.from_bytes(block[at : at + 2], "little"), at + 2
        count = length(token & 15) + 4
        while count:
            piece = out[-offset : len(out) - offset + min(offset, count)]
            out += piece
            count -= len(piece)


def _files_of(shard: bytes) -> Iterator[tuple[str, list[Term], str | None]]:
    """(Xet hash, terms, SHA-256) of the files that a shard describes."""
    at = 48
    while shard[at : at + 32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        name, at = hash_text(shard[at : at + 32]), at + 48
        terms = []
        for n in range(count):
            entry = shard[at + 48 * n : at + 48 * (n + 1)]
            size, start, end = struct.unpack_from("<III", entry, 36)
            terms.append(Term(hash_text(entry[:32]), start, end, size))
        at += 48 * count * (2 if flags & _WITH_VERIFICATION else 1)
        sha = None
        if flags & _WITH_METADATA:
            sha, at = hash_text(shard[at : at + 32]), at + 48
        yield name, terms, sha


def hash_text(raw: bytes) -> str:
    """A hash as its text: four little-endian numbers of eight bytes."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def byte_range(header: str) -> tuple[int, int | None]:
    """First and last byte of a Range header; (0, None) without one."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", header)
    return (int(found[1]), int(found[2]) if found[2] else None) if found else (0, None)
