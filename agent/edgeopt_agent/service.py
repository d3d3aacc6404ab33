# SPDX-License-Identifier: Apache-2.0
"""What the models of this device did in service: latencies as sketches, failures, and what their inputs looked like.

Rules:
- Counting costs a few microseconds a request; inputs are looked at once in `LOOK_EVERY` requests.
- Power mode, temperature and load are part of the key: each condition has windows of its own, and who wants them
  together merges their sketches. The condition is looked at every `CONDITION_S`, beside requests.
- A window ends when it can be sent and `report_s` have passed, or after an hour: a week without a network is 168
  windows a model, not 2,000, and whoever comes back sends summaries.
- The window in hand is saved every `report_s` and taken up by the next start; its events are the outbox's, which
  counts what it had to drop.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent.drift import Drift
from edgeopt_agent.files import write_durably
from edgeopt_agent.surroundings import Condition
from edgeopt_wire.document import format_moment
from edgeopt_wire.errors import StoreError
from edgeopt_wire.sketch import Sketch

if TYPE_CHECKING:
    import numpy as np

_log = logging.getLogger(__name__)

SCHEMA = "edgeopt.service/1"
REPORT_S = 300.0
LONGEST_S = 3600.0
CONDITION_S = 10.0
LOOK_EVERY, LOOK_AT = 64, 4096
"""Of how many calls one's inputs are looked at, and at how many values of each at most, evenly spread."""

Key = tuple[str, str, str]
"""Model, version, variant."""

Place = tuple[Key, Condition]
"""What was served, and under which condition."""


@dataclass
class Look:
    """What one input looked like: values seen, their mean and deviation (Welford 1962 in the form of Chan 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        """Take in an array of finite numbers."""
        import numpy as np

        count, mean = values.size, float(np.mean(values, dtype=np.float64))
        squares = float(np.var(values, dtype=np.float64)) * count
        if not (count and math.isfinite(mean) and math.isfinite(squares)):
            return
        total, moved = self.count + count, mean - self.mean
        self.squares += squares + moved * moved * self.count * count / total
        self.mean += moved * count / total
        self.count = total

    def to_json(self) -> dict[str, float]:
        """As JSON-like data."""
        return {"values": self.count, "mean": self.mean, "std": math.sqrt(self.squares / max(self.count, 1))}


@dataclass
class Window:
    """One variant's service since `began`. Latencies in nanoseconds, the runtime's call alone."""

    began: datetime
    run: Sketch = field(default_factory=Sketch)
    rows: int = 0
    failed: int = 0
    inputs: dict[str, Look] = field(default_factory=dict)

    def merge(self, other: Window) -> None:
        """Add another window's counts; what inputs looked like stays each window's own."""
        self.run.merge(other.run)
        self.rows += other.rows
        self.failed += other.failed


class Service:
    """Collects what is served, thread-safe; `flush` gives the windows that are over as events' bodies.

    `surroundings` tells the condition that holds now; None: it is unknown. `drift` watches what models see.
    """

    def __init__(
        self,
        now: Callable[[], datetime],
        path: Path | None = None,
        report_s: float = REPORT_S,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        surroundings: Callable[[], Condition] | None = None,
        drift: Drift | None = None,
    ) -> None:
        self.drift = drift
        self._now = now
        self._path = path
        self._report_s = report_s
        self._monotonic = monotonic
        self._guard = threading.Lock()
        self._windows: dict[Place, Window] = {}
        self._ended: dict[Place, Window] = {}
        self._surroundings = surroundings
        self._condition = Condition()
        self._looked = float("-inf")
        self.calls = 0
        """Calls of runtimes that ended since the start, well or not."""
        self._began = self._saved = monotonic()
        self._left = self._load()

    def ran(self, key: Key, nanoseconds: int, rows: int, inputs: Mapping[str, np.ndarray]) -> None:
        """A call of a runtime ended well."""
        with self._guard:
            self.calls += 1
            window = self._window(key)
            window.run.add(max(1, nanoseconds))
            window.rows += rows
            if window.run.count % LOOK_EVERY == 1:
                for name, values in inputs.items():
                    if values.dtype.kind in "fiu":
                        flat = values.reshape(-1)
                        window.inputs.setdefault(name, Look()).add(flat[:: max(1, -(-flat.size // LOOK_AT))])

    def failed(self, key: Key) -> None:
        """A call of a runtime failed."""
        with self._guard:
            self.calls += 1
            self._window(key).failed += 1

    def look_around(self) -> None:
        """Learn under which condition is served from now on; cheap to call often."""
        if self._surroundings is not None and self._monotonic() - self._looked >= CONDITION_S:
            self._looked = self._monotonic()
            self._condition = self._surroundings()

    def flush(self, is_online: Callable[[], bool]) -> list[dict[str, Any]]:
        """Give the windows that are over; nothing until then. `is_online` is asked only where it matters."""
        self.look_around()
        since = self._monotonic() - self._began
        if since < self._report_s or (since < LONGEST_S and not is_online()):
            self._keep()
            return []
        with self._guard:
            windows, self._windows = self._windows, {}
            for place, window in windows.items():
                self._ended.setdefault(place, Window(window.began)).merge(window)
            left, self._left = self._left, []
            self._began = self._monotonic()
        found = [*left, *(_body(place, window, self._now()) for place, window in windows.items())]
        self._keep(at_once=True)
        return found

    def totals(self) -> dict[Key, Window]:
        """Everything since the start, by model, version and variant; for looking at."""
        found: dict[Key, Window] = {}
        for (key, _), window in self.by_condition().items():
            found.setdefault(key, Window(window.began)).merge(window)
        return found

    def by_condition(self) -> dict[Place, Window]:
        """The same, apart by the condition under which it was served."""
        with self._guard:
            found: dict[Place, Window] = {}
            for windows in (self._ended, self._windows):
                for place, window in windows.items():
                    found.setdefault(place, Window(window.began)).merge(window)
            return found

    def _window(self, key: Key) -> Window:
        place = (key, self._condition)
        window = self._windows.get(place)
        if window is None:
            window = self._windows[place] = Window(self._now())
        return window

    def _keep(self, *, at_once: bool = False) -> None:
        """Save the windows in hand, so that a power cut costs `report_s` of them."""
        if self._path is None or (not at_once and self._monotonic() - self._saved < self._report_s):
            return
        self._saved = self._monotonic()
        with self._guard:
            bodies = [_body(place, window, self._now()) for place, window in self._windows.items()]
        try:
            write_durably(self._path, json.dumps([*self._left, *bodies]).encode())
        except StoreError as error:
            _log.warning("what was served is not saved yet: %s", error)

    def _load(self) -> list[dict[str, Any]]:
        """What the last life did not send; nothing where it cannot be read."""
        try:
            raw = json.loads(self._path.read_bytes()) if self._path is not None else []
            return [row for row in raw if isinstance(row, dict) and row.get("schema") == SCHEMA]
        except (OSError, ValueError, TypeError):
            return []


def _body(place: Place, window: Window, until: datetime) -> dict[str, Any]:
    (model, version, variant), condition = place
    return {
        "schema": SCHEMA,
        "model": model,
        "version": version,
        "variant": variant,
        "condition": condition._asdict(),
        "from": format_moment(window.began),
        "to": format_moment(until),
        "calls": window.run.count,
        "rows": window.rows,
        "failed": window.failed,
        "run_ns": window.run.to_json(),
        "inputs": {name: look.to_json() for name, look in window.inputs.items()},
    }
