# SPDX-License-Identifier: Apache-2.0
"""Runs of bytes that two contents share, found by blocks of the first."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK = 32
MOST = 1 << 22
"""Longer contents are not searched byte by byte: they travel as literals, or as tensors."""


def match(old: bytes, new: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (place in `new`, place in `old`, length) in the order of `new`, without overlap.

    Each block of `old` is known by its content; a block of `new` that is known grows to both sides.
    """
    if len(new) < BLOCK or len(old) < BLOCK or len(new) > MOST:
        return
    known: dict[bytes, int] = {}
    for place in range(0, len(old) - BLOCK + 1, BLOCK):
        known.setdefault(old[place : place + BLOCK], place)
    done = at = 0
    while at + BLOCK <= len(new):
        place = known.get(new[at : at + BLOCK], -1)
        if place < 0:
            at += 1
            continue
        back = 0
        while back < min(place, at - done) and old[place - back - 1] == new[at - back - 1]:
            back += 1
        length = BLOCK + _same(old, place + BLOCK, new, at + BLOCK)
        yield at - back, place - back, back + length
        done = at = at + length


def _same(old: bytes, first: int, new: bytes, second: int) -> int:
    """How many bytes are the same from a place in each on, in steps that double."""
    count, step = 0, BLOCK
    most = min(len(old) - first, len(new) - second)
    while count < most:
        step = min(step, most - count)
        if old[first + count : first + count + step] == new[second + count : second + count + step]:
            count += step
            step *= 2
        elif step == 1:
            break
        else:
            step = max(1, step // 2)
    return count
