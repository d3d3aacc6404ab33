# SPDX-License-Identifier: Apache-2.0
"""Sends chunks: one thread that takes from `streams` what is due, reads it, and hands it to the connection.

Rules:
- At most `MAX_UNDER_WAY` bytes wait in this process for the broker: what a device must hear at once (acknowledgements,
  desired documents) goes over the same connection and waits for no more than that.
- The connection is looked at once a batch, and waited for where it is full: a call back for each message that it wrote
  would cost paho a tenth of what sending a chunk does.
- Who asks is told a refusal where a chunk does not fit the broker's largest packet: it would end the connection.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from edgeopt.fleet.streams import Chunk, Streams
from edgeopt_wire import topics
from edgeopt_wire.errors import EdgeoptError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.lanes import LANES_KIB_S, Lanes
from edgeopt_wire.messages import Pull

_log = logging.getLogger(__name__)

MAX_UNDER_WAY = 4 * 1024 * 1024
BATCH_BYTES = 512 * 1024
"""Of own streams, between two looks at the lanes."""
POOL_BYTES = 4 * 1024 * 1024
"""glibc gives memory back at once, and the kernel clears it again for the next chunk, until a block of this size was
freed (mallopt(3), M_MMAP_THRESHOLD)."""
IDLE_S = 0.5
STUCK_S = 5.0
"""A message that the connection has not taken for so long is lost with the connection before."""
MIN_SHARERS = 3
"""Fewer devices do not share: a lane's pace costs more than their streams."""
KNOWN_S = 2.0
"""How long an answer about a device's rights or about how many share is used again."""
OVERHEAD_BYTES = 300
"""The largest topic (256 bytes) and what MQTT puts around a message."""


class Rights(Protocol):
    """Who may have what: `edgeopt.fleet.control.Control`."""

    def allowed_index(self, device_id: str, sha256: str) -> PackageIndex | None:
        """The index of a blob that this device may have."""
        ...

    def sharers(self, sha256: str) -> int:
        """How many devices are about to pull this blob."""
        ...


class Receipt(Protocol):
    """What the connection gives for a message that it was handed."""

    def is_published(self) -> bool:
        """Whether it was written to the broker; RuntimeError where it was lost with its connection."""
        ...

    def wait_for_publish(self, timeout: float) -> None:
        """Wait until it was, for so many seconds at most; RuntimeError as above."""
        ...


@dataclass(frozen=True)
class Offer:
    """What to tell a device besides chunks: an offer of lanes, or why it gets nothing."""

    lanes: Lanes | None = None
    refusal: str = ""


