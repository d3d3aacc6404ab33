# SPDX-License-Identifier: Apache-2.0
"""Watches whether a model in service still sees what it was built for, and is as sure of itself as it was then.

Rules:
- A request is looked at when `every_s` have passed since the last look, and when that look's cost is below
  `MOST_COST` of the time since: the others pay for one comparison. The answer is never changed, never held up by a lock.
- `rows` looks are a window, which is judged against the reference of the package; a package without one, or an
  operator who wants it so, has the first `FIRST_WINDOWS` windows in service for a reference, and says so.
- `RAISE_AFTER` windows in a row raise an alarm, `CLEAR_AFTER` quiet ones end it: one odd window is no event.
- What is known survives a restart; another version of the model begins anew.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent.features import features_of
from edgeopt_agent.files import write_durably
from edgeopt_wire.document import from_json, to_json
from edgeopt_wire.drift import MANIFEST_KEY, Reference, Verdict, judge, make_reference
from edgeopt_wire.errors import DocumentError, StoreError
from edgeopt_wire.manifest import Manifest

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray]

_log = logging.getLogger(__name__)

SCHEMA = "edgeopt.drift/1"
RAISE_AFTER, CLEAR_AFTER = 2, 3
FIRST_WINDOWS = 4
MOST_COST = 0.002
"""Share of the time that looking may take."""
MOST_EVENTS = 100


@dataclass(frozen=True)
class DriftOptions:
    """The key `drift` of the agent's configuration. `reference` is `package` or `service`; `rows` 0 watches nothing."""

    every_s: float = 1.0
    rows: int = 128
    reference: str = "package"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.every_s <= 86400:
            raise ValueError(f"every_s must be from 0 to 86400, found {self.every_s}")
        if self.rows and not 50 <= self.rows <= 10_000:
            raise ValueError(f"rows must be 0 or from 50 to 10000, found {self.rows}")
        if self.reference not in ("package", "service"):
            raise ValueError(f"reference must be package or service, found {self.reference!r}")
        if self.extra:
            raise ValueError(
                f"drift: unknown keys {sorted(self.extra)}; known are every_s, rows and reference"
            )


