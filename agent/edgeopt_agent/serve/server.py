# SPDX-License-Identifier: Apache-2.0
"""The sockets: one thread a connection, a bounded number of them, and an end that loses no request.

Rules:
- At most `MAX_CONNECTIONS`; the next takes the place of the one that is idle the longest, or gets 503.
- Bodies in hand take at most `MAX_HAND_BYTES` together; the next gets 503.
- `stop` takes no new request, finishes those in hand (each says `Connection: close`), then returns.
- Over TCP a request that a web page sent (`Origin`, or a foreign `Host`) is refused: no page on this device's screen may
  use its models.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgeopt_agent.serve.http1 import Wire
from edgeopt_agent.serve.http_head import Head, answer_head
from edgeopt_agent.serve.models import Models
from edgeopt_agent.serve.refusals import BadRequest, Busy, Forbidden, Refused, status_of
from edgeopt_agent.serve.regions import Regions
from edgeopt_agent.serve.repeats import Repeats
from edgeopt_agent.serve.routes import Asked, Reply, Routes
from edgeopt_wire.errors import EdgeoptError

_log = logging.getLogger(__name__)

MAX_CONNECTIONS = 128
TURNED_AWAY = 16
"""So many more connections are told 503 at a time; what comes beyond is closed without a word."""

MAX_HAND_BYTES = 256 * 1024 * 1024
FREE_BYTES = 1024 * 1024
"""A body of up to this size is not counted: the number of connections bounds those."""

CHUNKED_BYTES = 16 * 1024 * 1024
"""What a chunked body counts as, since nobody knows before how long it is."""

STOP_S = 60.0
ACCEPT_PAUSE_S = 0.1
SKIPPED_BYTES = 1024 * 1024
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Listener:
    """A bound socket, and what its callers may do."""

    socket: socket.socket
    is_private: bool
    """Whether only the agent's own user can connect (a Unix socket of mode 0600)."""
    may_share: bool


@dataclass
class _Connection:
    number: int
    wire: Wire
    listener: Listener
    repeats: Repeats = field(default_factory=Repeats)
    asked: tuple[Head, Asked] | None = None
    held: int = 0
    """Bytes that the request in hand counts for."""
    thread: threading.Thread | None = None
    idle_since: float = 0.0
    """0 while a request is in hand."""


