# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 on one connection: requests in, answers out, everything bounded.

Rules:
- A head is at most `MAX_HEAD_BYTES` and arrives within `HEAD_S`; a body is at most `MAX_BODY_BYTES` (413 before a byte
  of it is read) and arrives at `MIN_RATE` bytes a second or faster.
- Binary tensors are received into a buffer of their own, so that they start aligned and are never copied.
- Timeouts are the kernel's (SO_RCVTIMEO): one system call a read, no poll before it.

Why not http.server? It takes 0.3 ms a request here, most of it in an e-mail parser, and knows no chunked bodies.

Source: RFC 9112 (message syntax), RFC 9110 section 10.1.1 (Expect).
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Sequence

from edgeopt_agent.serve.http_head import Head, parse_head
from edgeopt_agent.serve.refusals import BadRequest, HeadTooLarge, TooLarge, TooSlow

MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_JSON_BYTES = 16 * 1024 * 1024
"""Of JSON; parsing takes several times as much memory. Larger tensors travel in binary."""

KEPT_BYTES = 4 * 1024 * 1024
"""A connection keeps a buffer of up to this size for its next body."""

IDLE_S, HEAD_S, BODY_S, SEND_S = 75.0, 10.0, 30.0, 30.0
MIN_RATE = 64 * 1024
_END = b"\r\n\r\n"
_MAX_CHUNK_LINE = 256
_FD_BYTES = 4
_TIMEVAL = "qq" if socket.SO_RCVTIMEO == 66 else "ll"
"""The option of that number takes 64-bit times on 32-bit machines (SO_RCVTIMEO_NEW; armhf since Debian 13)."""


