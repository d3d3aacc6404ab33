# SPDX-License-Identifier: Apache-2.0
"""HTTP as clients speak it, and as nobody should: bodies that lie, heads without end, web pages, slow senders."""

import contextlib
import gzip
import json
import os
import resource
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt_agent.serve import http1, server
from edgeopt_agent.serve.http1 import MAX_BODY_BYTES, MAX_JSON_BYTES

Rig = Any
BODY = json.dumps(
    {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 2, 4, 4], "data": [1.0] * 32}]}
).encode()
INFER = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: localhost\r\n"


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def body(answer: bytes) -> Any:
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])


def sized(content: bytes, extra: bytes = b"") -> bytes:
    return INFER + extra + b"Content-Length: %d\r\n\r\n" % len(content) + content


def test_several_requests_share_one_connection_even_when_they_arrive_at_once(rig: Rig) -> None:
    rig.install()
    found = rig.raw(sized(BODY) * 3, answers=3)
    assert found.count(b"HTTP/1.1 200 OK") == 3
    assert b"Connection: close" not in found


def test_http_1_0_and_connection_close_end_the_connection(rig: Rig) -> None:
    rig.install()
    for request in (b"GET /v2 HTTP/1.0\r\n\r\n", b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
        found = rig.raw(request * 2, answers=2)
        assert found.count(b"HTTP/1.1 200") == 1
        assert b"Connection: close" in found


def test_head_answers_as_get_without_a_body(rig: Rig) -> None:
    rig.install()
    got = rig.raw(b"GET /v2/models/tiny HTTP/1.1\r\nHost: x\r\n\r\n")
    head = rig.raw(b"HEAD /v2/models/tiny HTTP/1.1\r\nHost: x\r\n\r\n")
    assert head == got.split(b"\r\n\r\n")[0] + b"\r\n\r\n"


def test_a_chunked_body_is_read_with_its_extensions_and_trailers(rig: Rig) -> None:
    rig.install()
    cut = len(BODY) // 3
    chunks = [BODY[:cut], BODY[cut : 2 * cut], BODY[2 * cut :]]
    coded = b"".join(b"%X;name=value\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    head = INFER + b"Transfer-Encoding: chunked\r\n\r\n"
    found = rig.raw(
        head + coded + b"0\r\nA-Trailer: 1\r\n\r\n" + b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n", answers=2
    )
    assert found.count(b"HTTP/1.1 200 OK") == 2


def test_a_compressed_body_is_read_and_a_bomb_is_not(rig: Rig) -> None:
    rig.install()
    assert status(rig.raw(sized(gzip.compress(BODY), b"Content-Encoding: gzip\r\n"))) == 200
    bomb = gzip.compress(bytes(MAX_BODY_BYTES + 1))
    assert status(rig.raw(sized(bomb, b"Content-Encoding: gzip\r\n"))) == 413
    assert status(rig.raw(sized(gzip.compress(BODY)[:-9], b"Content-Encoding: gzip\r\n"))) == 400
    assert status(rig.raw(sized(BODY, b"Content-Encoding: br\r\n"))) == 501


def test_who_waits_for_100_continue_gets_it_and_is_spared_a_body_that_is_too_long(rig: Rig) -> None:
    rig.install()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(rig.path))
        sock.sendall(INFER + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(BODY)
        assert status(sock.recv(65536)) == 200
    found = rig.raw(INFER + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1))
    assert status(found) == 413
    assert b"100 Continue" not in found


def test_a_body_that_is_too_long_is_413_and_the_sender_can_read_it(rig: Rig) -> None:
    rig.install()
    size = MAX_BODY_BYTES + 1
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(rig.path))
        sock.sendall(INFER + b"Content-Length: %d\r\n\r\n" % size)
        sent = 0
        while sent < size:  # a client that does not read before it has written
            sent += sock.send(bytes(min(1 << 20, size - sent)))
        answer = sock.recv(65536)
    assert status(answer) == 413
    assert str(MAX_BODY_BYTES) in body(answer)["error"]


