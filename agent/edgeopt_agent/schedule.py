# SPDX-License-Identifier: Apache-2.0
"""When a model's outputs were last proven and its variants last measured, and when that is due again.

Rules:
- Times have jitter (10 % either way), the same after a restart: a fleet that was installed in one night is not busy
  in one night for ever.
- The clock may jump. Due is what trusted time says, or what this process has lived through, whichever is earlier.
- A record that cannot be read costs one period, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from edgeopt_agent.files import write_durably
from edgeopt_wire.document import format_moment, from_json, parse_json, parse_moment, to_json
from edgeopt_wire.errors import DocumentError, StoreError

_log = logging.getLogger(__name__)

SCHEMA = "edgeopt.upkeep/1"
JITTER = 0.1


@dataclass(frozen=True)
class UpkeepOptions:
    """The key `upkeep` of the agent's configuration; hours, 0 for never. `patience_s` is waited for a calm board."""

    golden_every_h: float = 24.0
    measure_every_h: float = 168.0
    patience_s: float = 6 * 3600.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("golden_every_h", "measure_every_h"):
            value = getattr(self, name)
            if value and not 1 <= value <= 24 * 366:
                raise ValueError(f"{name} must be 0 or from 1 to 8784, found {value}")
        if not 0 <= self.patience_s <= 7 * 86400:
            raise ValueError(f"patience_s must be from 0 to 604800, found {self.patience_s}")
        if self.extra:
            raise ValueError(
                f"upkeep: unknown keys {sorted(self.extra)}; known are golden_every_h, measure_every_h and patience_s"
            )


@dataclass(frozen=True)
class Noted:
    """What is kept of one model: its package, the last moments, and what was found wrong (empty: nothing)."""

    package_sha256: str
    golden_at: str
    measured_at: str
    degraded: str = ""
    manifest_sha256: str = ""
    """What the manifest was when the package began to serve, which is when all of it had just been verified."""
    before: Mapping[str, str] = field(default_factory=dict)
    """The same of the package before, by its digest: it may have to serve again."""
    restarted: str = ""
    """The package for which this process was ended, so that another might do better: once."""


class Schedule:
    """The notes of all models, in one file. `now` is trusted time, `monotonic` seconds of this process."""

    def __init__(
        self, path: Path, device: str, now: Callable[[], datetime], monotonic: Callable[[], float]
    ) -> None:
        self._path = path
        self._device = device
        self._now = now
        self._monotonic = monotonic
        self._since: dict[tuple[str, str], float] = {}
        self._notes = read_notes(path)

    def note(self, model: str, package_sha256: str, manifest: Callable[[], str] = str) -> Noted:
        """What is kept of a model; another package than the last begins anew, proven and measured by its installation.

        `manifest` is asked for the digest of a new package's manifest.
        """
        found = self._notes.get(model)
        if found is None or found.package_sha256 != package_sha256:
            at = format_moment(self._now())
            before = {found.package_sha256: found.manifest_sha256} if found is not None else {}
            found = Noted(package_sha256, at, at, manifest_sha256=manifest(), before=before)
            for what in ("golden", "measured"):
                self._since[model, what] = self._monotonic()
            self._keep(model, found)
        return found

    def is_due(self, model: str, what: str, every_s: float) -> bool:
        """Whether `golden` or `measured` of a noted model is longer ago than `every_s`; never for 0."""
        if not every_s:
            return False
        note = self._notes[model]
        at = note.golden_at if what == "golden" else note.measured_at
        seed = hashlib.sha256(f"{self._device} {model} {what} {at}".encode()).digest()
        period = every_s * (1 + JITTER * (2 * int.from_bytes(seed[:4], "big") / 2**32 - 1))
        since = self._since.setdefault((model, what), self._monotonic())
        past = self._now() - _moment(at, self._now())
        return past >= timedelta(seconds=period) or self._monotonic() - since >= period

    def done(self, model: str, what: str, **changes: str) -> None:
        """`golden` or `measured` was done now; `changes` of the note with it."""
        self._since[model, what] = self._monotonic()
        note, at = self._notes[model], format_moment(self._now())
        note = replace(note, golden_at=at) if what == "golden" else replace(note, measured_at=at)
        self._keep(model, _changed(note, changes))

    def mark(self, model: str, **changes: str) -> None:
        """Change a note, and no moment."""
        self._keep(model, _changed(self._notes[model], changes))

    def degraded(self) -> dict[str, str]:
        """By model, what is wrong with it."""
        return _degraded(self._notes)

    def _keep(self, model: str, note: Noted) -> None:
        self._notes[model] = note
        notes = {name: to_json(entry) for name, entry in self._notes.items()}
        try:
            write_durably(self._path, json.dumps({"schema": SCHEMA, "models": notes}).encode())
        except StoreError as error:
            _log.warning("when models were proven is not saved: %s", error)


def read_notes(path: Path) -> dict[str, Noted]:
    """The notes of a file by model; none where it cannot be read."""
    try:
        raw = parse_json(path.read_bytes(), str(path)).get("models", {})
        return {name: from_json(Noted, entry) for name, entry in raw.items()}
    except FileNotFoundError:
        return {}
    except (OSError, AttributeError, DocumentError) as error:
        _log.warning("%s cannot be read (%s); models are proven a period from now", path, error)
        return {}


def degraded(path: Path) -> dict[str, str]:
    """By model, what a file's notes say is wrong with it."""
    return _degraded(read_notes(path))


def _degraded(notes: Mapping[str, Noted]) -> dict[str, str]:
    return {model: note.degraded for model, note in sorted(notes.items()) if note.degraded}


def _changed(note: Noted, changes: Mapping[str, str]) -> Noted:
    """The note with other words; only `degraded` and `restarted` may change."""
    return replace(
        note,
        degraded=changes.get("degraded", note.degraded),
        restarted=changes.get("restarted", note.restarted),
    )


def _moment(text: str, otherwise: datetime) -> datetime:
    try:
        return parse_moment(text)
    except DocumentError:
        return otherwise
