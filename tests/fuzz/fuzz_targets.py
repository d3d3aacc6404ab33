# SPDX-License-Identifier: Apache-2.0
"""What strangers' bytes reach, one function a target: bytes in, nothing out; one of our errors is an answer.

Anything else that is raised is a finding. `SEEDS` are bytes that are right, from which a fuzzer starts.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from publishing import write_package

from edgeopt.delta.spans import spans_of
from edgeopt_agent.config import load_config
from edgeopt_agent.director import Director, read_director
from edgeopt_agent.machine import State
from edgeopt_agent.serve.http_head import parse_head
from edgeopt_agent.serve.protocol import read_request
from edgeopt_agent.store import DeviceRecord, Incoming, Store
from edgeopt_wire import topics
from edgeopt_wire.archive import PackageReader, write_archive
from edgeopt_wire.delta import LITERAL, Operation, apply_delta, write_delta
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import EdgeoptError
from edgeopt_wire.index import PackageIndex, deltas_of
from edgeopt_wire.manifest import Compatible, Manifest
from edgeopt_wire.measurement import Measurement
from edgeopt_wire.messages import (
    DESIRED_TYPE,
    Ack,
    Desired,
    EventBatch,
    MetaReply,
    MetaRequest,
    Presence,
    Pull,
    PullRefused,
    Reported,
    SignedTime,
)
from edgeopt_wire.tensor import TensorSpec

GOLDEN = Path(__file__).parent.parent / "golden" / "v1"
MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
DOCUMENTS: tuple[type[Any], ...] = (
    Manifest, PackageIndex, Measurement, Desired, Reported, EventBatch, Presence, Ack, Pull, PullRefused, MetaRequest,
    MetaReply, SignedTime, State, DeviceRecord,
)  # fmt: skip
SIGNATURE = (TensorSpec("image", (1, 2, 4, 4), "float32", "NCHW"), TensorSpec("mask", (1, 8), "int64"))
MAX_MADE = 1 << 20


def document(data: bytes) -> None:
    """Messages, manifests, indexes and records. What is read must be written and read again as the same."""
    for kind in DOCUMENTS:
        try:
            found = from_bytes(kind, data)
        except EdgeoptError:
            continue
        assert from_bytes(kind, to_bytes(found)) == found, kind
        if isinstance(found, PackageIndex):
            for delta in deltas_of(found).values():
                assert delta.size_bytes > 0


def topic(data: bytes) -> None:
    """Names of topics."""
    topics.parse(data.decode("utf-8", "replace"))


def package(data: bytes) -> None:
    """A package file: opened, every byte checked, unpacked where it may be."""
    with tempfile.NamedTemporaryFile(dir=MEMORY) as file, tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        file.write(data)
        file.flush()
        with PackageReader(Path(file.name)) as reader:
            reader.verify()
            reader.extract(Path(folder))
            inside = Path(folder).resolve()
            assert all(path.resolve().is_relative_to(inside) for path in inside.rglob("*"))


class _Bounded(io.BytesIO):
    def write(self, content: Any) -> int:
        assert self.tell() + len(content) <= MAX_MADE, "more than was signed"
        return super().write(content)


def delta(data: bytes) -> None:
    """A delta: makes what was signed, or an error."""
    wanted = b"abcd" * 64
    made = _Bounded()
    apply_delta(io.BytesIO(data), io.BytesIO(bytes(4096)), made, (hashlib.sha256(wanted).hexdigest(), 256))
    assert made.getvalue() == wanted


def chunks(data: bytes) -> None:
    """Chunks of a package, their numbers, and the map of those that are there."""
    content = bytes(range(256)) * 12
    pieces = [content[at : at + 1024] for at in range(0, len(content), 1024)]
    digests = tuple(hashlib.sha256(piece).hexdigest() for piece in pieces)
    whole = hashlib.sha256(content).hexdigest()
    index = PackageIndex("a", "1", "host", Compatible(("host",)), len(content), whole, 1024, digests)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = Path(folder) / whole
        path.write_bytes(bytes(len(content)))
        incoming = Incoming(path, index)
        number = int.from_bytes(data[:2], "big", signed=True)
        is_kept = incoming.put(number, data[2:])
        assert is_kept == (0 <= number < len(pieces) and data[2:] == pieces[number])
        path.with_name(f"{whole}.map").write_bytes(data)
        there = set(range(len(pieces))) - set(incoming.missing())
        assert all(path.read_bytes()[n * 1024 : (n + 1) * 1024] == pieces[n] for n in there)


def records(data: bytes) -> None:
    """What a damaged disk holds: state records, the device's record, the configuration."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        store = Store(Path(folder))
        (Path(folder) / "models" / "tiny").mkdir()
        (Path(folder) / "models" / "tiny" / "state-0.json").write_bytes(data)
        assert store.load_state("tiny").model
        (Path(folder) / "device.json").write_bytes(data)
        store.load_device()
        config = Path(folder) / "agent.json"
        config.write_bytes(data)
        load_config(config)