class Courier:
    """Chunks for the devices of one tenant. `send` hands a message over at QoS 0; None where nobody takes it."""

    def __init__(
        self,
        tenant: str,
        rights: Rights,
        read: Callable[[PackageIndex, int], bytes],
        send: Callable[[str, bytes], Receipt | None],
    ) -> None:
        self._tenant = tenant
        self._rights = rights
        self._read = read
        self._send = send
        self._streams = Streams()
        self._change = threading.Condition()
        self._under_way: deque[tuple[Receipt, int]] = deque()
        self._under_way_bytes = 0
        self._taken_at = 0.0
        self._stopping = False
        self._allowed: dict[tuple[str, str], tuple[float, PackageIndex | None]] = {}
        self._sharers: dict[str, tuple[float, int]] = {}
        self._thread = threading.Thread(target=self._work, name="fleet-courier", daemon=True)
        self.max_packet_bytes = 0
        """The largest packet that the broker takes, 0 where it did not say."""

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the chunk in hand."""
        with self._change:
            self._stopping = True
            self._change.notify()
        if self._thread.is_alive():
            self._thread.join(10)

    def ask(self, device: str, pull: Pull) -> Offer | None:
        """A device asks for chunks; what to tell it at once, if anything."""
        now = time.monotonic()
        index = self._index(device, pull.sha256, now)
        if index is None:
            return Offer(refusal="this device is not told to run a package with these bytes")
        if 0 < self.max_packet_bytes < index.chunk_bytes + OVERHEAD_BYTES:
            return Offer(
                refusal=f"the broker takes packets of {self.max_packet_bytes} bytes and the package's chunks are "
                f"{index.chunk_bytes}; raise the broker's limit (max_packet_size in mosquitto)"
            )
        sharers = 0 if pull.lane is None else self._count(pull.sha256, now)
        offers = pull.lane == 0 and sharers >= MIN_SHARERS
        with self._change:
            if pull.lane in LANES_KIB_S:
                self._streams.ask_lane(device, pull, index, lane=pull.lane, expected=sharers, now=now)
            else:
                first = Pull(pull.sha256, tuple((first, 1) for first, _ in pull.runs[:1]))
                self._streams.ask(device, first if offers else pull, index)
            self._change.notify()
        return Offer(Lanes(pull.sha256, LANES_KIB_S)) if offers else None

    def gone(self, device: str) -> None:
        """A device went away."""
        with self._change:
            self._streams.gone(device)

    def connected(self, max_packet_bytes: int) -> None:
        """There is a new connection; what the one before was handed is lost."""
        with self._change:
            self.max_packet_bytes = max_packet_bytes
            self._forget()
            self._change.notify()

    def _work(self) -> None:
        bytearray(POOL_BYTES)
        while True:
            with self._change:
                if self._stopping:
                    return
                oldest = self._oldest_of_too_many()
                chunks = [] if oldest is not None else self._due()
                if oldest is None and not chunks:
                    self._change.wait(self._streams.pause_s(time.monotonic(), IDLE_S))
            if oldest is not None:
                with contextlib.suppress(RuntimeError):
                    oldest.wait_for_publish(IDLE_S)
            for chunk in chunks:
                self._give(chunk)

    def _oldest_of_too_many(self) -> Receipt | None:
        """What to wait for before more is handed over; None where there is room."""
        now = time.monotonic()
        while self._under_way and _is_off(self._under_way[0][0]):
            self._under_way_bytes -= self._under_way.popleft()[1]
            self._taken_at = now
        if self._under_way_bytes > MAX_UNDER_WAY - BATCH_BYTES and now - self._taken_at > STUCK_S:
            self._forget()
        return self._under_way[0][0] if self._under_way_bytes > MAX_UNDER_WAY - BATCH_BYTES else None

    def _due(self) -> list[Chunk]:
        burst = self._streams.next_burst(time.monotonic())
        if burst:
            return burst
        batch, size = [], 0
        while size < BATCH_BYTES and (own := self._streams.next_own()) is not None:
            batch.append(own)
            size += own.index.chunk_bytes
        return batch

    def _give(self, chunk: Chunk) -> None:
        sha256 = chunk.index.sha256
        topic = (
            f"{topics.lane(self._tenant, chunk.lane, sha256)}/{chunk.number}"
            if chunk.lane
            else topics.chunk(self._tenant, chunk.device, sha256, chunk.number)
        )
        try:
            content = self._read(chunk.index, chunk.number)
        except EdgeoptError as error:
            _log.warning("%s is not sent: %s", topic, error)
            return
        receipt = self._send(topic, content)
        with self._change:
            if receipt is None:
                self._forget()
                return
            if not self._under_way:
                self._taken_at = time.monotonic()
            self._under_way.append((receipt, len(content)))
            self._under_way_bytes += len(content)

    def _forget(self) -> None:
        self._under_way.clear()
        self._under_way_bytes = 0

    def _index(self, device: str, sha256: str, now: float) -> PackageIndex | None:
        until, index = self._allowed.get((device, sha256), (0.0, None))
        if now >= until:
            if len(self._allowed) > 100_000:
                self._allowed.clear()
            index = self._rights.allowed_index(device, sha256)
            self._allowed[device, sha256] = (now + KNOWN_S if index else now, index)
        return index

    def _count(self, sha256: str, now: float) -> int:
        until, count = self._sharers.get(sha256, (0.0, 0))
        if now >= until:
            count = self._rights.sharers(sha256)
            self._sharers[sha256] = (now + KNOWN_S, count)
        return count


def _is_off(receipt: Receipt) -> bool:
    """Whether a message does not wait in this process any more: written, or lost with its connection."""
    try:
        return receipt.is_published()
    except RuntimeError:
        return True
