# SPDX-License-Identifier: Apache-2.0
"""A new key and certificate before the old ones end: asked for, tried at the broker, and only then put in their place.

    next.key        the new key; found again after a cut, so that the answer is the same
    next.pem        the new pair, checked, not yet used
    identity.pem    the pair in use: replaced by a rename once the broker has taken the new one
    renewal.json    what `status` and `doctor` tell: the last attempt, its error, what is still to be confirmed

Rules:
- The old pair stays until a connection of its own has shown that the broker takes the new one.
- Whatever is cut goes on at the next step: each state is told by which files are there.
- Dates are judged by signed time where there is some. A clock that is behind cannot hide an expired certificate for ever:
  a device that the broker does not take for a while asks whether its certificate can be renewed.
- One process at a time renews; the lock is the kernel's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from edgeopt_agent import credentials
from edgeopt_agent.credentials import PAIR_FILE, Pair, read_pair
from edgeopt_agent.endpoint import Endpoint
from edgeopt_agent.files import sync_folder, write_durably
from edgeopt_wire.document import format_moment
from edgeopt_wire.enrolment import (
    CONFIRM_PATH,
    RENEW_PATH,
    Confirm,
    Renewed,
    RenewRequest,
    confirm_bytes,
    renewal_bytes,
)
from edgeopt_wire.errors import EdgeoptError, ForgedError, StoreError

_log = logging.getLogger(__name__)

Trial = Callable[[Path, str], None]
"""Connects to the broker with the pair in a file, trusting these authorities (PEM).

Raises:
    TransportError: The broker cannot be reached: nothing is known of the pair.
    TrustError: It does not take the pair.
