# SPDX-License-Identifier: Apache-2.0
"""What the director wants of this device: documents that are checked, put off, refused or accepted, and the time.

Rules:
- `desired` counts only with the director's signature, for this device, and not older than the newest that was seen.
- The record of what was seen is on the disk before anything follows from a document.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace

from edgeopt_agent.pauses import Pause
from edgeopt_agent.store import DeviceRecord, Store
from edgeopt_agent.telling import Teller
from edgeopt_agent.trust import Trust
from edgeopt_wire.document import format_moment, parse_moment
from edgeopt_wire.errors import EdgeoptError, ForgedError, StoreError, TransportError
from edgeopt_wire.messages import Desired, DesiredModel

_log = logging.getLogger(__name__)


class Wishes:
    """The wishes of one device. `accepted` is told what is wanted now, by model, and the revision that says so."""

    def __init__(
        self,
        device: str,
        store: Store,
        trust: Trust,
        teller: Teller,
        accepted: Callable[[dict[str, DesiredModel], int], None],
        *,
        monotonic: Callable[[], float],
    ) -> None:
        self._device = device
        self._store = store
        self._trust = trust
        self._teller = teller
        self._accepted = accepted
        self._monotonic = monotonic
        self._unread: bytes | None = None
        self._time_due = False
        self._record: DeviceRecord | None = None
        self.pause = Pause()
        self.unread_because = ""
        """Why the newest desired document cannot be followed yet, empty if it is."""

    @property
    def is_waiting(self) -> bool:
        """Whether a document waits until it can be checked."""
        return self._unread is not None

    @property
    def revision(self) -> int:
        """The newest revision that was accepted."""
        try:
            return self._known().revision
        except StoreError:
            return 0

    def came(self, envelope: bytes) -> None:
        """A document came."""
        self.pause = Pause()
        self._read(envelope)

    def online(self) -> None:
        """The other side is there again: ask for the time, and try what waits soon."""
        self._time_due = True
        self.pause.shorten(self._monotonic())

    def again(self) -> None:
        """Try what was put off and is due."""
        if self._time_due:
            self._ask_time()
        if self._unread is not None and self._monotonic() >= self.pause.until:
            self._read(self._unread)

    def _read(self, envelope: bytes) -> None:
        try:
            desired = self._trust.open_desired(envelope, self._device)
            self._accept(desired, hashlib.sha256(envelope).hexdigest())
        except ForgedError as error:
            # the document may be right and the metadata before it forged: only another answer can tell
            self._put_off(envelope, error)
            self._teller.alarm("", str(error))
            return
        except (TransportError, StoreError) as error:
            self._put_off(envelope, error)
            _log.warning("a desired document cannot be checked or kept yet: %s", error)
            return
        except EdgeoptError as error:
            self._teller.alarm("", f"a desired document is refused: {error}")
        self._unread = None
        self.unread_because = ""

    def _put_off(self, envelope: bytes, error: EdgeoptError) -> None:
        self._unread = envelope
        self.unread_because = str(error)
        self.pause.begin(self._monotonic())

    def _accept(self, desired: Desired, digest: str) -> None:
        record = _since(self._known(), self._trust.director_keys)
        if desired.revision < record.revision:
            _log.warning("desired revision %d is older than %d; ignored", desired.revision, record.revision)
            return
        content = hashlib.sha256(repr(desired.models).encode()).hexdigest()
        if desired.revision == record.revision and content != record.desired_sha256:
            _log.error(
                "desired revision %d came twice with other content; ignored (%s)",
                desired.revision,
                digest[:12],
            )
            return
        newest = max(
            desired.issued_at,
            parse_moment(record.newest_moment) if record.newest_moment else desired.issued_at,
        )
        fresh = replace(
            record, revision=desired.revision, desired_sha256=content, newest_moment=format_moment(newest)
        )
        self._save(fresh)
        self._accepted({model.name: model for model in desired.models}, desired.revision)
        self._teller.is_due()

    def _known(self) -> DeviceRecord:
        """What was seen. Without it nothing is obeyed: an older document could come again.

        Raises:
            StoreError: It cannot be read now, or is a newer agent's.
        """
        if self._record is None:
            self._record = self._store.load_device()
        return self._record

    def _save(self, record: DeviceRecord) -> None:
        if record != self._record:
            self._store.save_device(record)
            self._record = record

    def _ask_time(self) -> None:
        """Once a connection: learn the time from the director, and keep it as the floor of later starts."""
        self._time_due = False
        try:
            moment = self._trust.ask_time()
            if moment is not None:
                record = self._known()
                before = record.newest_moment
                newest = max(moment, parse_moment(before) if before else moment)
                self._save(replace(record, newest_moment=format_moment(newest)))
        except (TransportError, StoreError) as error:
            _log.warning("the time is not known yet: %s", error)
        except EdgeoptError as error:
            self._teller.alarm("", str(error))


def _since(record: DeviceRecord, director: frozenset[str]) -> DeviceRecord:
    """The record as far as this director goes: another one's revisions start again.

    A thief who signed a revision far ahead would otherwise be obeyed for ever (fast-forward).
    """
    same = not record.director or bool(set(record.director) & director)
    fresh = record if same else replace(record, revision=0, desired_sha256="")
    return replace(fresh, director=tuple(sorted(director)))
