# SPDX-License-Identifier: Apache-2.0
"""What every way of pulling chunks shares: how slow is too slow, how wrong is too wrong, and asking for runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from edgeopt_wire.errors import TransportError
from edgeopt_wire.index import PackageIndex

GRACE_S = 30.0
MIN_BYTES_PER_S = 1024
"""Less than this after the grace is slow retrieval (a GPRS modem gives 4 kB/s)."""
MAX_WRONG_CHUNKS = 8
"""Chunks in one pull that are not what was signed, before it is put off."""


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
