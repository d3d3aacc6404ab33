# SPDX-License-Identifier: Apache-2.0
"""Keeps what lies outside the database in step with it: the endpoint's certificate, and the broker's lists.

Rules:
- Whoever was shut out is written down, told to the broker, and kicked before the operator is answered.
- A new device is told to the broker at once, or within `AT_MOST_EVERY_S` where many come together: each telling makes
  the broker read everything again.
- Once an hour everything is looked at without a cause: lists and certificates end.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from edgeopt.fleet.authority import LIFETIME, common_name
from edgeopt.fleet.enrolment import Enrolment
from edgeopt.fleet.mosquitto import MosquittoFolder
from edgeopt_agent.files import write_durably
from edgeopt_wire.errors import EdgeoptError

_log = logging.getLogger(__name__)

AT_MOST_EVERY_S = 1.0
LOOK_EVERY_S = 3600.0
SERVER_FILE = "enrolment.pem"


class Admission:
    """The thread that keeps lists fresh. `kick` ends a device's session at the broker."""

    def __init__(
        self,
        enrolment: Enrolment,
        folder: Path,
        names: Sequence[str],
        clock: Callable[[], datetime],
        *,
        broker: MosquittoFolder | None = None,
        kick: Callable[[str], None] = lambda client_id: None,  # noqa: ARG005 - the signature of who kicks
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        self._enrolment = enrolment
        self._file = folder / SERVER_FILE
        self._names = list(names)
        self._clock = clock
        self._broker = broker
        self._kick = kick
        self._look_every_s = look_every_s
        self._lock = threading.Lock()
        self._told_at = float("-inf")
        self._due = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="admission", daemon=True)
        self._context: ssl.SSLContext | None = None
        self._made_at = clock()
        enrolment.on_change = self.changed

    def start(self) -> None:
        """Tell the broker what the database says now, then go on in the background.

        Raises:
            StoreError: The disk refused, or the broker's folder is none.
        """
        self._refresh()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._due.set()
        self._thread.join(10)

    def server_file(self) -> Path:
        """The endpoint's certificate and key in one file, made anew.

        Raises:
            StoreError: The disk refused.
        """
        self._made_at = self._clock()
        certificate, key = self._enrolment.authority.issue_server(self._names, self._made_at)
        write_durably(self._file, certificate.encode("ascii") + key)
        return self._file

    def use_context(self, context: ssl.SSLContext) -> None:
        """The endpoint's running TLS context, which is given its next certificate when the time comes."""
        self._context = context

    def changed(self, shut_out: Sequence[str]) -> None:
        """Who may connect changed; returns when those who were shut out are."""
        if not shut_out and time.monotonic() - self._told_at < AT_MOST_EVERY_S:
            self._due.set()
            return
        self._guarded(self._refresh)
        for device in shut_out:
            self._guarded(partial(self._kick, common_name(self._enrolment.tenant, device)))

    def _keep(self) -> None:
        looked = time.monotonic()
        while not self._stopping.is_set():
            is_due = self._due.wait(self._look_every_s)
            if self._stopping.is_set():
                return
            if is_due:
                self._stopping.wait(AT_MOST_EVERY_S)
                self._due.clear()
            self._guarded(self._refresh)
            if time.monotonic() - looked >= self._look_every_s:
                looked = time.monotonic()
                self._guarded(self._renew_own)

    def _refresh(self) -> None:
        with self._lock:
            self._told_at = time.monotonic()
            if self._broker is not None:
                self._broker.refresh(self._enrolment.admitted(), self._enrolment.revoked(), self._clock())

    def _renew_own(self) -> None:
        """Give the running endpoint its next certificate, long before the one that it has ends."""
        if self._context is not None and self._clock() - self._made_at > LIFETIME / 3:
            self._context.load_cert_chain(self.server_file())

    def _guarded(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except EdgeoptError as error:
            _log.error("who may connect could not be told: %s", error)
        except Exception:  # noqa: BLE001 - the outermost loop of this thread: tried again at the next look
            _log.exception("who may connect could not be told")
