# SPDX-License-Identifier: Apache-2.0
"""What a device asks for over MQTT: metadata in pages, and chunks (`mqtt_chunks`), on a line that `transports/mqtt.py` keeps."""

from __future__ import annotations

import base64
import binascii
import queue
import time
import uuid
from collections.abc import Callable, Sequence

from edgeopt_agent.mqtt_chunks import Answers, ChunkPull, Line, drain
from edgeopt_agent.pulling import check_rate
from edgeopt_agent.window import FIRST_SILENCE_S
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import DocumentError, ForgedError, TransportError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.messages import MAX_META_PAGE_BYTES, MetaReply, MetaRequest

REPLY_TIMEOUT_S = 10.0
CHUNK_TIMEOUT_S = FIRST_SILENCE_S
"""Silence after which what was asked for first is asked for again."""


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

    def pull(
        self,
        index: PackageIndex,
        missing: Sequence[int],
        keep: Callable[[int, bytes], bool],
        *,
        limit_bytes_s: int = 0,
    ) -> None:
        """Get chunks, asking for at most `limit_bytes_s` bytes a second (0: no limit)."""
        pull = ChunkPull(
            self._line, self._answers, index, silence_s=self._silence_s, limit_bytes_s=limit_bytes_s
        )
        pull.run(missing, keep)

    def _ask_page(self, name: str, offset: int) -> MetaReply:
        self._line.require_online()
        request = MetaRequest(uuid.uuid4().hex, name, offset)
        drain(self._answers)
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
