# SPDX-License-Identifier: Apache-2.0
"""A repository in memory: for simulators, and for tests of everything above the transport. It can be told to fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from edgeopt_agent.transports import MAX_FILE_BYTES, Acknowledged, Inbox, Online, Wanted
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire.errors import ForgedError, TransportError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.messages import Ack, EventBatch, Reported


@dataclass
class MemoryTransport:
    """Files by name and blobs by digest. `is_away` makes every call fail; `spoil` may change a chunk on its way."""

    inbox: Inbox
    files: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    is_away: bool = False
    spoil: Callable[[int, bytes], bytes] | None = None
    reports: list[Reported] = field(default_factory=list)
    batches: list[EventBatch] = field(default_factory=list)
    pulled: list[int] = field(default_factory=list)
    tells_time: bool = False

    def use_clock(self, clock: TrustedClock) -> None:
        """Nothing here has a date."""

    def start(self) -> None:
        """Be there."""
        self.inbox.put(Online())

    def want(self, envelope: bytes) -> None:
        """Deliver a desired document."""
        self.inbox.put(Wanted(envelope))

    def offer(self, files: Mapping[str, bytes], blobs: Mapping[str, bytes]) -> None:
        """Put files and blobs into the repository."""
        self.files.update(files)
        self.blobs.update(blobs)

    def fetch(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes | None:
        """Return a file, or None."""
        self._check()
        content = self.files.get(name)
        if content is not None and len(content) > max_bytes:
            raise ForgedError(f"{name} has {len(content)} bytes, at most {max_bytes} are read")
        return content

    def pull(self, index: PackageIndex, missing: Sequence[int], keep: Callable[[int, bytes], bool]) -> None:
        """Hand over chunks; a chunk that is not kept ends the pull."""
        self._check()
        blob = self.blobs.get(index.sha256)
        if blob is None:
            raise TransportError(f"there is no package {index.sha256[:12]}")
        for number in missing:
            self._check()
            chunk = blob[number * index.chunk_bytes :][: index.chunk_bytes]
            self.pulled.append(number)
            if not keep(number, self.spoil(number, chunk) if self.spoil else chunk):
                raise TransportError(f"chunk {number} of {index.sha256[:12]} is not what was signed")

    def report(self, reported: Reported) -> None:
        """Keep the report."""
        if not self.is_away:
            self.reports.append(reported)

    def send(self, batch: EventBatch) -> bool:
        """Keep the batch and acknowledge it."""
        if self.is_away:
            return False
        self.batches.append(batch)
        self.inbox.put(Acknowledged(Ack(batch.outbox, batch.events[-1].sequence)))
        return True

    def close(self) -> None:
        """Nothing to end."""

    def _check(self) -> None:
        if self.is_away:
            raise TransportError("the other side is away")
