# SPDX-License-Identifier: Apache-2.0
"""A delta: how to make the bytes of one package from those of another that a device has already.

    magic | length of the header (u32) | header (JSON) | operations | codes | escapes | literals

A part is a byte that names its compression (`XZ` or `DEFLATE`) and what that made. The operations are numbers in LEB128:
`kind`, `length`, and for `COPY` and `DIFFERENCE` the zigzag distance from where the last of them ended in the base.
`COPY` takes bytes of the base, `LITERAL` takes bytes of the literals, `DIFFERENCE` adds one difference to each byte of
the base (modulo 256). Differences are codes of two bits, four a byte, the lowest first: 0 is 0, 1 is +1, 2 is -1, and 3
takes the next byte of the escapes. Four codes a byte let a Huffman code come within 3 % of the entropy, which xz over
plain differences misses by 15 %.

Rules:
- A delta is never trusted: what it makes is checked against the full package's digest, which is signed.
- Memory is bounded whatever a delta says: parts are declared, limited and read as streams.
- Standard library only, so that a device without numpy can apply one.

Sources: Percival 2003, "Naive differences of executable code" (differences instead of copies); the xz file format;
LEB128 and zigzag as in Protocol Buffers' encoding guide.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from edgeopt_wire.delta_parts import PIECE_BYTES, Differences, Part, add_bytes, coded, compressed
from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.errors import DocumentError

MAGIC = b"edgeopt-delta/1\n"
COPY, DIFFERENCE, LITERAL = 0, 1, 2
KINDS = (COPY, DIFFERENCE, LITERAL)

MAX_HEADER_BYTES = 4096
MAX_OPERATIONS_BYTES = 8 * 1024 * 1024
"""Unpacked: two million operations, more than any real delta has."""


@dataclass(frozen=True)
class Operation:
    """One step: `length` bytes of the target, from `base` on where the kind looks at the base."""

    kind: int
    length: int
    base: int = 0


@dataclass(frozen=True)
class Header:
    """What a delta says of itself. Sizes in bytes; parts as they are stored."""

    base_sha256: str
    target_sha256: str
    target_bytes: int
    parts: tuple[int, int, int, int]


def write_delta(
    target: IO[bytes],
    operations: Iterable[Operation],
    differences: bytes,
    literals: bytes,
    about: Mapping[str, Any],
) -> None:
    """Write a delta; `about` holds base_sha256, target_sha256 and target_bytes."""
    codes, escapes = coded(differences)
    parts = [compressed(raw) for raw in (_encoded(operations), codes, escapes, literals)]
    header = canonical_bytes({**about, "parts": [len(part) for part in parts]})
    for piece in (MAGIC, struct.pack(">I", len(header)), header, *parts):
        target.write(piece)


def read_header(delta: IO[bytes]) -> Header:
    """Read the header and leave the file at its end.

    Raises:
        DocumentError: It is no delta, or one of another version.
    """
    if delta.read(len(MAGIC)) != MAGIC:
        raise DocumentError("this is no delta of version 1")
    (size,) = struct.unpack(">I", _exactly(delta, 4))
    if size > MAX_HEADER_BYTES:
        raise DocumentError(f"a delta's header has at most {MAX_HEADER_BYTES} bytes, this one {size}")
    try:
        raw = json.loads(_exactly(delta, size))
        operations, codes, escapes, literals = (int(part) for part in raw["parts"])
        header = Header(
            str(raw["base_sha256"]),
            str(raw["target_sha256"]),
            int(raw["target_bytes"]),
            (operations, codes, escapes, literals),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DocumentError(f"the header of a delta cannot be read: {error}") from error
    if min(header.target_bytes, *header.parts) < 0:
        raise DocumentError("the header of a delta has negative sizes")
    return header


def apply_delta(delta: IO[bytes], base: IO[bytes], target: IO[bytes], expected: tuple[str, int]) -> None:
    """Write what a delta makes of `base`. `expected` is the target's SHA-256 and size in bytes.

    `delta` and `base` must be seekable. The caller removes `target` where this raises.

    Raises:
        DocumentError: The delta is damaged, hostile, for another base, or makes something else.
    """
    digest, size = expected
    header = read_header(delta)
    if (header.target_sha256, header.target_bytes) != (digest, size):
        raise DocumentError(f"the delta makes {header.target_sha256[:12]}, wanted is {digest[:12]}")
    start = delta.tell()
    limits = (MAX_OPERATIONS_BYTES, size, size, size)
    parts = []
    for stored, limit in zip(header.parts, limits, strict=True):
        parts.append(Part(delta, start, stored, limit))
        start += stored
    operations = _decoded(parts[0].read_all())
    streams = Differences(parts[1], parts[2]), parts[3]
    whole = hashlib.sha256()
    made = 0
    for operation in operations:
        made += operation.length
        if made > size:
            raise DocumentError("the delta makes more bytes than it says")
        for piece in _pieces(operation, base, *streams):
            whole.update(piece)
            target.write(piece)
    if made != size or whole.hexdigest() != digest:
        raise DocumentError("the delta makes other bytes than were signed")


def _pieces(
    operation: Operation, base: IO[bytes], differences: Differences, literals: Part
) -> Iterator[bytes]:
    left = operation.length
    if operation.kind != LITERAL:
        base.seek(operation.base)
    while left:
        count = min(left, PIECE_BYTES)
        left -= count
        if operation.kind == LITERAL:
            yield literals.read(count)
            continue
        piece = _exactly(base, count)
        yield piece if operation.kind == COPY else add_bytes(piece, differences.read(count))


def _encoded(operations: Iterable[Operation]) -> bytes:
    found = bytearray()
    expected = 0
    for operation in operations:
        _put(found, operation.kind)
        _put(found, operation.length)
        if operation.kind != LITERAL:
            distance = operation.base - expected
            _put(found, 2 * distance if distance >= 0 else -2 * distance - 1)
            expected = operation.base + operation.length
    return bytes(found)


def _decoded(raw: bytes) -> Iterator[Operation]:
    at = expected = 0
    while at < len(raw):
        kind, at = _take(raw, at)
        length, at = _take(raw, at)
        if kind not in KINDS or length < 1:
            raise DocumentError("the delta has an operation that does not exist")
        if kind == LITERAL:
            yield Operation(kind, length)
            continue
        distance, at = _take(raw, at)
        base = expected + (distance // 2 if distance % 2 == 0 else -(distance + 1) // 2)
        if base < 0:
            raise DocumentError("the delta looks before its base")
        expected = base + length
        yield Operation(kind, length, base)


def _put(into: bytearray, number: int) -> None:
    while number >= 0x80:
        into.append(number & 0x7F | 0x80)
        number >>= 7
    into.append(number)


def _take(raw: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        if at >= len(raw) or shift > 56:
            raise DocumentError("the operations of the delta are cut off")
        byte = raw[at]
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, at


def _exactly(file: IO[bytes], count: int) -> bytes:
    found = file.read(count)
    if len(found) != count:
        raise DocumentError("the delta looks beyond its base, or is cut off")
    return found
