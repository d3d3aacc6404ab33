# SPDX-License-Identifier: Apache-2.0
"""A store with models in their slots, and the real server on a Unix socket and a loopback port."""

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgeopt_agent.client import Client
from edgeopt_agent.machine import Installed
from edgeopt_agent.serve.http import LocalServer
from edgeopt_agent.serve.models import Models
from edgeopt_agent.serve.options import HttpOptions
from edgeopt_agent.store import Store
from edgeopt_wire.document import to_bytes
from edgeopt_wire.manifest import Manifest


class Rig:
    """A device's serving half: `install` puts a package of null models into a slot and serves it."""

    def __init__(self, folder: Path, make_package: Callable[..., Manifest]) -> None:
        self.store = Store(folder / "state")
        self.models = Models(self.store)
        self.path = folder / "agent.sock"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"127.0.0.1:{self.port}"
        self.server = LocalServer(self.path, self.models, HttpOptions(self.port, shared_memory=True))
        self._make_package = make_package

    def install(
        self,
        name: str = "tiny",
        *,
        version: str = "1",
        slot: str = "A",
        serving: Mapping[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
        changes: Mapping[str, Any] | None = None,
        **null: Any,
    ) -> None:
        """`null` goes to the null model, `changes` to the manifest's JSON, `files` beside it."""
        folder = self.store.slot(name, slot)
        manifest = self._make_package(folder, {"a": null}, name=name, version=version)
        document = {**json.loads(to_bytes(manifest)), **(changes or {})}
        if serving is not None:
            document["serving"] = dict(serving)
        for path, text in (files or {}).items():
            (folder / path).write_text(text, encoding="utf-8")
        (folder / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
        self.models.activate(name, Installed(slot, version, "0" * 64, "a"))

    def client(self) -> Client:
        return Client(self.path)

    def raw(self, content: bytes, *, is_tcp: bool = False, answers: int = 1) -> bytes:
        """Send bytes as they are; return all that comes back until there are that many whole answers, or the end."""
        with socket.socket(socket.AF_INET if is_tcp else socket.AF_UNIX) as sock:
            sock.settimeout(10.0)
            sock.connect(("127.0.0.1", self.port) if is_tcp else str(self.path))
            sock.sendall(content)
            found = b""
            while whole_answers(found, is_head=content.startswith(b"HEAD")) < answers:
                got = sock.recv(65536)
                if not got:
                    break
                found += got
            return found


def whole_answers(found: bytes, *, is_head: bool) -> int:
    count, mark = 0, b"Content-Length: "
    while b"\r\n\r\n" in found:
        head, _, found = found.partition(b"\r\n\r\n")
        size = 0 if is_head else int(head.split(mark)[1].split(b"\r\n")[0])
        count += len(found) >= size
        found = found[size:]
    return count


@pytest.fixture
def rig(tmp_path: Path, make_package: Callable[..., Manifest]) -> Iterator[Rig]:
    made = Rig(tmp_path, make_package)
    made.server.start()
    yield made
    made.server.stop()
