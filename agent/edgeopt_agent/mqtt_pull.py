# SPDX-License-Identifier: Apache-2.0
"""What a device asks for over MQTT: metadata in pages, packages in chunks. The connection is `transports/mqtt.py`.

Rule: chunks travel at QoS 0, window owned here; what does not arrive is asked for again, so a lost message, a broker
that was killed and one that forgot everything all look the same.
"""

from __future__ import annotations

import base64
import binascii
import logging
import queue
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from edgeopt_agent.pulling import MAX_WRONG_CHUNKS, check_rate, runs
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import DocumentError, ForgedError, NotOfferedError, TransportError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.messages import MAX_META_PAGE_BYTES, MetaReply, MetaRequest, Pull, PullRefused

_log = logging.getLogger(__name__)

REPLY_TIMEOUT_S = 10.0
CHUNK_TIMEOUT_S = 5.0
"""Silence after which what is missing of the window is asked for again."""
FIRST_WINDOW, MAX_WINDOW = 4, 32
MAX_SILENT_ROUNDS = 6
"""Rounds of silence, each with half the window, before the pull is put off."""

Answers: TypeAlias = "queue.Queue[tuple[str, tuple[str, ...], bytes]]"
"""What the control plane answered: the topic's word, what follows it, and the payload."""


class Line(Protocol):
    """The connection that questions go out on."""

    @property
    def is_online(self) -> bool:
        """Whether what is published now is handed over."""
        ...

    def require_online(self) -> None:
        """Wait a little for the broker; TransportError if it stays away."""
        ...

    def publish(self, what: str, payload: bytes) -> bool:
        """Hand a message over; False where nobody listens."""
        ...


class Puller:
    """Asks on a line and takes the answers from a queue."""

    def __init__(
        self,
        line: Line,
        answers: Answers,
        *,
        reply_s: float = REPLY_TIMEOUT_S,
        silence_s: float = CHUNK_TIMEOUT_S,
    ) -> None:
        self._line = line
        self._answers = answers
        self._reply_s = reply_s
        self._silence_s = silence_s

    def fetch(self, name: str, max_bytes: int) -> bytes | None:
        """Ask for a file page by page; every page has its own request and an explicit answer."""
        content = bytearray()
        started = time.monotonic()
        while True:
            reply = self._ask_page(name, len(content))
            if not reply.found:
                return None
            try:
                page = base64.b64decode(reply.data, validate=True)
            except (binascii.Error, ValueError) as error:
                raise TransportError(f"the answer for {name} is not base64") from error
            content += page
            if reply.total_bytes > max_bytes or len(content) > reply.total_bytes:
                raise ForgedError(
                    f"{name} is said to have {reply.total_bytes} bytes and goes on; at most {max_bytes} are read"
                )
            if len(content) == reply.total_bytes:
                return bytes(content)
            if not page:
                raise TransportError(
                    f"the answer for {name} stopped at {len(content)} of {reply.total_bytes} bytes"
                )
            check_rate(name, len(content), time.monotonic() - started)

    def pull(self, index: PackageIndex, missing: Sequence[int], keep: Callable[[int, bytes], bool]) -> None:
        """Get chunks; the window of what is asked for grows while they come and is halved by silence."""
        waiting = list(missing)
        asked: set[int] = set()
        window, silent, wrong, kept = FIRST_WINDOW, 0, 0, 0
        started = time.monotonic()
        self._drain()
        while waiting or asked:
            while waiting and len(asked) < window:
                fresh = waiting[: window - len(asked)]
                del waiting[: len(fresh)]
                asked.update(fresh)
                self._request(index, fresh)
            check_rate(f"the package {index.sha256[:12]}", kept, time.monotonic() - started)
            number, chunk = self._next_chunk(index)
            if number is None:
                silent += 1
                if silent > MAX_SILENT_ROUNDS or not self._line.is_online:
                    raise TransportError(
                        f"the package stopped arriving, {len(waiting) + len(asked)} chunks are missing"
                    )
                window = max(1, window // 2)
                waiting = sorted({*asked, *waiting})
                asked.clear()
            elif number in asked:
                silent = 0
                asked.discard(number)
                if keep(number, chunk):
                    kept += len(chunk)
                    window = min(MAX_WINDOW, window + 1)
                else:
                    _log.warning(
                        "chunk %d of %s is not what was signed; asked for again", number, index.sha256[:12]
                    )
                    wrong += 1
                    waiting.append(number)
                    if wrong > MAX_WRONG_CHUNKS:
                        raise TransportError(
                            f"{wrong} chunks of {index.sha256[:12]} came wrong, the last is {number}; later again"
                        )

    def _ask_page(self, name: str, offset: int) -> MetaReply:
        self._line.require_online()
        request = MetaRequest(uuid.uuid4().hex, name, offset)
        self._drain()
        if not self._line.publish("meta", to_bytes(request)):
            raise TransportError("the broker is away")
        deadline = time.monotonic() + self._reply_s
        while (left := deadline - time.monotonic()) > 0:
            try:
                what, _, payload = self._answers.get(timeout=min(left, 1.0))
            except queue.Empty:
                if not self._line.is_online:
                    break
                continue
            if what != "meta-reply" or len(payload) > 2 * MAX_META_PAGE_BYTES:
                continue
            try:
                reply = from_bytes(MetaReply, payload)
            except DocumentError as error:
                raise TransportError(f"the answer for {name} is none: {error}") from error
            if reply.id == request.id:
                return reply
        raise TransportError(f"no answer for {name} within {self._reply_s:.0f} s")

    def _request(self, index: PackageIndex, numbers: Sequence[int]) -> None:
        if not self._line.publish("pull", to_bytes(Pull(index.sha256, runs(numbers)))):
            raise TransportError("the broker is away")

    def _next_chunk(self, index: PackageIndex) -> tuple[int | None, bytes]:
        deadline = time.monotonic() + self._silence_s
        while (left := deadline - time.monotonic()) > 0 and self._line.is_online:
            try:
                what, rest, payload = self._answers.get(timeout=min(left, 0.5))
            except queue.Empty:
                continue
            if what == "refused":
                reason = _refusal(payload, index)
                if reason:
                    raise NotOfferedError(f"the package is refused: {reason}")
            elif what == "chunk" and len(rest) == 2 and rest[0] == index.sha256[:16] and rest[1].isdigit():
                return int(rest[1]), payload
        return None, b""

    def _drain(self) -> None:
        while not self._answers.empty():
            self._answers.get_nowait()


def _refusal(payload: bytes, index: PackageIndex) -> str:
    """Why this package is refused; empty if it is not, or if what came cannot be read."""
    try:
        refused = from_bytes(PullRefused, payload)
    except DocumentError as error:
        _log.warning("a refusal is ignored: %s", error)
        return ""
    return (refused.reason or "no reason given") if refused.sha256 == index.sha256 else ""
