# SPDX-License-Identifier: Apache-2.0
"""A web server gives what it can, is believed nothing, and whatever it does not give the broker does."""

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edgeopt_agent.web import WebBlobs
from edgeopt_wire.errors import RecipeError, TransportError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.manifest import Compatible

CHUNK = 4096
CONTENT = np.random.default_rng(0).bytes(100 * CHUNK + 17)
DIGESTS = [hashlib.sha256(CONTENT[at : at + CHUNK]).hexdigest() for at in range(0, len(CONTENT), CHUNK)]
INDEX = PackageIndex(
    "tiny",
    "1",
    "host",
    Compatible(("host",)),
    len(CONTENT),
    hashlib.sha256(CONTENT).hexdigest(),
    CHUNK,
    tuple(DIGESTS),
)
ALL = list(range(len(DIGESTS)))


class Handler(http.server.BaseHTTPRequestHandler):
    """Ranges as RFC 9110 says, unless the test wants it otherwise."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append((self.path, self.headers["Range"]))
        begin, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
        content, status = CONTENT[int(begin) : int(end) + 1], 206
        if server.how == "whole":
            content, status = CONTENT, 200
        elif server.how == "gone":
            content, status = b"", 404
        elif server.how == "moved" and "there" not in self.path:
            self.send_response(302)
            self.send_header("Location", f"/there{self.path}")
            self.end_headers()
            return
        elif server.how == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        elif server.how == "lies":
            content = content[::-1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        shown = "bytes 0-4/9" if server.how == "other" else f"bytes {begin}-{end}/{len(CONTENT)}"
        if status == 206:
            self.send_header("Content-Range", shown)
        self.end_headers()
        self.wfile.write(content[: 5 * CHUNK + 100] if server.how == "cut" else content)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Any]:
    made: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.how = [], ""
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def blobs(server: Any) -> WebBlobs:
    return WebBlobs(f"http://127.0.0.1:{server.server_port}/blobs")


def keeper(kept: dict[int, bytes]) -> Callable[[int, bytes], bool]:
    def keep(number: int, chunk: bytes) -> bool:
        if hashlib.sha256(chunk).hexdigest() != DIGESTS[number]:
            return False
        kept[number] = chunk
        return True

    return keep


def test_what_is_missing_comes_in_one_request_a_run(server: Any, blobs: WebBlobs) -> None:
    kept: dict[int, bytes] = {}
    assert blobs.pull(INDEX, [*range(10), *range(50, len(DIGESTS))], keeper(kept)) == []
    assert sorted(kept) == [*range(10), *range(50, len(DIGESTS))]
    assert all(CONTENT[n * CHUNK : (n + 1) * CHUNK] == chunk for n, chunk in kept.items())
    path = f"/blobs/{INDEX.sha256}"
    end = len(CONTENT) - 1
    assert server.asked == [(path, f"bytes=0-{10 * CHUNK - 1}"), (path, f"bytes={50 * CHUNK}-{end}")]


@pytest.mark.parametrize("how", ["whole", "moved"])
def test_servers_without_ranges_and_mirrors_that_moved_serve_too(
    server: Any, blobs: WebBlobs, how: str
) -> None:
    server.how = how
    kept: dict[int, bytes] = {}
    assert blobs.pull(INDEX, ALL[90:], keeper(kept)) == []
    assert sorted(kept) == ALL[90:]


@pytest.mark.parametrize("how", ["gone", "loop", "other", "lies"])
def test_what_a_server_does_not_give_is_left_for_the_broker(server: Any, blobs: WebBlobs, how: str) -> None:
    server.how = how
    kept: dict[int, bytes] = {}
    assert blobs.pull(INDEX, ALL, keeper(kept)) == ALL
    assert kept == {}


def test_what_came_before_a_cut_is_kept(server: Any, blobs: WebBlobs) -> None:
    server.how = "cut"
    kept: dict[int, bytes] = {}
    assert blobs.pull(INDEX, ALL, keeper(kept)) == ALL[5:]
    assert sorted(kept) == ALL[:5]


def test_a_server_that_is_away_costs_nothing_but_a_line(blobs: WebBlobs, server: Any) -> None:
    server.server_close()
    assert blobs.pull(INDEX, ALL, keeper({})) == ALL


def test_the_word_to_stop_goes_through(blobs: WebBlobs) -> None:
    def keep(number: int, chunk: bytes) -> bool:
        raise TransportError("the agent is told to stop")

    with pytest.raises(TransportError, match="told to stop"):
        blobs.pull(INDEX, ALL, keep)


@pytest.mark.parametrize("url", ["http://example.org/blobs", "ftp://127.0.0.1/", "blobs", "https:///x"])
def test_addresses_that_show_everything_to_the_network_are_refused(url: str) -> None:
    with pytest.raises(RecipeError, match="https"):
        WebBlobs(url)
    if url.startswith("http://"):
        WebBlobs(url, insecure=True)