"""


@dataclass(frozen=True)
class Progress:
    """What is kept of the last attempt. `unconfirmed`: the endpoint has not yet heard that the new pair is in use."""

    attempted_at: str = ""
    renewed_at: str = ""
    error: str = ""
    unconfirmed: bool = False


class Renewal:
    """One device's pair in a folder. `tell` hears what happened: a kind and a body of an event.

    `server` and `ca` are where the certificate comes from, and a file with the authorities that know it.
    """

    def __init__(
        self,
        folder: Path,
        server: str,
        ca: Path,
        *,
        tenant: str,
        device: str,
        trial: Trial,
        certain: Callable[[], datetime],
        tell: Callable[[dict[str, Any]], None] = lambda body: None,  # noqa: ARG005 - who listens decides
    ) -> None:
        self.folder = folder
        self._server = server
        self._ca = ca
        self._tenant = tenant
        self._device = device
        self._trial = trial
        self._certain = certain
        self._tell = tell

    @property
    def path(self) -> Path:
        """The file with the pair in use."""
        return self.folder / PAIR_FILE

    def pair(self) -> Pair:
        """The pair in use.

        Raises:
            StoreError: It cannot be read.
        """
        return read_pair(self.path)

    @property
    def is_under_way(self) -> bool:
        """Whether a renewal was begun and not ended."""
        return (self.folder / "next.pem").exists() or (self.folder / "next.key").exists()

    def renew(self, now: datetime) -> Pair:
        """Get a new pair, have the broker take it, use it from the next connection on.

        Raises:
            TransportError: Endpoint or broker cannot be reached now.
            TrustError: The endpoint refuses, lies, or the broker does not take the new pair.
            StoreError: The disk refused, or another process renews.
        """
        with self._only_one():
            progress = replace(read_progress(self.folder), attempted_at=format_moment(now))
            try:
                pair = self._finish(self._fetch())
            except EdgeoptError as error:
                if progress.error != str(error):
                    self._tell({"what": "renewal-failed", "error": str(error)})
                self._note(replace(progress, error=str(error)))
                raise
            self._note(Progress(progress.attempted_at, format_moment(now), "", unconfirmed=True))
            self._tell(
                {"what": "renewed", "serial": pair.serial, "expires_at": format_moment(pair.expires_at)}
            )
            _log.info("the certificate was renewed, until %s", format_moment(pair.expires_at))
        return pair

    def try_current(self) -> None:
        """Connect to the broker with the pair in use; raises as a trial does, and StoreError without a pair."""
        self._trial(self.path, self._read_ca())

    def confirm(self) -> bool:
        """Tell the endpoint that the new pair is in use; returns whether it knows now."""
        progress = read_progress(self.folder)
        if not progress.unconfirmed:
            return True
        try:
            pair = self.pair()
            pem = pair.certificate_pem
            self._endpoint().post(CONFIRM_PATH, Confirm(pem, pair.sign(confirm_bytes(pem))))
            self._note(replace(progress, unconfirmed=False))
        except EdgeoptError as error:
            _log.warning("the new certificate is not confirmed yet: %s", error)
            return False
        return True

    def _fetch(self) -> Pair:
        """The next pair: the one that waits to be tried, or a new one from the endpoint."""
        waiting = self.folder / "next.pem"
        current = self.pair()
        if waiting.exists():
            with contextlib.suppress(StoreError):
                found = read_pair(waiting)
                if found.serial != current.serial and found.expires_at > self._certain():
                    return found
            waiting.unlink(missing_ok=True)
        key_file = self.folder / "next.key"
        key = credentials.kept_key(key_file)
        csr = credentials.make_request(key, current.name)
        request = RenewRequest(current.certificate_pem, csr, current.sign(renewal_bytes(csr)))
        answer = self._endpoint().ask(RENEW_PATH, request, Renewed)
        pair = credentials.join(
            key, answer.certificate, self._authorities(answer), self._tenant, self._device
        )
        if pair.expires_at <= self._certain():
            key_file.unlink(missing_ok=True)
            raise ForgedError("the certificate that came has ended already")
        if answer.ca != self._read_ca():
            write_durably(self.folder / "next-ca.pem", answer.ca.encode("ascii"))
        write_durably(waiting, pair.pem)
        key_file.unlink(missing_ok=True)
        return pair

    def _finish(self, pair: Pair) -> Pair:
        """Have the broker take the pair, then put it in its place."""
        waiting, authorities = self.folder / "next.pem", self.folder / "next-ca.pem"
        known = authorities.read_text("ascii") if authorities.exists() else self._read_ca()
        self._trial(waiting, known)
        try:
            if authorities.exists():
                authorities.replace(self._ca)
            waiting.replace(self.path)
            sync_folder(self.folder)
            (self.folder / "next.key").unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot put the new certificate into {self.folder}: {error.strerror}"
            ) from error
        return pair

    def _authorities(self, answer: Renewed) -> str:
        """Who may have signed: what we trust now, and what the endpoint, which we know, trusts from now on."""
        return f"{self._read_ca()}\n{answer.ca}"

    def _read_ca(self) -> str:
        try:
            return self._ca.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(
                f"cannot read the authority {self._ca}: {error}; enrol this device again"
            ) from error

    def _endpoint(self) -> Endpoint:
        return Endpoint(self._server, self._read_ca(), self._certain)

    def _note(self, progress: Progress) -> None:
        try:
            write_durably(self.folder / "renewal.json", json.dumps(asdict(progress)).encode())
        except StoreError as error:
            _log.error("what became of a renewal is not kept: %s", error)

    @contextmanager
    def _only_one(self) -> Iterator[None]:
        path = self.folder / "renewal.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(
                f"cannot use {self.folder}: {error.strerror}; run as the agent's user"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise StoreError(
                f"another process renews in {self.folder} now; look again in a minute"
            ) from error
        finally:
            os.close(descriptor)


def read_progress(folder: Path) -> Progress:
    """What is kept of the last attempt; nothing, if it cannot be read."""
    try:
        found = json.loads((folder / "renewal.json").read_bytes())
        return Progress(
            str(found.get("attempted_at", "")),
            str(found.get("renewed_at", "")),
            str(found.get("error", "")),
            bool(found.get("unconfirmed", False)),
        )
    except (OSError, ValueError, AttributeError):
        return Progress()
