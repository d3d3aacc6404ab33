# SPDX-License-Identifier: Apache-2.0
"""Bytes nobody planned: the server answers with a status or closes, never with a traceback, and goes on serving.

EDGEOPT_FUZZ=100000 makes it longer; the seeds are requests that are right.
"""

import json
import logging
import os
import random
import socket
from typing import Any

import pytest

Rig = Any
ROUNDS = int(os.environ.get("EDGEOPT_FUZZ", "600"))
ENTRY = {"name": "image", "datatype": "FP32", "shape": [1, 2, 4, 4]}
AS_JSON = json.dumps(
    {"id": "1", "inputs": [{**ENTRY, "data": [1.0] * 32}], "outputs": [{"name": "scores"}]}
).encode()
AS_BINARY = json.dumps(
    {
        "inputs": [{**ENTRY, "parameters": {"binary_data_size": 128}}],
        "parameters": {"binary_data_output": True},
    }
).encode()
SHARED = json.dumps({"key": "/none", "offset": 0, "byte_size": 128}).encode()


def post(path: str, content: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


SEEDS = (
    b"GET /v2/models/tiny HTTP/1.1\r\nHost: localhost\r\n\r\n",
    post("/v2/models/tiny/infer", AS_JSON),
    post(
        "/v2/models/tiny/infer", AS_BINARY + bytes(128), f"Inference-Header-Content-Length: {len(AS_BINARY)}"
    ),
    post("/v2/systemsharedmemory/region/r/register", SHARED),
    post("/v2/edgeopt/memory/region/r/register", b'{"byte_size": 4096}'),
    b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"%X\r\n%s\r\n0\r\n\r\n" % (len(AS_JSON), AS_JSON),
    post("/v2/models/tiny/infer", b"\x89PNG not really", "Content-Type: image/png"),
)
TOKENS = (
    b"-1", b"0", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"', b"\\u0000", b"\xff", b"99999999999999999999", b"\r\n", b"\r\n\r\n",
    b"Infinity", b"true", b"BYTES", b"shared_memory_region", b"binary_data_size", b"../", b"%00", b":", b",", b"Content-Length: 7\r\n",
)  # fmt: skip


def mutate(rng: random.Random, seed: bytes) -> bytes:
    found = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at:at] = rng.choice(TOKENS)
        elif kind == 2:
            del found[at : at + rng.randrange(1, 30)]
        elif kind == 3:
            found[at : at + rng.randrange(1, 8)] = rng.choice(TOKENS)
        else:
            start = rng.randrange(len(found) + 1)
            found[at:at] = found[start : start + rng.randrange(1, 40)]
    return bytes(found)


def test_the_server_answers_or_closes_whatever_it_is_sent(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.install(serving={"response_cache": {}, "max_batch": 1})
    rng, statuses = random.Random(0), set()
    with caplog.at_level(logging.ERROR, logger="edgeopt_agent"):
        for number in range(ROUNDS):
            content = mutate(rng, SEEDS[number % len(SEEDS)])
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(20)
                sock.connect(str(rig.path))
                try:
                    sock.sendall(content)
                    sock.shutdown(socket.SHUT_WR)
                    answer = b""
                    while got := sock.recv(65536):
                        answer += got
                except ConnectionError:
                    continue
            if answer:
                assert answer.startswith(b"HTTP/1.1 "), (content, answer[:200])
                statuses.add(int(answer[9:12]))
    assert not [record for record in caplog.records if "unexpected" in record.message], caplog.text[-3000:]
    assert {200, 400, 404} <= statuses
    assert statuses <= {100, 200, 400, 403, 404, 405, 408, 413, 431, 501}, statuses
    assert rig.raw(SEEDS[1]).startswith(b"HTTP/1.1 200")