def envelope(data: bytes) -> None:
    """A signed document of a director who signed one in his life."""
    opened = _director().open(data, DESIRED_TYPE, "desired document")
    assert opened == _signed(), "a document that nobody signed was opened"


def director(data: bytes) -> None:
    """The document that names the director's keys."""
    read_director(data)


def request_head(data: bytes) -> None:
    """The head of an HTTP request."""
    parse_head(data)


def infer(data: bytes) -> None:
    """An infer request; the binary tensors are behind the first zero byte."""
    head, _, tensors = data.partition(b"\0")
    read_request(head, memoryview(tensors), SIGNATURE)


def model(data: bytes) -> None:
    """Model files in which tensors are looked for."""
    for name in ("m.onnx", "m.tflite"):
        for start, length in spans_of(name, data).values():
            assert 0 <= start <= start + length <= len(data)


@cache
def _director() -> Director:
    return read_director((Path(__file__).parent / "seeds" / "director.json").read_bytes())


@cache
def _signed() -> bytes:
    payload = json.loads((Path(__file__).parent / "seeds" / "envelope.json").read_bytes())["payload"]
    return base64.b64decode(payload)


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (
        document, topic, package, delta, chunks, records, envelope, director, request_head, infer, model
    )
}  # fmt: skip


def run(name: str, data: bytes) -> None:
    """Give a target its bytes; one of our errors is an answer."""
    with contextlib.suppress(EdgeoptError):
        TARGETS[name](data)


def seeds(name: str) -> list[bytes]:
    """Bytes that are right, or were once a finding."""
    kept = Path(__file__).parent / "seeds"
    found = [path.read_bytes() for path in sorted(kept.glob(f"{name}*")) if path.is_file()]
    golden = [path.read_bytes() for path in sorted(GOLDEN.iterdir())]
    made: dict[str, Callable[[], list[bytes]]] = {
        "document": lambda: golden,
        "records": lambda: golden,
        "topic": lambda: [b"eo/1/default/d1/desired", b"eo/1/default/d1/chunk/0123456789abcdef/12"],
        "package": _packages,
        "delta": _deltas,
        "chunks": lambda: [b"\0\1" + bytes(range(256)) * 4, b"[0, 1, 2]"],
        "request_head": lambda: [b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 3"],
        "infer": lambda: [_infer(), _infer() + b"\0" + bytes(128)],
    }
    return [*found, *made.get(name, list)()]


def _infer() -> bytes:
    entry = {"name": "image", "datatype": "FP32", "shape": [1, 2, 4, 4], "data": [1.0] * 32}
    mask = {"name": "mask", "datatype": "INT64", "shape": [1, 8], "data": [[1] * 8]}
    return json.dumps({"id": "1", "inputs": [entry, mask], "outputs": [{"name": "scores"}]}).encode()


def _packages() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_package(work, {"a": {}})
        made = io.BytesIO()
        write_archive(made, {p.relative_to(work).as_posix(): p for p in work.rglob("*") if p.is_file()})
    return [made.getvalue()]


def _deltas() -> list[bytes]:
    wanted = b"abcd" * 64
    about = {"base_sha256": "", "target_sha256": hashlib.sha256(wanted).hexdigest(), "target_bytes": 256}
    made, differing = io.BytesIO(), io.BytesIO()
    write_delta(made, [Operation(LITERAL, 256)], b"", wanted, about)
    write_delta(differing, [Operation(1, 200, 7), Operation(LITERAL, 56)], wanted[:200], wanted[200:], about)
    return [made.getvalue(), differing.getvalue()]
