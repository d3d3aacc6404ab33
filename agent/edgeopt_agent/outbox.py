# SPDX-License-Identifier: Apache-2.0
"""Events that wait on disk until the control plane has acknowledged them, with a bound and an honest count.

Rules:
- One file an event, named by its sequence number, flushed before anybody is told that it is kept.
- At most `limit` events wait; beyond that the oldest is dropped and counted, for ever.
- What the disk does not read for a moment waits; only what is damaged counts as dropped. An event that cannot be kept
  because the record is not read yet is counted when it is.
- A drop is counted on the disk before the event goes: a power cut between the two loses nothing and counts nothing twice.
- The outbox has an id of its own: after a lost disk the numbers start again under another id, so that nothing new is
  taken for something old.
"""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from edgeopt_agent.files import disk_error, write_durably
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import DocumentError, StoreError
from edgeopt_wire.messages import Event, EventBatch

_log = logging.getLogger(__name__)

LIMIT = 2000
BATCH_EVENTS = 20
BATCH_BYTES = 64 * 1024


class Outbox:
    """Events of one device in a folder.

    Raises:
        StoreError: The folder cannot be made.
    """

    def __init__(self, folder: Path, device: str, limit: int = LIMIT) -> None:
        self._folder = folder
        self._device = device
        self._limit = limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(f"cannot use the outbox {folder}", error) from error
        self.id, self._next, self.dropped = "", 1, 0
        self._gone = 0  # events up to this number were counted as dropped
        self._missed = 0
        self._unread: set[int] = set()
        self._is_open = False
        try:  # a disk that refuses must not keep the device from serving
            self._open()
        except StoreError as error:
            _log.error("the outbox waits for the disk: %s", error)

    def add(self, kind: str, at: datetime, body: Mapping[str, Any]) -> None:
        """Keep an event.

        Raises:
            StoreError: The disk refused.
        """
        try:
            self._open()
        except StoreError:
            self._missed += 1
            raise
        event = Event(self._next, kind, at, dict(body))
        write_durably(self._path(self._next), to_bytes(event))
        self._next += 1
        waiting = self._waiting()
        over = waiting[: max(0, len(waiting) - self._limit)]
        if over:
            self._gone = over[-1]
            self.dropped += len(over)
        self._save()
        self._remove_gone()

    def batch(self) -> EventBatch | None:
        """The oldest events that wait, or None."""
        try:
            self._open()
        except StoreError as error:
            _log.warning("events wait for the disk: %s", error)
            return None
        events: list[Event] = []
        size = 0
        for sequence in self._waiting()[:BATCH_EVENTS]:
            try:
                raw = self._path(sequence).read_bytes()
                event = from_bytes(Event, raw)
                self._unread.discard(sequence)
            except OSError as error:
                _log.warning("event %d cannot be read now and waits: %s", sequence, error)
                self._unread.add(sequence)
                continue
            except DocumentError as error:
                _log.error("event %d cannot be read and counts as dropped: %s", sequence, error)
                self._path(sequence).unlink(missing_ok=True)
                self.dropped += 1
                continue
            size += len(raw)
            if events and size > BATCH_BYTES:
                break
            events.append(event)
        return EventBatch(self._device, tuple(events), self.id, self.dropped) if events else None

    def acknowledge(self, outbox: str, sequence: int) -> None:
        """Forget what the control plane has stored."""
        if outbox != self.id:
            return
        for waiting in self._waiting():
            if waiting <= sequence and waiting not in self._unread:  # what was not read was not sent
                self._path(waiting).unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._waiting())

    def _waiting(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("*.event") if path.stem.isdigit())

    @property
    def _record(self) -> Path:
        return self._folder / "outbox.json"

    def _path(self, sequence: int) -> Path:
        return self._folder / f"{sequence:012d}.event"

    def _open(self) -> None:
        """Read the record, once; what is damaged begins another life."""
        if self._is_open:
            return
        try:
            raw = self._record.read_bytes()
        except FileNotFoundError:
            raw = b""
        except OSError as error:
            raise disk_error(f"cannot read {self._record}", error) from error
        try:
            record = json.loads(raw)
            self.id, self._next = str(record["id"]), int(record["next"])
            self.dropped, self._gone = int(record["dropped"]), int(record.get("gone", 0))
        except (ValueError, KeyError, TypeError):
            self.id, self._next, self.dropped, self._gone = uuid.uuid4().hex, 1, 0, 0
            for sequence in self._waiting():  # numbers of another life
                self._path(sequence).unlink(missing_ok=True)
                self.dropped += 1
            with contextlib.suppress(OSError):  # the next event replaces it
                self._record.unlink(missing_ok=True)
        self._remove_gone()
        waiting = self._waiting()
        self._next = max(self._next, waiting[-1] + 1 if waiting else 1)
        self.dropped += self._missed
        self._missed = 0
        self._is_open = True
        if not self._record.exists():  # before the first event, so that none is ever without its outbox
            try:
                self._save()
            except StoreError as error:
                _log.error("the outbox is not kept yet: %s", error)

    def _remove_gone(self) -> None:
        for sequence in self._waiting():
            if sequence <= self._gone:
                self._path(sequence).unlink(missing_ok=True)

    def _save(self) -> None:
        record = {"id": self.id, "next": self._next, "dropped": self.dropped, "gone": self._gone}
        write_durably(self._record, json.dumps(record).encode())
