# SPDX-License-Identifier: Apache-2.0
"""How long a device waits before it connects again, so that neither it nor a fleet of its kind is a storm.

Rules:
- Full jitter: anything up to a ceiling that triples, from `first_s` to `max_s`. A fleet that lost its broker comes
  back spread out (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog 2015).
- Only a session of `settled_s` sets the ceiling back. A broker that takes a connection and ends it before that, in
  whatever way, counts as one that refused; paho alone would come again every second.
- At most `MOST` connections in any 2 x `max_s` (ten minutes), whatever the dice say.
- Nobody there at all (no route, no listener) costs nobody anything: the ceiling is then `away_s`.
- The broker says that somebody else connected under this name (0x8E): taking it back at once would make two devices
  throw each other out for ever. The pause is one to three times `max_s`.
"""

from __future__ import annotations

import enum
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

MOST = 12
"""Connections in twice the longest pause."""
GROWTH = 3.0
MIN_S = 1.0


class End(enum.Enum):
    """How an attempt to be connected ended."""

    AWAY = "away"  # nobody took the connection
    LOST = "lost"  # it was taken, and is over: refused, kicked, cut or silent
    DISPLACED = "displaced"  # somebody else connected under this name


@dataclass(frozen=True)
class Pace:
    """Seconds: the first ceiling, the last one, the last one while nobody listens, and what counts as a session."""

    first_s: float = 5.0
    max_s: float = 300.0
    away_s: float = 60.0
    settled_s: float = 60.0


class Reconnecting:
    """Says when to connect. `monotonic` gives seconds, `chance` is where jitter comes from."""

    def __init__(
        self, pace: Pace, monotonic: Callable[[], float], chance: random.Random | None = None
    ) -> None:
        self._pace = pace
        self._monotonic = monotonic
        self._chance = chance or random.Random()
        self._ceiling = pace.first_s
        self._taken: deque[float] = deque(maxlen=MOST)

    def soon(self) -> None:
        """Forget what failed: somebody changed what was wrong."""
        self._ceiling = self._pace.first_s
        self._taken.clear()

    def pause_s(self, end: End, began: float, session_s: float) -> float:
        """Seconds to wait after an attempt that began at `began` and was a session for `session_s` (0: never)."""
        pace = self._pace
        if end is End.AWAY:
            return self._grown(pace.away_s)
        self._taken.append(began)
        if end is End.DISPLACED:
            pause = self._chance.uniform(pace.max_s, 3 * pace.max_s)
        else:
            if session_s >= pace.settled_s:
                self._ceiling = pace.first_s
            pause = self._grown(pace.max_s)
        return max(pause, self._until_allowed())

    def _grown(self, limit: float) -> float:
        ceiling = min(limit, self._ceiling)
        self._ceiling = min(self._pace.max_s, GROWTH * ceiling)
        return self._chance.uniform(min(MIN_S, ceiling / 2), ceiling)

    def _until_allowed(self) -> float:
        """Until the oldest of the last `MOST` connections is twice the longest pause ago, with a jitter of its own."""
        wait = self._taken[0] + 2 * self._pace.max_s - self._monotonic()
        if len(self._taken) < MOST or wait <= 0:
            return 0.0
        return wait + self._chance.uniform(0, self._pace.max_s / 10)
