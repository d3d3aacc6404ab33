# SPDX-License-Identifier: Apache-2.0
"""What every way of pulling chunks shares: keeping them, how slow is too slow, how wrong is too wrong, asking for runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from edgeopt_wire.errors import TransportError
from edgeopt_wire.index import PackageIndex

GRACE_S = 30.0
MIN_BYTES_PER_S = 1024
"""Less than this after the grace is slow retrieval (a GPRS modem gives 4 kB/s)."""
MAX_WRONG_CHUNKS = 8
"""Chunks in one pull that are not what was signed, before it is put off."""
CHECKPOINT_S, CHECKPOINT_CHUNKS = 3.0, 256
"""Between two flushes of a package that arrives: what a power cut can cost."""
NOTHING = -1
"""The number with which a transport asks whether to go on while no chunk comes."""


class Blobs(Protocol):
    """Another source of packages' bytes than the broker."""

    def pull(
        self, index: PackageIndex, missing: Sequence[int], keep: Callable[[int, bytes], bool]
    ) -> list[int]:
        """Get chunks; returns those that it could not get, and never raises because of the other side."""
        ...


def check_rate(what: str, size_bytes: int, seconds: float) -> None:
    """Slow retrieval: a source that only trickles would otherwise hold the device for as long as it likes."""
    if seconds > GRACE_S and size_bytes < MIN_BYTES_PER_S * seconds:
        raise TransportError(
            f"{what} comes too slowly: {size_bytes} bytes in {seconds:.0f} s, at least {MIN_BYTES_PER_S} a second are "
            "expected; what came is kept where it was verified, later again"
        )


def runs(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending runs of (first, count)."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return tuple(runs)


class Arriving(Protocol):
    """A blob while it arrives: `edgeopt_agent.store.Incoming`."""

    index: PackageIndex

    def missing(self) -> list[int]:
        """Chunks that are not there."""
        ...

    def put(self, number: int, chunk: bytes) -> bool:
        """Keep a chunk if it is what was signed; say whether it is."""
        ...

    def checkpoint(self, there: set[int]) -> None:
        """Flush, then note what is there."""
        ...


def fill(
    arriving: Arriving,
    pull: Callable[[PackageIndex, Sequence[int], Callable[[int, bytes], bool]], None],
    go_on: Callable[[], None],
    monotonic: Callable[[], float] = time.monotonic,
) -> None:
    """Pull what is missing of a blob; what came is on the disk whatever ends the pull.

    It is flushed every `CHECKPOINT_S`, or after `CHECKPOINT_CHUNKS` where they come faster. `go_on` is called
    with every chunk, and now and then while none comes; what it raises ends the pull.
    """
    missing = arriving.missing()
    if not missing:
        return
    there = set(range(len(arriving.index.chunks))) - set(missing)
    flushed_at, since = monotonic(), 0

    def keep(number: int, chunk: bytes) -> bool:
        nonlocal flushed_at, since
        go_on()
        if number == NOTHING or not arriving.put(number, chunk):
            return False
        there.add(number)
        since += 1
        if since >= CHECKPOINT_CHUNKS or monotonic() - flushed_at >= CHECKPOINT_S:
            arriving.checkpoint(there)
            flushed_at, since = monotonic(), 0
        return True

    try:
        pull(arriving.index, missing, keep)
    finally:
        arriving.checkpoint(there)
