# SPDX-License-Identifier: Apache-2.0
"""The socket: HTTP over a Unix socket that only this user can open, and a client for it.

Rules: at most `MAX_WAITING` requests at once, the next gets 503; a body above `MAX_BODY_BYTES` gets 413; an error of
the caller is 400, of the runtime 500, each with `{"error": ...}`.
"""

from __future__ import annotations

import http.client
import http.server
import json
import logging
import socket
import socketserver
import threading
from pathlib import Path
from typing import Any

from edgeopt_agent.serve.models import Models
from edgeopt_wire import __version__
from edgeopt_wire.errors import EdgeoptError, RecipeError, RuntimeFailure, StoreError, TransportError

_log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_WAITING = 8
TIMEOUT_S = 30.0


class LocalServer:
    """Serves `models` on a Unix socket in a thread of its own."""

    def __init__(self, path: Path, models: Models) -> None:
        self._path = path
        try:
            path.unlink(missing_ok=True)
            self._server = _Server(str(path), _Handler)
            path.chmod(0o600)
        except OSError as error:
            raise StoreError(
                f"cannot listen on {path}: {error.strerror or error}; set `socket` elsewhere"
            ) from error
        self._server.models = models
        self._thread = threading.Thread(target=self._server.serve_forever, name="serve", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the requests in hand and remove the socket."""
        self._server.shutdown()
        self._server.server_close()
        self._path.unlink(missing_ok=True)


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


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    models: Models
    slots = threading.BoundedSemaphore(MAX_WAITING)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT_S
    server: _Server

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        _log.debug(format, *args)

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, respond: Any) -> None:
        if not self.server.slots.acquire(blocking=False):
            self._write(503, {"error": f"{MAX_WAITING} requests are in hand; try again"})
            return
        try:
            self._write(200, respond())
        except RecipeError as error:
            self._write(404 if "unknown" in str(error) else 400, {"error": str(error)})
        except EdgeoptError as error:
            self._write(500, {"error": str(error)})
        finally:
            self.server.slots.release()

    def _get(self) -> dict[str, Any]:
        from edgeopt_agent.serve import protocol

        parts = self.path.strip("/").split("/")
        models = self.server.models
        if parts in (["v2", "health", "ready"], ["v2", "health", "live"]):
            return {"ready": True}
        if parts == ["v2"]:
            return {
                "name": "edgeopt-agent",
                "version": __version__,
                "extensions": [],
                "models": models.names(),
            }
        if parts[:2] == ["v2", "models"] and len(parts) == 3:
            return protocol.write_metadata(models.describe(parts[2]))
        if parts[:2] == ["v2", "models"] and parts[3:] == ["ready"]:
            models.describe(parts[2])
            return {"ready": True}
        raise RecipeError(f"unknown path {self.path!r}; see the Open Inference Protocol v2")

    def _post(self) -> dict[str, Any]:
        from edgeopt_agent.serve import protocol

        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY_BYTES:
            self.close_connection = True
            raise RecipeError(f"a body of {length} bytes, at most {MAX_BODY_BYTES} are read")
        raw = self.rfile.read(length)
        parts = self.path.strip("/").split("/")
        if parts[:2] != ["v2", "models"] or parts[3:] != ["infer"]:
            raise RecipeError(f"unknown path {self.path!r}; POST goes to /v2/models/NAME/infer")
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise RecipeError("the body must be a JSON object")
        models = self.server.models
        inputs = protocol.read_inputs(body, models.describe(parts[2]).manifest.signature_inputs)
        return protocol.write_answer(*models.infer(parts[2], inputs))

    def _write(self, status: int, document: dict[str, Any]) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))
