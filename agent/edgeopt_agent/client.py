# SPDX-License-Identifier: Apache-2.0
"""The client of a running agent, for programs on the same device: numpy arrays, files or texts in, arrays out.

    client = Client("/var/lib/edgeopt/agent.sock")
    scores = client.infer("efficientnet-lite0", {"image": pixels}).outputs["logits"]
    best = client.infer("efficientnet-lite0", {"image": Path("cat.jpg").read_bytes()}, ["top_label"])

    with client.share("efficientnet-lite0") as shared:      # no tensor travels through the socket
        shared.inputs["image"][...] = pixels
        scores = shared.run()["logits"]

Rules: a client belongs to one thread. `RecipeError` is the caller's fault, `RuntimeFailure` the device's,
`TransportError` means that nobody answers, `ServerBusy` that there is no room now. Needs numpy and nothing else.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from edgeopt_agent.client_wire import Connection, Reply, ServerBusy, head_of
from edgeopt_agent.serve.datatypes import BYTES, DTYPES, array_of, bytes_of, datatype_of, items_of
from edgeopt_wire.errors import RecipeError, TransportError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Answer", "Client", "ServerBusy", "Shared"]

TIMEOUT_S = 30.0
_ALIGNMENT = 64
MOST_HEADS = 64
"""Requests whose head and JSON a client remembers: shapes and options seldom change between two calls."""


@dataclass(frozen=True)
class Answer:
    """What a model said: outputs by name, and which version and variant said it (or which cache)."""

    outputs: dict[str, np.ndarray]
    model: str
    version: str
    parameters: Mapping[str, Any]


class Client:
    """A connection to a running agent: the path of its Unix socket, or `http://127.0.0.1:PORT`."""

    def __init__(self, where: str | Path, *, timeout_s: float = TIMEOUT_S) -> None:
        self._connection = Connection(str(where), timeout_s)
        self._numbers = iter(range(2**31))
        self._heads: dict[Any, bytes] = {}
        self._document: tuple[bytes, Any] = (b"", None)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def is_ready(self, model: str = "") -> bool:
        """Whether the agent answers and, where one is named, the model serves."""
        try:
            self._get(f"/v2/models/{quote(model)}/ready" if model else "/v2/health/ready")
        except (RecipeError, TransportError):
            return False
        return True

    def models(self) -> list[str]:
        """Names of the models that serve."""
        return list(self._get("/v2")["models"])

    def metadata(self, model: str) -> dict[str, Any]:
        """Inputs and outputs of a model, as the protocol says them."""
        return dict(self._get(f"/v2/models/{quote(model)}"))

    def statistics(self, model: str) -> dict[str, Any]:
        """Counters since the model was loaded, its caches' among them."""
        return dict(self._get(f"/v2/models/{quote(model)}/stats")["model_stats"][0])

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] = (),
        *,
        version: str = "",
        priority: int = 0,
        timeout_s: float = 0.0,
        may_cache: bool = True,
    ) -> Answer:
        """Ask a model. An input is an array (batch axis included), bytes of a file, a text, or a list of those.

        `outputs` may name what postprocess gives; none means all of the model's. `priority` 1 goes first; `timeout_s`
        is how long the request may wait for its turn.

        Raises:
            RecipeError: The request does not fit the model; the agent's own words.
            TransportError: Nobody answers; `ServerBusy` where there is no room now.
            RuntimeFailure: The device failed.
        """
        arrays = [(name, _array(value)) for name, value in inputs.items()]
        parts = [bytes_of(array) for _, array in arrays]
        edges = tuple((n, a.shape, a.dtype, len(p)) for (n, a), p in zip(arrays, parts, strict=True))
        known = (model, version, edges, tuple(outputs), priority, timeout_s, may_cache)
        head = self._heads.get(known)
        if head is None:
            parameters: dict[str, Any] = {"binary_data_output": True}
            if priority:
                parameters["priority"] = priority
            if timeout_s:
                parameters["timeout"] = max(1, round(timeout_s * 1e6))
            if not may_cache:
                parameters["cache"] = False
            sizes = [{"binary_data_size": len(part)} for part in parts]
            head = _infer_head(_target(model, version), arrays, sizes, outputs, parameters)
            if len(self._heads) >= MOST_HEADS:
                self._heads.clear()
            self._heads[known] = head
        return self._answer(self._connection.request(head, parts))

    def share(self, model: str, *, rows: int = 1) -> Shared:
        """Memory for the model's inputs and outputs that the agent reads and writes without a copy through the socket.

        Raises:
            RecipeError: The agent does not share memory here (a loopback port without leave), or batches less.
        """
        return Shared(self._connection, model, self.metadata(model), rows, f"r{next(self._numbers)}")

    def _answer(self, reply: Reply) -> Answer:
        content = bytes(reply.content)
        if self._document[0] != content:
            self._document = (content, json.loads(content))
        return _answer(reply, self._document[1])

    def _get(self, target: str) -> Any:
        return json.loads(bytes(self._connection.request(head_of("GET", target, 0)).content) or b"{}")