def test_json_that_is_too_long_is_413_and_says_binary(rig: Rig) -> None:
    rig.install()
    found = rig.raw(INFER + b"Content-Length: %d\r\n\r\n" % (MAX_JSON_BYTES + 1))
    assert status(found) == 413
    assert "binary" in body(found)["error"]


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /v2 HTTP/2\r\n\r\n", 400),
        (b"BREW /v2 HTTP/1.1\r\n\r\n", 501),
        (b"GET /v2 HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nA: b\r\n folded\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nA: " + b"x" * 20000 + b"\r\n\r\n", 431),
        (INFER + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
        (INFER + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello", 400),
        (INFER + b"Content-Length: +5\r\n\r\nhello", 400),
        (INFER + b"Content-Length: -5\r\n\r\nhello", 400),
        (INFER + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
        (INFER + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (INFER + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (INFER + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello!\r\n", 400),
        (INFER + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFF\r\n", 413),
        (INFER + b"Inference-Header-Content-Length: 9\r\nContent-Length: 5\r\n\r\nhello", 400),
        (INFER + b"Inference-Header-Content-Length: -1\r\nContent-Length: 5\r\n\r\nhello", 400),
    ],
)  # fmt: skip
def test_bytes_that_lie_are_refused_and_the_connection_ends(
    rig: Rig, request_bytes: bytes, expected: int
) -> None:
    rig.install()
    found = rig.raw(request_bytes)
    assert status(found) == expected, found
    assert set(body(found)) == {"error"}
    assert status(rig.raw(sized(BODY))) == 200, "and the next one is answered"


def test_a_web_page_cannot_use_the_port(rig: Rig) -> None:
    rig.install()
    ask = b"GET /v2 HTTP/1.1\r\nHost: %s\r\n%s\r\n"
    assert status(rig.raw(ask % (b"localhost:%d" % rig.port, b""), is_tcp=True)) == 200
    assert status(rig.raw(ask % (b"[::1]:1", b""), is_tcp=True)) == 200
    assert status(rig.raw(ask % (b"evil.example", b""), is_tcp=True)) == 403
    assert status(rig.raw(ask % (b"localhost", b"Origin: https://evil.example\r\n"), is_tcp=True)) == 403


def test_a_slow_head_ends_with_408(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "HEAD_S", 0.2)
    assert status(rig.raw(b"GET /v2 HT")) == 408


def test_an_idle_connection_is_closed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "IDLE_S", 0.2)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(rig.path))
        assert sock.recv(10) == b""


def both_in_hand(rig: Rig) -> bool:
    known = list(rig.server._server._connections.values())
    return len(known) == 2 and not any(connection.idle_since for connection in known)


def test_when_all_connections_are_taken_the_longest_idle_one_makes_room(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    rig.install(latency_ns=1_500_000_000)
    idle = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for sock in idle:
        sock.connect(str(rig.path))
        time.sleep(0.05)
    assert status(rig.raw(b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")) == 200
    assert idle[0].recv(1) == b""
    idle[1].sendall(sized(BODY))
    busy = threading.Thread(target=rig.raw, args=(sized(BODY),))
    busy.start()
    until = time.monotonic() + 1.0
    while time.monotonic() < until and not both_in_hand(rig):
        time.sleep(0.01)
    found = rig.raw(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status(found) == 503
    assert b"Retry-After: 1" in found
    assert status(idle[1].recv(65536)) == 200, "the one in hand was left alone"
    busy.join()
    for sock in idle:
        sock.close()


def test_bodies_in_hand_are_bounded_together(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_HAND_BYTES", 4 * 1024 * 1024)
    rig.install()
    size = 3 * 1024 * 1024
    head = b"Inference-Header-Content-Length: 10\r\nContent-Length: %d\r\n\r\n" % size
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(str(rig.path))
        first.sendall(INFER + head + b"x" * 100)
        time.sleep(0.2)
        assert status(rig.raw(INFER + head)) == 503
    time.sleep(0.2)
    assert status(rig.raw(INFER + head + b"x" * size)) == 400, (
        "its room is free again: only the JSON is wrong"
    )


def test_stopping_finishes_what_is_in_hand_and_takes_nothing_new(rig: Rig) -> None:
    rig.install(latency_ns=400_000_000)
    answers: list[bytes] = []
    workers = [threading.Thread(target=lambda: answers.append(rig.raw(sized(BODY)))) for _ in range(3)]
    for worker in workers:
        worker.start()
    time.sleep(0.2)
    rig.server.stop()
    for worker in workers:
        worker.join()
    assert [status(answer) for answer in answers] == [200, 200, 200]
    assert all(b"Connection: close" in answer for answer in answers)
    assert not rig.path.exists()
    with pytest.raises(OSError, match="No such file"):
        rig.raw(sized(BODY))


def test_the_client_comes_back_after_the_agent_closed_an_idle_connection(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http1, "IDLE_S", 0.1)
    rig.install()
    ones = np.ones((1, 2, 4, 4), np.float32)
    with rig.client() as client, client.share("tiny") as shared:
        shared.inputs["image"][...] = ones
        for _ in range(2):
            time.sleep(0.3)
            np.testing.assert_array_equal(shared.run()["scores"], np.ones((1, 4)))
            time.sleep(0.3)
            np.testing.assert_array_equal(
                client.infer("tiny", {"image": ones}).outputs["scores"], np.ones((1, 4))
            )


def test_when_no_file_descriptor_is_free_the_server_waits_and_goes_on(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.install()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    waiting = socket.socket(socket.AF_UNIX)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 8, hard))
        with contextlib.suppress(OSError):
            held.extend(os.open("/dev/null", os.O_RDONLY) for _ in range(100))
        assert len(held) < 100
        waiting.connect(str(rig.path))
        waiting.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.3)
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    waiting.settimeout(10)
    assert status(waiting.recv(65536)) == 200
    waiting.close()
    assert "cannot accept" in caplog.text
