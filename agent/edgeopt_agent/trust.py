# SPDX-License-Identifier: Apache-2.0
"""Whom a device believes: the repository's signed metadata, and the director's word.

Rules:
- Dates are judged by trusted time (`edgeopt_agent.trusted_time`). A device whose clock says nothing, on a transport that
  can ask, installs nothing new before the director has signed the time for it.
- The director cannot move time or revisions away: what it signs is never dated after the repository's own timestamp
  ends, and who counts as the director is signed by the targets role.
- Expired is a `TransportError`, it may be fresh tomorrow, and stops new installations only. A `ForgedError` is an
  answer that nobody signed: what runs goes on, and the question is asked again. Any other `TrustError` is final.
- An index counts only at the path that its own name, version and device class make: a team that may sign its own models
  cannot offer one of them under another's name.
- A device that lost what it knew of the newest versions believes no repository without a proof (`edgeopt_agent.past`).
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from edgeopt_agent.director import DIRECTOR_TARGET, Director, read_director
from edgeopt_agent.past import Past, why_unproven
from edgeopt_agent.signed_view import Fetch, SignedView, open_view
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire.document import from_bytes
from edgeopt_wire.errors import ForgedError, StoreError, TransportError, TrustError
from edgeopt_wire.index import PackageIndex, target_path
from edgeopt_wire.messages import DESIRED_TYPE, MAX_DESIRED_BYTES, TIME_TYPE, Desired, SignedTime

_log = logging.getLogger(__name__)

MAX_TIME_BYTES = 4096


class Trust:
    """The verified view of one repository. `folder` keeps the metadata between starts.

    `needs_time`: nothing new is installed before the time is known; for transports that can ask for it. `past` says what
    the device knows where its metadata is lost, `complain` is told that it was.
    """

    def __init__(
        self,
        folder: Path,
        root: bytes,
        fetch: Fetch,
        clock: TrustedClock,
        *,
        needs_time: bool = False,
        past: Callable[[], Past] = Past,
        complain: Callable[[str], None] = _log.error,
    ) -> None:
        self._folder = folder
        self._root = root
        self._fetch = fetch
        self._needs_time = needs_time
        self._past = past
        self._complain = complain
        self.clock = clock
        self.director_keys: frozenset[str] = frozenset()
        """Ids of the keys that may direct this fleet, as of the newest look."""

    def refresh(self) -> SignedView:
        """Verify the newest metadata and return the view of it.

        Raises:
            ForgedError: It is not what was signed, or older than what was seen, or nobody can tell that it is not.
            TransportError: The repository cannot be reached, or its metadata has expired.
        """
        return open_view(self._folder, self._root, self._fetch, self.clock.now(), witness=self._why_unproven)

    def find_index(self, target: str) -> PackageIndex:
        """Return the verified index at a target path.

        Raises:
            ForgedError: What came is not what was signed.
            TrustError: There is no such target, or it speaks of another package.
            TransportError: The repository cannot be reached, its metadata has expired, or the time is not known.
        """
        if self._needs_time and not self.clock.is_known and self.ask_time() is None:
            raise TransportError(
                "this device's clock says nothing believable and nobody signed the time for it; what runs goes on, "
                "nothing new is installed until one of them does"
            )
        index = from_bytes(PackageIndex, self.refresh().read(target))
        own = target_path(index.name, index.version, index.device)
        if target != own:
            raise TrustError(f"{target} holds the index of another package, whose place is {own}")
        return index

    def list_targets(self) -> dict[str, int]:
        """Every signed target's path with its length, for an operator who installs from a folder."""
        return self.refresh().targets()

    def open_desired(self, envelope: bytes, device: str) -> Desired:
        """Return the desired document in a DSSE envelope that the published director signed for this device.

        Raises:
            ForgedError: It is not signed by the director, or the director's keys are not what was signed.
            TrustError: No envelope, or another device's document.
            TransportError: The director's keys cannot be verified now, or the document has expired.
        """
        if len(envelope) > MAX_DESIRED_BYTES:
            raise TrustError(
                f"a desired document of {len(envelope)} bytes, at most {MAX_DESIRED_BYTES} are read"
            )
        director, until = self._director(self.refresh())
        desired = from_bytes(Desired, director.open(envelope, DESIRED_TYPE, "desired document"))
        if desired.device != device:
            raise TrustError(f"the desired document is for {desired.device}, this device is {device}")
        _check_moment(desired.issued_at, until, "desired document")
        if desired.expires_at < self.clock.now():
            raise TransportError(
                f"the desired document expired at {desired.expires_at:%Y-%m-%d %H:%M} UTC; the control plane signs "
                "another before that, unless it is away or this device's clock is wrong"
            )
        return desired

    def ask_time(self) -> datetime | None:
        """Ask the director for the time and learn it; None where this transport or control plane has no answer.

        Raises:
            ForgedError: The answer is not the director's, or to another question.
            TransportError: Nobody can be asked now.
        """
        return self._ask_time(self.refresh)

    def _ask_time(self, look: Callable[[], SignedView]) -> datetime | None:
        nonce = secrets.token_hex(16)
        answer = self._fetch(f"time/{nonce}", MAX_TIME_BYTES)
        if answer is None:
            return None
        director, until = self._director(look())
        signed = from_bytes(SignedTime, director.open(answer, TIME_TYPE, "signed time"))
        if signed.nonce != nonce:
            raise ForgedError("the signed time answers another question than the one that was asked")
        _check_moment(signed.moment, until, "signed time")
        self.clock.learn(signed.moment)
        return signed.moment

    def _why_unproven(self, view: SignedView, is_damaged: bool) -> str:
        """Why nothing proves that this view is not older than what was seen, where the floor of versions is not there."""
        past = self._past()
        if not is_damaged and not past.has_lived:
            return ""  # a new device
        why = why_unproven(view, past, lambda seen: self._ask_time(lambda: seen) is not None)
        if why and past.has_lived:
            return why
        self._complain(
            "what this device knew of the repository's newest versions was lost; it begins anew with what the repository "
            f"lists now, {'since nothing is installed here' if why else 'which is proven not to be older'}"
        )
        return ""

    def _director(self, view: SignedView) -> tuple[Director, datetime]:
        """Who directs, and until when the repository's newest word counts."""
        director = read_director(view.read(DIRECTOR_TARGET))
        self.director_keys = frozenset(director.keys)
        return director, view.until


def _check_moment(moment: datetime, until: datetime, what: str) -> None:
    if moment > until:
        raise ForgedError(
            f"the {what} is dated {moment:%Y-%m-%d %H:%M} UTC, after the end of the repository's newest timestamp "
            f"({until:%Y-%m-%d %H:%M}); a device does not follow the director that far"
        )


def read_root(path: Path) -> bytes:
    """Read the root of trust that the device was given.

    Raises:
        StoreError: It is not there.
        TrustError: It is no root.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"cannot read the root of trust {path}: {error.strerror}; enrol the device again"
        ) from error
    try:
        if json.loads(raw)["signed"]["_type"] != "root":
            raise TrustError(f"{path} is no root of trust")
    except (ValueError, KeyError, TypeError) as error:
        raise TrustError(f"{path} is no root of trust: {error}") from error
    return raw