class Shared:
    """Inputs and outputs of a model in memory that both sides map. Use as a context manager, or call `close`."""

    def __init__(
        self, connection: Connection, model: str, metadata: Mapping[str, Any], rows: int, name: str
    ) -> None:
        import numpy as np

        self._connection = connection
        self._name = name
        places = [
            (kind, edge, *_place(edge, rows)) for kind in ("inputs", "outputs") for edge in metadata[kind]
        ]
        offsets, size = [], 0
        for _, _, shape, dtype in places:
            offsets.append(size)
            bytes_needed = int(np.prod(shape)) * dtype.itemsize
            size += -(-bytes_needed // _ALIGNMENT) * _ALIGNMENT
        self._size = size
        self._file = os.memfd_create("edgeopt", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._file, size)
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._map = mmap.mmap(self._file, size)
            self.inputs: dict[str, np.ndarray] = {}
            self.outputs: dict[str, np.ndarray] = {}
            body: dict[str, list[dict[str, Any]]] = {"inputs": [], "outputs": []}
            for (kind, edge, shape, dtype), offset in zip(places, offsets, strict=True):
                array = np.ndarray(shape, dtype, self._map, offset)
                (self.inputs if kind == "inputs" else self.outputs)[edge["name"]] = array
                region = {
                    "shared_memory_region": name,
                    "shared_memory_offset": offset,
                    "shared_memory_byte_size": array.nbytes,
                }
                body[kind].append(_entry(edge["name"], array, region))
            text = json.dumps(body).encode()
            self._request = head_of("POST", _target(model, ""), len(text)) + text
            self._register()
        except BaseException:
            os.close(self._file)
            raise
        connection.on_connect.append(self._register)

    def __enter__(self) -> Shared:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self) -> dict[str, np.ndarray]:
        """Ask with what lies in `inputs`; return `outputs`, which the next run overwrites. Errors as `Client.infer`."""
        self._connection.request(self._request)
        return self.outputs

    def close(self) -> None:
        """Give the memory back."""
        self._connection.on_connect.remove(self._register)
        try:
            self._ask("unregister", b"{}")
        except TransportError:  # with the connection the agent has forgotten the region already
            return
        finally:
            os.close(self._file)

    def _register(self) -> None:
        self._ask("register", json.dumps({"byte_size": self._size}).encode(), self._file)

    def _ask(self, verb: str, body: bytes, descriptor: int = -1) -> None:
        target = f"/v2/edgeopt/memory/region/{self._name}/{verb}"
        self._connection.request(head_of("POST", target, len(body)) + body, descriptor=descriptor)


def _infer_head(
    target: str,
    arrays: Sequence[tuple[str, np.ndarray]],
    sizes: Sequence[Mapping[str, int]],
    outputs: Sequence[str],
    parameters: Mapping[str, Any],
) -> bytes:
    """Head and JSON of an infer request; tensors of these sizes follow."""
    entries = [_entry(name, array, size) for (name, array), size in zip(arrays, sizes, strict=True)]
    body = {"inputs": entries, "outputs": [{"name": name} for name in outputs], "parameters": parameters}
    text = json.dumps(body).encode()
    length = len(text) + sum(size["binary_data_size"] for size in sizes)
    return head_of("POST", target, length, split=len(text), kind="application/octet-stream") + text


def _answer(reply: Reply, document: Any) -> Answer:
    import numpy as np

    outputs, at = {}, 0
    for entry in document["outputs"]:
        size = entry["parameters"]["binary_data_size"]
        content, at = reply.binary[at : at + size], at + size
        if entry["datatype"] == BYTES:
            found = np.empty(int(np.prod(entry["shape"])), object)
            found[:] = items_of(content, entry["name"])
            outputs[entry["name"]] = found.reshape(entry["shape"])
        else:
            outputs[entry["name"]] = array_of(
                content, DTYPES[entry["datatype"]], entry["shape"], entry["name"]
            )
    return Answer(outputs, document["model_name"], document["model_version"], document.get("parameters", {}))


def _array(value: Any) -> np.ndarray:
    import numpy as np

    if isinstance(value, np.ndarray):
        return value
    items = [value] if isinstance(value, (bytes, str)) else list(value)
    if not all(isinstance(item, (bytes, str)) for item in items):
        raise RecipeError(
            f"an input is a numpy array, bytes, a text, or a list of those; found {type(value).__name__}"
        )
    found = np.empty(len(items), object)
    found[:] = [item.encode() if isinstance(item, str) else item for item in items]
    return found


def _entry(name: str, array: np.ndarray, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(array.shape),
        "datatype": datatype_of(array),
        "parameters": parameters,
    }


def _place(edge: Mapping[str, Any], rows: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    import numpy as np

    shape = tuple(rows if axis == -1 else axis for axis in edge["shape"])
    return shape, np.dtype(DTYPES[edge["datatype"]])


def _target(model: str, version: str) -> str:
    return f"/v2/models/{quote(model)}" + (f"/versions/{quote(version)}" if version else "") + "/infer"
