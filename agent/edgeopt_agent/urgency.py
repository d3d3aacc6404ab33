# SPDX-License-Identifier: Apache-2.0
"""Which of the events that wait go first, and which a full outbox drops first.

Rules:
- What somebody may have to act on goes first, the oldest before: alarms, failures, phases, and every kind not known here.
- Summaries of a time away come next, then telemetry, the newest first: of what waited for a week, today counts most.
- A full outbox drops in the opposite order: telemetry before summaries before the rest, the oldest before.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterable, Mapping

SUMMARY = "summary"
TELEMETRY = frozenset({"service", "measurement"})


class Lane(enum.IntEnum):
    """How urgent an event is. Each lane has a batch of its own on its way."""

    URGENT = 0
    SUMMARY = 1
    BULK = 2


def lane_of(kind: str) -> Lane:
    """The lane of a kind of event."""
    if kind == SUMMARY:
        return Lane.SUMMARY
    return Lane.BULK if kind in TELEMETRY else Lane.URGENT


def first_to_go(numbers: Iterable[int], lane: Lane, most: int) -> list[int]:
    """At most `most` of a lane's numbers that go next, ascending."""
    ordered = sorted(numbers)
    return ordered[-most:] if lane is Lane.BULK else ordered[:most]


def first_to_drop(lanes: Mapping[int, Lane], count: int) -> list[int]:
    """The numbers that a full outbox drops; `lanes` gives the lane of each that may be dropped."""
    return heapq.nsmallest(count, lanes, key=lambda number: (-lanes[number], number))
