# SPDX-License-Identifier: Apache-2.0
"""Events that wait on disk until the control plane has acknowledged them, with a bound and an honest count.

Rules:
- One file an event, named by its sequence number, flushed before anybody is told that it is kept.
- At most `limit` events wait; beyond that the oldest that was never handed over is dropped and counted, for ever. What was
  handed over may be in the ledger: it is never dropped, so that nothing is both delivered and counted.
- One batch is on its way at a time. It is noted on the disk before it is handed over, and sent again, and nothing else,
  until all of it is acknowledged; an acknowledgement of anything else says nothing.
- What the disk does not read for a moment waits; only what is damaged counts as dropped (it may have been delivered, if
  it was on its way: nobody can tell). An event that cannot be kept counts as soon as the record can be written.
- A drop is counted on the disk before the event goes: a power cut between the two loses nothing and counts nothing twice.
- The outbox has an id of its own: after a lost disk the numbers start again under another id, so that nothing new is
  taken for something old. A number is never given twice, whatever the disk refuses.
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
        self._noted_next = 1  # what the record on the disk says
        self._events: set[int] = set()  # the files that count
        self._sent: set[int] = set()  # those that may have been handed over
        self._gone: set[int] = set()  # counted as dropped, and their files may still be there
        self._done: set[int] = set()  # acknowledged, likewise
        self._removed: set[int] = (
            set()
        )  # removed since the folder was flushed: a power cut may bring them back
        self._unread: set[int] = set()
        self._missed = 0
        self._is_open = False
        try:  # a disk that refuses must not keep the device from serving
            self._open()
        except StoreError as error:
            _log.error("the outbox waits for the disk: %s", error)

    def add(self, kind: str, at: datetime, body: Mapping[str, Any]) -> None:
        """Keep an event.

        Raises:
            StoreError: The disk refused; the event counts as dropped.
        """
        try:
            self._open()
        except StoreError:
            self._missed += 1
            raise
        number = self._next
        try:
            write_durably(self._path(number), to_bytes(Event(number, kind, at, dict(body))))
        except StoreError:
            self.dropped += 1
            if self._may_exist(number):  # renamed and not flushed: its number is used up
                self._next += 1
                self._gone.add(number)
            raise
        self._next += 1
        self._events.add(number)
        unsent = sorted(self._events - self._sent)
        over = unsent[: max(0, len(self._events) - self._limit)]
        self.dropped += len(over)
        self._gone.update(over)
        self._events.difference_update(over)
        self._try_to_save()

    def batch(self) -> EventBatch | None:
        """The events that are to be handed over now, or None: those on their way, else the oldest that wait."""
        try:
            self._open()
        except StoreError as error:
            _log.warning("events wait for the disk: %s", error)
            return None
        is_again = bool(self._sent)
        events = self._read_events(self._without_unread(self._sent if is_again else self._events))
        if not events:
            return None
        if not is_again:
            self._sent = {event.sequence for event in events}
            self._try_to_save()
        return EventBatch(self._device, tuple(events), self.id, self.dropped)

    def acknowledge(self, outbox: str, sequence: int) -> None:
        """Forget what the control plane has stored: of the batch on its way, what is not above `sequence`.

        The number of an acknowledgement is always one of its batch; of another batch it says nothing new.
        """
        if outbox != self.id or sequence not in self._sent:
            return
        stored = {number for number in self._sent if number <= sequence} - self._unread
        if self._noted_next <= sequence and not self._try_to_save():
            return  # without its record the numbers would be given again; it comes again
        self._events -= stored
        self._sent -= stored
        self._done |= stored
        self._remove()

    def __len__(self) -> int:
        return len(self._events if self._is_open else self._files())

    def _read_events(self, numbers: list[int]) -> list[Event]:
        events: list[Event] = []
        size = 0
        for number in numbers:
            try:
                raw = self._path(number).read_bytes()
                event = from_bytes(Event, raw)
            except (DocumentError, FileNotFoundError) as error:
                _log.error("event %d cannot be read and counts as dropped: %s", number, error)
                self.dropped += 1
                self._gone.add(number)
                for known in (self._events, self._sent, self._unread):
                    known.discard(number)
                self._try_to_save()
                continue
            except OSError as error:
                _log.warning("event %d cannot be read now and waits: %s", number, error)
                self._unread.add(number)
                continue
            self._unread.discard(number)
            size += len(raw)
            if events and size > BATCH_BYTES:
                break
            events.append(event)
        return events

    def _without_unread(self, numbers: set[int]) -> list[int]:
        """The first of these; what was not read is tried again alone, so that no acknowledgement of others is for it."""
        return sorted(numbers - self._unread or numbers)[:BATCH_EVENTS]

    def _files(self) -> set[int]:
        return {int(path.stem) for path in self._folder.glob("*.event") if path.stem.isdigit()}

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
        files = self._files()
        is_new = True
        try:
            record = json.loads(raw)
            self.id, self._next = str(record["id"]), int(record["next"])
            self.dropped = int(record["dropped"])
            older = int(record.get("gone", 0))  # older agents dropped everything up to a number
            self._sent = {int(number) for number in record.get("sent", ())} & files
            gone = {int(number) for number in record.get("going", ())}
            self._gone = {number for number in files if number <= older or number in gone} - self._sent
            is_new = False
        except (ValueError, KeyError, TypeError, AttributeError):
            self.id, self._next, self.dropped = uuid.uuid4().hex, 1, len(files)
            self._sent, self._gone = set(), set(files)  # numbers of another life
        self._noted_next = 1 if is_new else self._next
        self._events = files - self._gone
        self._next = max(self._next, max(files, default=0) + 1)
        self.dropped += self._missed
        self._missed = 0
        self._is_open = True
        if is_new:  # before the first event, so that none is ever without its outbox
            self._try_to_save()
        else:
            self._remove()

    def _may_exist(self, number: int) -> bool:
        try:
            return self._path(number).exists()
        except OSError:
            return True

    def _remove(self) -> None:
        """Remove the files of what has gone and of what is done; the rest is tried again with the next record."""
        for number in (self._gone | self._done) - self._removed:
            with contextlib.suppress(OSError):
                self._path(number).unlink(missing_ok=True)
                self._removed.add(number)

    def _try_to_save(self) -> bool:
        try:
            self._save()
        except StoreError as error:
            _log.error("the outbox's record is not kept yet: %s", error)
            return False
        return True

    def _save(self) -> None:
        """Write the record, then remove what it says has gone.

        Removals are flushed with the record's folder, and not before: until then the record names them as what they were,
        done or gone, in case that a power cut brings them back.
        """
        record = {
            "id": self.id,
            "next": self._next,
            "dropped": self.dropped,
            "sent": sorted(self._sent | self._done),
            "going": sorted(self._gone),
        }
        write_durably(self._record, json.dumps(record).encode())
        self._noted_next = self._next
        self._gone -= self._removed
        self._done -= self._removed
        self._removed.clear()
        self._remove()
