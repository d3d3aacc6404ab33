# SPDX-License-Identifier: Apache-2.0
"""How bytes reach a device: one module a transport, all behind the same small protocol.

A transport module offers one class with the methods of `Transport`; `edgeopt_agent.config` makes the one that a
configuration names. A transport moves bytes and judges nothing: signatures and digests are checked by whoever asked.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.messages import Ack, EventBatch, Reported


@dataclass(frozen=True)
class Identity:
    """Who this device is on the wire. `session` is new at every start of the agent."""

    tenant: str
    device: str
    session: str
    agent_version: str


@dataclass(frozen=True)
class Wanted:
    """A signed `desired` document arrived (its bytes, unchecked)."""

    envelope: bytes


@dataclass(frozen=True)
class Acknowledged:
    """The control plane has stored events."""

    ack: Ack


@dataclass(frozen=True)
class Online:
    """The other side is there; reports and events that wait can go out."""


@dataclass(frozen=True)
class Trouble:
    """Something about the connection that a person must see."""

    error: str


@dataclass(frozen=True)
class Happened:
    """Something about this device that the control plane is to hear of as an event."""

    kind: str
    body: Mapping[str, Any]


Message = Wanted | Acknowledged | Online | Trouble | Happened
Inbox: TypeAlias = "queue.Queue[Message]"

MAX_FILE_BYTES = 8 * 1024 * 1024
"""More than any metadata file or small target may have."""

INBOX_LENGTH = 100
"""More waiting messages than this are dropped: desired documents are retained and events are sent again."""


class Transport(Protocol):
    """One way to the control plane, or to a folder that stands in for it.

    `tells_time`: a control plane is at the other end, which can be asked for signed time.
    """

    tells_time: bool

    def use_clock(self, clock: TrustedClock) -> None:
        """Judge dates, of certificates say, by trusted time from now on."""
        ...

    def start(self) -> None:
        """Begin to connect; returns at once. Messages go into the inbox."""
        ...

    def fetch(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes | None:
        """Return a metadata or target file of the repository (or `time/<nonce>`), None if there is none.

        Raises:
            ForgedError: It goes on after `max_bytes`.
            TransportError: The other side cannot be reached now, or is too slow.
        """
        ...

    def pull(self, index: PackageIndex, missing: Sequence[int], keep: Callable[[int, bytes], bool]) -> None:
        """Get chunks; `keep` says whether a chunk was right. Returns when all of `missing` were kept.

        While none comes, `keep(pulling.NOTHING, b"")` is called now and then: the caller has other things to do.

        Raises:
            TransportError: The other side cannot be reached now, or does not give what is asked.
        """
        ...

    def report(self, reported: Reported) -> None:
        """Send the device's state, if the other side is there; it is sent again after a reconnect."""
        ...

    def send(self, batch: EventBatch) -> bool:
        """Send events; say whether they were handed over. Only an acknowledgement counts as delivered."""
        ...

    def close(self) -> None:
        """Say good-bye and stop."""
        ...
