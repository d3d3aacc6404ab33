# SPDX-License-Identifier: Apache-2.0
"""Under what condition a model serves now, in few words: latencies are counted apart by these.

Rules:
- Few classes, so that a device has a handful of sketches a model; each can be merged with those of other devices.
- Looking happens beside requests, never in one; a vendor's program is asked for the power mode once a minute at most.
- What a board cannot tell is an empty word.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edgeopt_agent.calm import busy_seconds
from edgeopt_agent.conditions import ROOT, Ask, ask, read_board, read_thermal

WARM_C, HOT_C = 60.0, 80.0
BUSY_SHARE = 0.5
"""More than this share of all CPU time, whoever takes it, is busy."""
POWER_MODE_S = 60.0


class Condition(NamedTuple):
    """Power mode (or governor); `cool`, `warm`, `hot` or `throttled`; `idle` or `busy`. Empty where unknown."""

    power_mode: str = ""
    temperature: str = ""
    load: str = ""


class Surroundings:
    """Looks at one board; `look` tells the condition since the look before."""

    def __init__(
        self, root: Path = ROOT, ask: Ask = ask, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._root = root
        self._ask = ask
        self._monotonic = monotonic
        self._power_mode = ""
        self._asked_at = float("-inf")
        self._busy: tuple[float, float] | None = None

    def look(self) -> Condition:
        """What holds now."""
        now = self._monotonic()
        if now - self._asked_at >= POWER_MODE_S:
            board = read_board(self._root, ask=self._ask)
            self._power_mode = board.power_mode or board.governor
            self._asked_at = now
        return Condition(self._power_mode, self._temperature(), self._load(now))

    def _temperature(self) -> str:
        found = read_thermal(self._root, ask=lambda _: "")  # the files alone: this is asked often
        if found.throttled:
            return "throttled"
        if found.temperature_c is None:
            return ""
        return "hot" if found.temperature_c >= HOT_C else "warm" if found.temperature_c >= WARM_C else "cool"

    def _load(self, now: float) -> str:
        busy, before = busy_seconds(self._root), self._busy
        if busy is None:
            return ""
        self._busy = (now, busy)
        if before is None or now <= before[0]:
            return ""
        share = (busy - before[1]) / (now - before[0]) / (os.cpu_count() or 1)
        return "busy" if share > BUSY_SHARE else "idle"
