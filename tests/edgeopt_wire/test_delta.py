# SPDX-License-Identifier: Apache-2.0
"""Deltas make exactly what was signed, or say what is wrong; hostile ones take neither memory nor time."""

import contextlib
import hashlib
import io
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeopt_wire.delta import (
    COPY,
    DIFFERENCE,
    LITERAL,
    MAGIC,
    Operation,
    apply_delta,
    read_header,
    write_delta,
)
from edgeopt_wire.delta_parts import add_bytes, compressed
from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.errors import DocumentError

BASE = np.random.default_rng(0).bytes(10_000)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _delta(operations: list[Operation], differences: bytes, literals: bytes, target: bytes) -> bytes:
    about = {
        "base_sha256": _digest(BASE),
        "target_sha256": _digest(target),
        "target_bytes": len(target),
    }
    made = io.BytesIO()
    write_delta(made, operations, differences, literals, about)
    return made.getvalue()


def _apply(delta: bytes, target: bytes) -> bytes:
    made = io.BytesIO()
    apply_delta(io.BytesIO(delta), io.BytesIO(BASE), made, (_digest(target), len(target)))
    return made.getvalue()


def _target(operations: list[Operation], differences: bytes, literals: bytes) -> bytes:
    """What a delta means, by another way."""
    found = bytearray()
    for operation in operations:
        piece = BASE[operation.base : operation.base + operation.length]
        if operation.kind == LITERAL:
            piece, literals = literals[: operation.length], literals[operation.length :]
        elif operation.kind == DIFFERENCE:
            changes, differences = differences[: operation.length], differences[operation.length :]
            piece = bytes((a + b) % 256 for a, b in zip(piece, changes, strict=True))
        found += piece
    return bytes(found)


@given(
    kinds=st.lists(st.tuples(st.sampled_from((COPY, DIFFERENCE, LITERAL)), st.integers(1, 700)), max_size=20),
    seed=st.integers(0, 1000),
)
def test_what_was_written_is_made(kinds: list[tuple[int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    operations = [
        Operation(kind, size, 0 if kind == LITERAL else int(rng.integers(0, len(BASE) - size)))
        for kind, size in kinds
    ]
    changed = sum(entry.length for entry in operations if entry.kind == DIFFERENCE)
    differences = rng.choice(np.array([0, 0, 0, 1, 255, 128, 7], np.uint8), changed).tobytes()
    literals = rng.bytes(sum(entry.length for entry in operations if entry.kind == LITERAL))
    target = _target(operations, differences, literals)
    assert _apply(_delta(operations, differences, literals, target), target) == target


@given(st.binary(max_size=300))
def test_bytes_are_added_without_a_carry(content: bytes) -> None:
    other = content[::-1]
    assert add_bytes(content, other) == bytes((a + b) % 256 for a, b in zip(content, other, strict=True))


def test_differences_of_integers_come_close_to_their_entropy() -> None:
    rng = np.random.default_rng(1)
    count = 400_000
    moved = rng.choice([1, -1, 2, -2], count, p=[0.42, 0.42, 0.08, 0.08])
    steps = np.where(rng.random(count) < 0.25, moved, 0)
    changes = steps.astype(np.int8).tobytes()
    share = np.bincount(steps + 2) / count
    entropy = -float((share * np.log2(share)).sum()) / 8
    made = io.BytesIO()
    about = {"base_sha256": "", "target_sha256": "", "target_bytes": count}
    write_delta(made, [Operation(DIFFERENCE, count, 0)], changes, b"", about)
    assert len(made.getvalue()) / count < 1.06 * entropy


def _with_part(number: int, part: bytes) -> bytes:
    """A delta of one literal, one of its parts replaced."""
    parts = [compressed(bytes([LITERAL, 4])), compressed(b""), compressed(b""), compressed(b"abcd")]
    parts[number] = part
    about = {"base_sha256": "", "target_sha256": _digest(b"abcd"), "target_bytes": 4}
    header = canonical_bytes({**about, "parts": [len(entry) for entry in parts]})
    return b"".join((MAGIC, struct.pack(">I", len(header)), header, *parts))


def test_the_delta_that_the_hostile_ones_are_made_of_is_good() -> None:
    assert _apply(_with_part(3, compressed(b"abcd")), b"abcd") == b"abcd"


@pytest.mark.parametrize(
    ("number", "part", "said"),
    [
        (3, compressed(b"abcx"), "other bytes"),
        (3, compressed(b"ab"), "too early"),
        (3, b"", "unknown way"),
        (3, b"\x05abc", "unknown way"),
        (3, b"\x00abc", "cannot be unpacked"),
        (3, b"\x01\xff\xff", "cannot be unpacked"),
        (3, compressed(b"abcd")[:-3], "unpacked|too early"),
        (0, compressed(bytes([9, 4])), "does not exist"),
        (0, compressed(bytes([LITERAL, 0])), "does not exist"),
        (0, compressed(bytes([LITERAL])), "cut off"),
        (0, compressed(b"\xff" * 20), "cut off"),
        (0, compressed(bytes([LITERAL, 5])), "more bytes than it says"),
        (0, compressed(bytes([COPY, 4, 1])), "before its base"),
        (0, compressed(bytes([COPY, 4, 0xC0, 0x9A, 0x0C])), "beyond its base"),
        (0, compressed(bytes([DIFFERENCE, 4, 0])), "too early"),
    ],
)
def test_a_damaged_or_hostile_delta_is_refused(number: int, part: bytes, said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        _apply(_with_part(number, part), b"abcd")


@pytest.mark.parametrize("number", range(4))
def test_a_part_that_unpacks_to_gigabytes_takes_no_memory(number: int) -> None:
    bomb = compressed(bytes(64 * 1024 * 1024))
    assert len(bomb) < 100_000
    delta = _with_part(number, bomb)
    tracemalloc.start()
    with pytest.raises(DocumentError) if number in (0, 3) else contextlib.nullcontext():
        _apply(delta, b"abcd")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * 1024 * 1024


@settings(max_examples=300)
@given(st.integers(0, 200), st.integers(0, 255))
def test_a_flipped_byte_anywhere_never_makes_other_bytes(at: int, value: int) -> None:
    delta = bytearray(_with_part(3, compressed(b"abcd")))
    delta[at % len(delta)] = value
    with contextlib.suppress(DocumentError):
        assert _apply(bytes(delta), b"abcd") == b"abcd"


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04", MAGIC, MAGIC + b"\xff" * 4, MAGIC + b"\0\0\0\2{}"])
def test_what_is_no_delta_is_called_that(raw: bytes) -> None:
    with pytest.raises(DocumentError):
        read_header(io.BytesIO(raw))