class Server:
    """Answers on `listeners` until `stop`."""

    def __init__(self, models: Models, listeners: Sequence[Listener]) -> None:
        self._regions = Regions()
        self._routes = Routes(models, self._regions)
        self._listeners = tuple(listeners)
        self._guard = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        self._numbers = iter(range(1, 2**63))
        self._in_hand = 0
        self._is_stopping = False
        self._threads = [
            threading.Thread(target=self._accept, args=(listener,), name="accept", daemon=True)
            for listener in self._listeners
        ]

    def start(self) -> None:
        """Begin to answer."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Finish the requests in hand, then return; waits at most `STOP_S`."""
        with self._guard:
            self._is_stopping = True
            open_now = list(self._connections.values())
            for connection in open_now:
                if connection.idle_since:
                    _shut(connection.wire.socket, socket.SHUT_RD)
        for listener in self._listeners:
            _shut(listener.socket, socket.SHUT_RDWR)
            listener.socket.close()
        until = time.monotonic() + STOP_S
        for connection in open_now:
            if connection.thread is not None:
                connection.thread.join(max(0.0, until - time.monotonic()))
        self._regions.remove_all()

    def _accept(self, listener: Listener) -> None:
        while not self._is_stopping:
            try:
                accepted, _ = listener.socket.accept()
            except OSError as error:
                if not self._is_stopping:  # no file descriptor is free, for one; it may be soon
                    _log.warning("cannot accept a connection: %s", error)
                    time.sleep(ACCEPT_PAUSE_S)
                continue
            try:
                if accepted.family != socket.AF_UNIX:
                    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._welcome(_Connection(next(self._numbers), Wire(accepted), listener))
            except OSError as error:  # it was gone before it was welcomed
                _log.debug("a connection is gone: %s", error)
                accepted.close()

    def _welcome(self, connection: _Connection) -> None:
        connection.idle_since = time.monotonic()
        with self._guard:
            count = len(self._connections)
            is_full = count >= MAX_CONNECTIONS and not self._evict()
            if count < MAX_CONNECTIONS + TURNED_AWAY:
                self._connections[connection.number] = connection
        if connection.number not in self._connections:
            connection.wire.close()
            return
        connection.thread = threading.Thread(
            target=self._turn_away if is_full else self._serve,
            args=(connection,),
            name=f"serve-{connection.number}",
            daemon=True,
        )
        try:
            connection.thread.start()
        except RuntimeError as error:
            _log.warning("a connection is refused: no thread can be started (%s)", error)
            self._forget(connection)

    def _turn_away(self, connection: _Connection) -> None:
        wire = connection.wire
        try:
            if wire.wait():
                self._refuse(
                    wire, Busy(f"{MAX_CONNECTIONS} connections are in use; try again"), is_head=False
                )
                wire.linger()
        except OSError as error:
            _log.debug("connection %d is gone: %s", connection.number, error)
        finally:
            self._forget(connection)

    def _evict(self) -> bool:
        """Close the connection that is idle the longest, to make room; called with the guard held."""
        idle = [entry for entry in self._connections.values() if entry.idle_since]
        if not idle:
            return False
        longest = min(idle, key=lambda entry: entry.idle_since)
        del self._connections[longest.number]
        _shut(longest.wire.socket, socket.SHUT_RD)
        return True

    def _serve(self, connection: _Connection) -> None:
        wire = connection.wire
        try:
            while not self._is_stopping and wire.wait():
                connection.idle_since = 0.0
                if not self._one(wire, connection):
                    wire.linger()
                    break
                connection.idle_since = time.monotonic()
        except OSError as error:
            _log.debug("connection %d is gone: %s", connection.number, error)
        except Exception:  # noqa: BLE001 - the outermost loop of this thread: the device serves on and says what happened
            _log.exception("unexpected on connection %d", connection.number)
        finally:
            self._forget(connection)

    def _forget(self, connection: _Connection) -> None:
        with self._guard:
            self._connections.pop(connection.number, None)
        self._regions.remove_all(connection.number)
        connection.wire.close()

    def _one(self, wire: Wire, connection: _Connection) -> bool:
        """Answer one request; False if the connection must be closed then."""
        try:
            head = wire.read_head()
        except BadRequest as error:
            return self._refuse(wire, error, is_head=False)
        if head is None:
            return False
        try:
            reply = self._routes.answer(self._asked(connection, head))
        except EdgeoptError as error:
            is_clean = not getattr(error, "must_close", False) and not head.expects
            is_kept = is_clean and head.is_kept and wire.skip_body(SKIPPED_BYTES) and not self._is_stopping
            return self._refuse(wire, error, is_head=head.method == "HEAD", is_kept=is_kept)
        finally:
            if connection.held:
                with self._guard:
                    self._in_hand -= connection.held
                connection.held = 0
        is_kept = head.is_kept and wire.skip_body(SKIPPED_BYTES) and not self._is_stopping
        _send(wire, 200, reply, is_kept=is_kept, is_head=head.method == "HEAD")
        return is_kept

    def _asked(self, connection: _Connection, head: Head) -> Asked:
        """The request under this head; the one before, where the head is that of the one before."""
        if connection.asked is not None and connection.asked[0] is head:
            return connection.asked[1]
        if not connection.listener.is_private:
            _check_origin(head)
        wire = connection.wire

        def read_body(split: int) -> tuple[bytes | bytearray, memoryview]:
            connection.held = self._take_room(head, split)
            return wire.read_body(head, split)

        asked = Asked(
            head.method, head.path, head.headers, read_body, wire.take_descriptor, connection.number,
            connection.listener.may_share, connection.repeats,
        )  # fmt: skip
        connection.asked = (head, asked)
        return asked

    def _take_room(self, head: Head, split: int) -> int:
        size = CHUNKED_BYTES if head.length < 0 else head.length + 7 * (head.length if split < 0 else split)
        if size <= FREE_BYTES:
            return 0
        with self._guard:
            if self._in_hand + size > MAX_HAND_BYTES and self._in_hand:
                raise Busy(f"requests in hand take {self._in_hand} bytes, no room for {size} more; try again")
            self._in_hand += size
        return size

    @staticmethod
    def _refuse(wire: Wire, error: EdgeoptError, *, is_head: bool, is_kept: bool = False) -> bool:
        status = status_of(error)
        if status >= 500:
            _log.warning("a request ends with %d: %s", status, error)
        headers = {
            "Content-Type": "application/json",
            **(error.headers if isinstance(error, Refused) else {}),
        }
        content = b"" if getattr(error, "is_silent", False) else json.dumps({"error": str(error)}).encode()
        reply = Reply(content, headers=headers)
        try:
            _send(wire, status, reply, is_kept=is_kept, is_head=is_head)
        except OSError:
            return False
        return is_kept


def _send(wire: Wire, status: int, reply: Reply, *, is_kept: bool, is_head: bool) -> None:
    length = len(reply.content) + sum(len(part) for part in reply.binary)
    head = answer_head(status, length, reply.headers, is_kept=is_kept)
    wire.send((head,) if is_head else (head + reply.content, *reply.binary))


def _check_origin(head: Head) -> None:
    host = head.headers.get("host", "")
    name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
    if "origin" in head.headers or name.lower() not in _LOCAL_HOSTS:
        raise Forbidden(
            f"requests of web pages, and for the host {host[:80]!r}, are not answered; use localhost"
        )


def _shut(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError:
        return
