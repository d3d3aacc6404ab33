# SPDX-License-Identifier: Apache-2.0
"""Where the agent listens: a Unix socket that only its user can open and, where it is told to, a port of this host.

And `ask`, the small client of the agent's own commands; programs use `edgeopt_agent.client`.
"""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from edgeopt_agent.serve.models import Models
from edgeopt_agent.serve.options import HttpOptions
from edgeopt_agent.serve.server import Listener, Server
from edgeopt_wire.errors import RecipeError, RuntimeFailure, StoreError, TransportError

BACKLOG = 128
TIMEOUT_S = 30.0


class LocalServer:
    """Serves `models` on a Unix socket, and on a loopback port where `http` says one, in threads of its own."""

    def __init__(self, path: Path, models: Models, http: HttpOptions | None = None) -> None:
        self._path = path
        listeners = [_listen_here(path)]
        if http is not None and http.port:
            try:
                listeners.append(_listen_on(http))
            except StoreError:
                listeners[0].socket.close()
                path.unlink(missing_ok=True)
                raise
        self._server = Server(models, listeners)

    def start(self) -> None:
        """Begin to answer."""
        self._server.start()

    def stop(self) -> None:
        """Finish the requests in hand and remove the socket."""
        self._path.unlink(missing_ok=True)
        self._server.stop()


def ask(path: Path, method: str, target: str, body: Any = None) -> Any:
    """Ask a running agent.

    Raises:
        TransportError: No agent answers on this socket.
        RecipeError: It refused the request, in its own words.
        RuntimeFailure: Its runtime failed.
    """
    connection = _Connection(path)
    try:
        content = None if body is None else json.dumps(body).encode()
        connection.request(method, target, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found = json.loads(answer.read() or b"{}")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise TransportError(f"no agent answers on {path}: {error}") from error
    finally:
        connection.close()
    if answer.status == http.client.OK:
        return found
    text = str(found.get("error", answer.reason))
    raise RecipeError(text) if answer.status < http.client.INTERNAL_SERVER_ERROR else RuntimeFailure(text)


def _listen_here(path: Path) -> Listener:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise StoreError(
            f"cannot listen on {path}: {error.strerror or error}; set `socket` elsewhere"
        ) from error
    return Listener(listening, is_private=True, may_share=True)


def _listen_on(http: HttpOptions) -> Listener:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", http.port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise StoreError(
            f"cannot listen on port {http.port} of 127.0.0.1: {error.strerror}; set http.port"
        ) from error
    return Listener(listening, is_private=False, may_share=http.shared_memory)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))
