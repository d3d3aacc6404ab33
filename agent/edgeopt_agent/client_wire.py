# SPDX-License-Identifier: Apache-2.0
"""One kept HTTP/1.1 connection to a running agent, over its Unix socket or its loopback port.

A connection that the agent closed while it was idle is opened again once; inference may run twice, it changes nothing.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from edgeopt_wire.errors import RecipeError, RuntimeFailure, TransportError

HEADER_LENGTH = "inference-header-content-length"
MAX_HEAD_BYTES = 64 * 1024
LAST_BYTES = 4096
"""An answer of up to this size without tensors behind it is remembered: with shared memory all are the same."""

MAX_ANSWER_BYTES = 1024 * 1024 * 1024


class ServerBusy(TransportError):
    """The agent has no room now; come again after `retry_after_s`."""

    def __init__(self, text: str, retry_after_s: float) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Reply:
    """An answer: its JSON part, and the binary tensors behind it."""

    content: memoryview
    binary: memoryview


class Connection:
    """`where` is the path of the agent's Unix socket, or `http://127.0.0.1:PORT`. Not thread-safe."""

    def __init__(self, where: str, timeout_s: float) -> None:
        self._where = where
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._buffer = bytearray(MAX_HEAD_BYTES)
        self._last: tuple[bytes, Reply] | None = None
        self.on_connect: list[Callable[[], None]] = []
        """Called after each connect: what the agent forgot with the old connection is said again."""

    def request(self, head: bytes, parts: Sequence[bytes | memoryview] = (), descriptor: int = -1) -> Reply:
        """Send one request and read its answer.

        Raises:
            TransportError: No agent answers; `ServerBusy` where it has no room.
            RecipeError: It refused the request, in its own words.
            RuntimeFailure: Its runtime failed.
        """
        is_fresh = self._socket is None
        try:
            if is_fresh:
                self._connect()
            try:
                return self._exchange(head, parts, descriptor)
            except (ConnectionError, BrokenPipeError):
                if is_fresh:
                    raise
                self.close()
                self._connect()
                return self._exchange(head, parts, descriptor)
        except (OSError, ValueError) as error:
            self.close()
            raise TransportError(f"no agent answers on {self._where}: {error}") from error

    def close(self) -> None:
        """Close the connection; the next request opens it again."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def _connect(self) -> None:
        if self._where.startswith("http://"):
            url = urlsplit(self._where)
            self._socket = socket.create_connection(
                (url.hostname or "127.0.0.1", url.port or 80), self._timeout_s
            )
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(self._timeout_s)
            self._socket.connect(self._where)
        for call in self.on_connect:
            call()

    def _exchange(self, head: bytes, parts: Sequence[bytes | memoryview], descriptor: int) -> Reply:
        sock = self._socket
        assert sock is not None, "connected before"
        if descriptor >= 0:
            sent = socket.send_fds(sock, [head], [descriptor])
            sock.sendall(head[sent:])
        elif not parts:
            sock.sendall(head)
        else:
            _send_all(sock, [head, *parts])
        end = sock.recv_into(self._buffer)
        last = self._last
        if last is not None and last[0] == self._buffer[:end]:
            return last[1]
        status, headers, body = self._read(sock, end)
        if headers.get("connection", "").lower() == "close":
            self.close()
        if status != 200:
            raise _error(status, headers, body)
        split = int(headers.get(HEADER_LENGTH, len(body)))
        reply = Reply(body[:split].toreadonly(), body[split:])
        is_whole = len(body) + 4 < end <= LAST_BYTES and self._socket is not None
        self._last = (bytes(self._buffer[:end]), reply) if is_whole and split == len(body) else None
        return reply

    def _read(self, sock: socket.socket, end: int) -> tuple[int, dict[str, str], memoryview]:
        """Read the rest of an answer whose first `end` bytes are in the buffer."""
        if not end:
            raise ConnectionResetError("the connection was idle")
        view = memoryview(self._buffer)
        while (stop := self._buffer.find(b"\r\n\r\n", 0, end)) < 0:
            got = sock.recv_into(view[end:])
            if not got:
                raise ConnectionResetError("the agent closed the connection")
            end += got
        lines = bytes(view[:stop]).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:])
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        size = int(headers.get("content-length", "0"))
        if size > MAX_ANSWER_BYTES:
            raise ValueError(f"an answer of {size} bytes")
        body = memoryview(bytearray(size))
        at = end - stop - 4
        body[:at] = view[stop + 4 : end]
        while at < size:
            got = sock.recv_into(body[at:])
            if not got:
                raise ConnectionResetError(f"the answer ended after {at} of {size} bytes")
            at += got
        return int(lines[0].split(" ")[1]), headers, body


def head_of(
    method: str, target: str, length: int, *, split: int = -1, kind: str = "application/json"
) -> bytes:
    """The head of a request with a body of `length` bytes, of which the first `split` are JSON (-1: all)."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost"]
    if method != "GET":
        lines += [f"Content-Type: {kind}", f"Content-Length: {length}"]
    if split >= 0:
        lines.append(f"Inference-Header-Content-Length: {split}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _send_all(sock: socket.socket, parts: list[bytes | memoryview]) -> None:
    sent = sock.sendmsg(parts)
    for part in parts:
        if sent < len(part):
            sock.sendall(memoryview(part)[sent:])
        sent = max(0, sent - len(part))


def _error(status: int, headers: dict[str, str], body: memoryview) -> Exception:
    try:
        text = str(json.loads(bytes(body))["error"])
    except (ValueError, KeyError, TypeError):
        text = f"the agent answered {status}"
    if status == 503:
        return ServerBusy(text, float(headers.get("retry-after", "1")))
    return RecipeError(text) if status < 500 else RuntimeFailure(text)