@dataclass
class Memory:
    """What is kept of one version: reference (or rows on the way to one), the window in hand, and the alarm."""

    version: str
    reference: Reference | None = None
    first: tuple[Mapping[str, float], ...] = ()
    window: tuple[Mapping[str, float], ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    windows: int = 0
    odd: int = 0
    quiet: int = 0
    is_drift: bool = False


_NONE = Reference(1, "service", {})


class Monitor:
    """Watches one version of one model; thread-safe."""

    def __init__(
        self,
        manifest: Manifest,
        memory: Memory,
        options: DriftOptions,
        tell: Callable[[dict[str, Any]], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.memory = memory
        self._manifest = manifest
        self._options = options
        self._tell = tell
        self._monotonic = monotonic
        self._next = float("-inf")
        self._guard = threading.Lock()

    @property
    def is_due(self) -> bool:
        """Whether the next request is to be looked at."""
        return self._monotonic() >= self._next

    def look(self, inputs: Arrays, outputs: Arrays) -> None:
        """Look at the first row of a request and its answer, in the signature's space."""
        if not self._guard.acquire(blocking=False):
            return
        try:
            began = self._monotonic()
            row = features_of(self._manifest, inputs, outputs)
            if row:
                self._add(row)
            now = self._monotonic()
            self._next = now + max(self._options.every_s, (now - began) / MOST_COST)
        except (ValueError, TypeError, LookupError, ArithmeticError):
            # an answer that the model gave is not lost to whoever only watches
            _log.exception("%s is not watched any more", self._manifest.title)
            self._next = float("inf")
        finally:
            self._guard.release()

    def summary(self) -> dict[str, Any]:
        """What is known, for people and scripts."""
        with self._guard:
            return summary(self.memory)

    def verdicts(self) -> tuple[Verdict, ...]:
        """Those of the last window that was judged, the oddest first."""
        return self.memory.verdicts

    def _add(self, row: dict[str, float]) -> None:
        memory = self.memory
        if memory.reference is None:
            memory.first = (*memory.first, row)
            if len(memory.first) >= FIRST_WINDOWS * self._options.rows:
                memory.reference = make_reference(memory.first, "service")
                memory.first = ()
                self._say("reference")
            return
        memory.window = (*memory.window, row)
        if len(memory.window) >= self._options.rows:
            rows, memory.window = memory.window, ()
            self._judge(rows, memory.reference)

    def _judge(self, rows: tuple[Mapping[str, float], ...], reference: Reference) -> None:
        memory = self.memory
        counts = {name: [0] * len(entry.counts) for name, entry in reference.features.items()}
        sums = dict.fromkeys(counts, 0.0)
        for row in rows:
            for name, value in row.items():
                if name in counts:
                    counts[name][reference.features[name].bin(value)] += 1
                    sums[name] += value
        means = {name: sums[name] / sum(seen) for name, seen in counts.items() if sum(seen)}
        memory.verdicts = judge(reference, counts, means)
        memory.windows += 1
        is_odd = any(verdict.is_drift for verdict in memory.verdicts)
        is_quiet = all(verdict.is_quiet for verdict in memory.verdicts)
        memory.odd = memory.odd + 1 if is_odd else 0
        memory.quiet = memory.quiet + 1 if is_quiet else 0
        if not memory.is_drift and memory.odd >= RAISE_AFTER:
            memory.is_drift = True
            self._say("drift")
        elif memory.is_drift and memory.quiet >= CLEAR_AFTER:
            memory.is_drift = False
            self._say("quiet")

    def _say(self, what: str) -> None:
        body = {"schema": SCHEMA, "model": self._manifest.name, "what": what, **summary(self.memory)}
        _log.warning("%s %s: %s %s", self._manifest.name, self.memory.version, what, body.get("feature", ""))
        self._tell(body)


class Drift:
    """The monitors of one device. `path` keeps what they know; `take` gives events' bodies."""

    def __init__(
        self,
        options: DriftOptions | None = None,
        path: Path | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options or DriftOptions()
        self._path = path
        self._monotonic = monotonic
        self._events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        self._monitors: dict[str, Monitor] = {}
        self._saved: dict[str, tuple[int, int]] = {}
        self._known = read_memories(path)

    def monitor(self, manifest: Manifest) -> Monitor | None:
        """The monitor of a model that begins to serve; None where nothing is watched."""
        if not self._options.rows:
            return None
        given = reference_of(manifest) if self._options.reference == "package" else None
        memory = self._known.get(manifest.name, Memory(""))
        is_other = given != memory.reference and (given or (memory.reference or _NONE).origin != "service")
        if memory.version != manifest.version or is_other:
            memory = Memory(manifest.version, given)
        found = Monitor(manifest, memory, self._options, self._events.append, self._monotonic)
        self._known[manifest.name] = memory
        self._monitors[manifest.name] = found
        return found

    def take(self) -> list[dict[str, Any]]:
        """Events since the last call; what is known is saved whenever a window ended."""
        found = []
        while self._events:
            found.append(self._events.popleft())
        marks = {name: (m.memory.windows, len(m.memory.first) // 64) for name, m in self._monitors.items()}
        if marks != self._saved:
            self._saved = marks
            self._save()
        return found

    def summaries(self) -> dict[str, dict[str, Any]]:
        """By model, what is known of those in service."""
        return {name: monitor.summary() for name, monitor in sorted(self._monitors.items())}

    def metrics(self) -> list[str]:
        """Lines for Prometheus."""
        lines = [
            "# HELP edgeopt_drift Whether what a model sees is far from its reference (1) or not (0).",
            "# TYPE edgeopt_drift gauge",
            "# HELP edgeopt_drift_psi Population stability index of the last window.",
            "# TYPE edgeopt_drift_psi gauge",
        ]
        for name, monitor in sorted(self._monitors.items()):
            labels = f'model="{name}",version="{monitor.memory.version}"'
            lines.append(f"edgeopt_drift{{{labels}}} {int(monitor.memory.is_drift)}")
            lines += [
                f'edgeopt_drift_psi{{{labels},feature="{_plain(verdict.feature)}"}} {verdict.psi:.6g}'
                for verdict in monitor.verdicts()
            ]
        return lines

    def _save(self) -> None:
        if self._path is None:
            return
        models = {name: to_json(memory) for name, memory in self._known.items()}
        try:
            write_durably(self._path, json.dumps({"schema": SCHEMA, "models": models}).encode())
        except StoreError as error:
            _log.warning("what is known of drift is not saved yet: %s", error)


def read_memories(path: Path | None) -> dict[str, Memory]:
    """What was saved, by model; nothing where it cannot be read."""
    try:
        raw = json.loads(path.read_bytes()) if path is not None else {}
        return {name: from_json(Memory, entry) for name, entry in raw.get("models", {}).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, DocumentError) as error:
        _log.warning("what was known of drift cannot be read (%s); it begins anew", error)
        return {}


def reference_of(manifest: Manifest) -> Reference | None:
    """The reference that a package carries, None for packages without one."""
    raw = manifest.extra.get(MANIFEST_KEY)
    if raw is None:
        return None
    try:
        return from_json(Reference, raw, MANIFEST_KEY)
    except DocumentError as error:
        _log.warning("%s: its statistics cannot be read: %s", manifest.title, error)
        return None


def summary(memory: Memory) -> dict[str, Any]:
    """What is known of one version."""
    reference, oddest = memory.reference, memory.verdicts[0] if memory.verdicts else None
    return {
        "version": memory.version,
        "state": "learning" if reference is None else "drift" if memory.is_drift else "steady",
        "reference": reference.origin if reference else "service",
        "reference_rows": reference.rows if reference else len(memory.first),
        "windows": memory.windows,
        **(
            {
                "feature": oddest.feature,
                "psi": round(oddest.psi, 4),
                "limit": round(oddest.limit, 4),
                "shift": round(oddest.shift, 3),
            }
            if oddest
            else {}
        ),
    }


def _plain(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
