# SPDX-License-Identifier: Apache-2.0
"""Events that wait on disk until the control plane has acknowledged them, with a bound and an honest count.

Rules:
- One file an event, named by its sequence number, flushed before anybody is told that it is kept.
- At most `limit` events wait; beyond that one that was never handed over is dropped and counted, for ever (which one:
  `urgency`). What was handed over may be in the ledger: it is never dropped, so that nothing is both delivered and counted.
- One batch of a lane is on its way at a time. It is noted on the disk before it is handed over, and sent again, and nothing else,
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
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from edgeopt_agent.files import disk_error, write_durably
from edgeopt_agent.urgency import Lane, first_to_drop, first_to_go, lane_of
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
        self._noted_next, self._noted_dropped = 1, 0  # what the record on the disk says
        self._events: set[int] = set()  # the files that count
        self._sent: set[int] = set()  # those that may have been handed over
        self._gone: set[int] = set()  # counted as dropped, and their files may still be there
        self._done: set[int] = set()  # acknowledged, likewise
        self._removed: set[int] = set()  # since the folder was flushed: a power cut may bring them back
        self._unread: set[int] = set()
        self._lanes: dict[int, Lane] = {}
        self.summarized = 0
        """Windows of service up to this number are in a summary."""
        self._missed = 0
        self._is_open = False
        try:  # a disk that refuses must not keep the device from serving
            self._open()
        except StoreError as error:
            _log.error("the outbox waits for the disk: %s", error)

    def add(self, kind: str, at: datetime, body: Mapping[str, Any], *, summarized: int = 0) -> None:
        """Keep an event; `summarized`: it speaks of all windows of service up to this number.

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
        self._lanes[number] = lane_of(kind)
        self.summarized = max(self.summarized, summarized)
        over = len(self._events) - self._limit
        if over > 0:
            dropped = first_to_drop({old: self._lane(old) for old in self._events - self._sent}, over)
            self.dropped += len(dropped)
            self._gone.update(dropped)
            self._events.difference_update(dropped)
        self._try_to_save()

    def batch(self, lane: Lane | None = None) -> EventBatch | None:
        """The events of a lane that are to be handed over now, or None: those on their way, else the first that wait.

        Without a lane: of the most urgent one that has some.
        """
        try:
            self._open()
        except StoreError as error:
            _log.warning("events wait for the disk: %s", error)
            return None
        for one in Lane if lane is None else (lane,):
            events = self._next_of(one)
            if events:
                return EventBatch(self._device, tuple(events), self.id, self._noted_dropped)
        return None

    def acknowledge(self, outbox: str, sequence: int) -> Lane | None:
        """Forget what the control plane has stored of a batch on its way, and say of which lane that was.

        It is the unbroken run of the batch's numbers that ends with `sequence`; of another batch it says nothing new.
        """
        if outbox != self.id or sequence not in self._sent:
            return None
        lane = self._lane(sequence)
        stored: set[int] = set()
        number = sequence
        while number in self._sent - self._unread and self._lane(number) is lane:
            stored.add(number)
            number -= 1
        if self._noted_next <= sequence and not self._try_to_save():
            return None  # without its record the numbers would be given again; it comes again
        self._events -= stored
        self._sent -= stored
        self._done |= stored
        self._remove(self._done)
        return lane

    def events(self, kind: str) -> Iterator[Event]:
        """What waits of a kind and can be read now, ascending."""
        for number in sorted(self._events):
            if self._lane(number) is lane_of(kind):
                with contextlib.suppress(OSError, DocumentError):
                    event = from_bytes(Event, self._path(number).read_bytes())
                    if event.kind == kind:
                        yield event

    def __len__(self) -> int:
        return len(self._events if self._is_open else self._files())

    def _next_of(self, lane: Lane) -> list[Event]:
        waiting = {number for number in self._events if self._lane(number) is lane}
        again = waiting & self._sent
        events = self._read_events(self._without_unread(again or waiting, lane))
        if events and not again:
            self._sent.update(event.sequence for event in events)
            self._try_to_save()
        return events

    def _lane(self, number: int) -> Lane:
        """How urgent an event is; what is not read is telemetry until it is."""
        if number not in self._lanes:
            try:
                self._lanes[number] = lane_of(from_bytes(Event, self._path(number).read_bytes()).kind)
            except DocumentError:
                self._lanes[number] = Lane.BULK
            except OSError:
                self._unread.add(number)  # no acknowledgement of telemetry is for it
                return Lane.BULK
        return self._lanes[number]

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

    def _without_unread(self, numbers: set[int], lane: Lane) -> list[int]:
        """The first of these; what was not read is tried again alone, so that no acknowledgement of others is for it."""
        return first_to_go(numbers - self._unread or numbers, lane, BATCH_EVENTS)

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
            self.summarized = int(record.get("summarized", 0))
            sent, gone, done = (_numbers(record, key) & files for key in ("sent", "going", "done"))
            self._gone = gone | {number for number in files if number <= older}
            self._done = done - self._gone
            self._sent = sent - self._gone - done
            is_new = False
        except (ValueError, KeyError, TypeError, AttributeError):
            self.id, self._next, self.dropped = uuid.uuid4().hex, 1, len(files)
            self._sent, self._done, self._gone = set(), set(), set(files)  # numbers of another life
            self.summarized = 0
        self._noted_next, self._noted_dropped = (1, 0) if is_new else (self._next, self.dropped)
        self._events = files - self._gone - self._done
        self._next = max(self._next, max(files, default=0) + 1)
        self.dropped += self._missed
        self._missed = 0
        self._is_open = True
        if is_new:  # before the first event, so that none is ever without its outbox
            self._try_to_save()
        else:
            self._remove(self._gone | self._done)

    def _may_exist(self, number: int) -> bool:
        try:
            return self._path(number).exists()
        except OSError:
            return True

    def _remove(self, numbers: set[int]) -> None:
        """Remove files; what the disk does not remove now is tried again with the next record."""
        for number in numbers - self._removed:
            with contextlib.suppress(OSError):
                self._path(number).unlink(missing_ok=True)
                self._removed.add(number)
                self._lanes.pop(number, None)

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
            "sent": sorted(self._sent),
            "going": sorted(self._gone),
            "done": sorted(self._done),
            "summarized": self.summarized,
        }
        write_durably(self._record, json.dumps(record).encode())
        self._noted_next, self._noted_dropped = self._next, self.dropped
        self._gone -= self._removed
        self._done -= self._removed
        self._removed.clear()
        self._remove(self._gone | self._done)


def _numbers(record: Mapping[str, Any], key: str) -> set[int]:
    return {int(number) for number in record.get(key, ())}