class Wire:
    """One connection. Not thread-safe: it belongs to the thread that serves it."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._is_unix = sock.family == socket.AF_UNIX
        self._buffer = bytearray(MAX_HEAD_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._kept = bytearray()
        self._descriptor = -1
        self._unread = 0
        self._timeout_s = 0.0
        self._last: tuple[bytes, Head] | None = None
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(SEND_S))

    def wait(self) -> bool:
        """Wait for the next request to begin; False where the other side is done, or idle too long."""
        self._unread = 0
        self._drop_descriptor()
        if self._start < self._end:
            return True
        self._start = self._end = 0
        self._set_timeout(IDLE_S)
        try:
            return self._receive() > 0
        except TimeoutError:
            return False

    def read_head(self) -> Head | None:
        """Read the head of the request that has begun; None where the other side left in the middle of it.

        The same bytes as those of the request before give the same object.

        Raises:
            BadRequest: It is no HTTP/1.x request within the bounds.
        """
        until = time.monotonic() + HEAD_S
        is_patient = True
        while (stop := self._buffer.find(_END, self._start, self._end)) < 0:
            if self._end == MAX_HEAD_BYTES:
                self._compact()
            if is_patient:
                self._set_timeout(HEAD_S)
                is_patient = False
            try:
                if not self._receive():
                    return None
            except TimeoutError:
                pass
            if time.monotonic() > until:
                raise TooSlow(f"the request's head did not arrive within {HEAD_S:.0f} s")
        raw = bytes(self._view[self._start : stop])
        self._start = stop + len(_END)
        if self._last is None or self._last[0] != raw:
            self._last = (raw, parse_head(raw))
        head = self._last[1]
        self._unread = head.length
        return head

    def read_body(self, head: Head, split: int = 0) -> tuple[bytes | bytearray, memoryview]:
        """Read the body: its first `split` bytes (-1: all), and the rest in a buffer valid until the next request.

        Raises:
            TooLarge: It is longer than `MAX_BODY_BYTES`.
            BadRequest: It ends early, is wrongly chunked, or comes too slowly.
        """
        if head.length > MAX_BODY_BYTES:
            raise TooLarge(f"a body of {head.length} bytes; at most {MAX_BODY_BYTES} are read")
        if max(head.length if split < 0 else split, 0) > MAX_JSON_BYTES:
            raise TooLarge(f"more than {MAX_JSON_BYTES} bytes of JSON; send tensors in binary")
        if head.length >= 0 and split > head.length:
            raise BadRequest(
                f"Inference-Header-Content-Length {split} does not fit a body of {head.length} bytes"
            )
        if head.expects and head.length and self._start == self._end:
            self.send((b"HTTP/1.1 100 Continue\r\n\r\n",))
        until = time.monotonic() + BODY_S + max(head.length, 0) / MIN_RATE
        if head.length < 0:
            self._set_timeout(HEAD_S)
            content = self._read_chunked(until)
            if split > len(content):
                raise BadRequest(
                    f"Inference-Header-Content-Length {split}, the body has {len(content)} bytes"
                )
            self._unread = 0
            split = len(content) if split < 0 else split
            return content[:split], memoryview(content)[split:]
        split = head.length if split < 0 else split
        first = bytearray(split)
        rest = self._room(head.length - split)
        if head.length > self._end - self._start:
            self._set_timeout(HEAD_S)
        self._fill(memoryview(first), until)
        self._fill(rest, until)
        self._unread = 0
        return first, rest

    def skip_body(self, most: int) -> bool:
        """Throw away what is unread of a refused request; False if the connection must be closed instead."""
        if self._unread < 0 or self._unread > most:
            return self._unread == 0
        scratch = memoryview(bytearray(min(self._unread, 65536)))
        until = time.monotonic() + 2.0
        while self._unread:
            step = min(self._unread, len(scratch))
            try:
                self._fill(scratch[:step], until)
            except BadRequest:
                return False
            self._unread -= step
        return True

    def send(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Send all parts in as few system calls as it takes.

        Raises:
            OSError: The other side is gone, or takes nothing for `SEND_S`.
        """
        sent = self.socket.sendmsg(parts)
        total = sum(len(part) for part in parts)
        if sent == total:
            return
        for part in parts:
            size = len(part)
            if sent >= size:
                sent -= size
                continue
            self.socket.sendall(memoryview(part)[sent:])
            sent = 0

    def linger(self) -> None:
        """Say that nothing more follows and swallow what is still coming, so that the answer is not lost."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
            self._set_timeout(1.0)
            until, room = time.monotonic() + 5.0, 2 * MAX_BODY_BYTES
            while room > 0 and time.monotonic() < until:
                got = self.socket.recv_into(self._view)
                if not got:
                    return
                room -= got
        except OSError:
            return

    def close(self) -> None:
        """Close the connection and a descriptor that nobody took."""
        self._drop_descriptor()
        self.socket.close()

    def take_descriptor(self) -> int:
        """The file descriptor that came with the request in hand, now the caller's to close; -1 if none did."""
        taken, self._descriptor = self._descriptor, -1
        return taken

    def _receive(self) -> int:
        room = self._view[self._end :]
        try:
            got = self._receive_with_descriptor(room) if self._is_unix else self.socket.recv_into(room)
        except BlockingIOError as error:
            raise TimeoutError from error
        self._end += got
        return got

    def _receive_with_descriptor(self, room: memoryview) -> int:
        got, ancillary, _flags, _ = self.socket.recvmsg_into(
            [room], socket.CMSG_SPACE(_FD_BYTES), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in ancillary:
            if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                continue
            for (number,) in struct.iter_unpack("i", content[: len(content) // _FD_BYTES * _FD_BYTES]):
                self._drop_descriptor()
                self._descriptor = number
        return got

    def _drop_descriptor(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _compact(self) -> None:
        if not self._start:
            raise HeadTooLarge(f"a head of more than {MAX_HEAD_BYTES} bytes")
        size = self._end - self._start
        self._buffer[:size] = self._buffer[self._start : self._end]
        self._start, self._end = 0, size

    def _room(self, size: int) -> memoryview:
        if size > KEPT_BYTES:
            return memoryview(bytearray(size))
        if len(self._kept) < size:
            self._kept = bytearray(size)
        return memoryview(self._kept)[:size]

    def _fill(self, target: memoryview, until: float) -> None:
        size = len(target)
        at = min(size, self._end - self._start)
        if at:
            target[:at] = self._view[self._start : self._start + at]
            self._start += at
        while at < size:
            try:
                got = self.socket.recv_into(target[at:])
            except BlockingIOError:
                got = -1
            if not got:
                raise BadRequest(f"the body ended after {at} of {size} bytes")
            if time.monotonic() > until:
                raise TooSlow(f"the body came at less than {MIN_RATE} bytes a second")
            at += max(got, 0)

    def _read_chunked(self, until: float) -> bytearray:
        content = bytearray()
        while size := self._chunk_size(until):
            if len(content) + size > MAX_BODY_BYTES:
                raise TooLarge(f"a chunked body of more than {MAX_BODY_BYTES} bytes")
            at = len(content)
            content.extend(bytes(size))
            with memoryview(content) as view:
                self._fill(view[at:], until)
            if self._line(until):
                raise BadRequest("a chunk is longer than it says")
        trailers = 0
        while line := self._line(until):
            trailers += len(line)
            if trailers > MAX_HEAD_BYTES:
                raise HeadTooLarge(f"trailers of more than {MAX_HEAD_BYTES} bytes")
        return content

    def _chunk_size(self, until: float) -> int:
        text = self._line(until).split(b";", 1)[0].strip()
        if not text or len(text) > 8 or text.strip(b"0123456789abcdefABCDEF"):
            raise BadRequest(f"a chunk's size is hexadecimal, found {text[:20]!r}")
        return int(text, 16)

    def _line(self, until: float) -> bytes:
        while (stop := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            if self._end - self._start > _MAX_CHUNK_LINE:
                raise BadRequest(f"a line of a chunked body is longer than {_MAX_CHUNK_LINE} bytes")
            if self._end == MAX_HEAD_BYTES:
                self._compact()
            try:
                got = self._receive()
            except TimeoutError:
                got = -1
            if not got:
                raise BadRequest("the chunked body ended early")
            if time.monotonic() > until:
                raise TooSlow(f"the body came at less than {MIN_RATE} bytes a second")
        line = bytes(self._view[self._start : stop])
        self._start = stop + 2
        return line

    def _set_timeout(self, seconds: float) -> None:
        if seconds == self._timeout_s:
            return
        self._timeout_s = seconds
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))


def _timeval(seconds: float) -> bytes:
    return struct.pack(_TIMEVAL, int(seconds), int(seconds % 1 * 1e6))
