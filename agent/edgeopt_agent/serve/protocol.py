# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol v2: requests to arrays, arrays to answers; JSON, binary tensors and shared memory.

Rules:
- An input has the signature's datatype and shape. With batching the first axis may be 1 to `max_batch`. With a
  `preprocess` in the manifest an input may also be BYTES: whole files or texts, one an element.
- JSON holds no NaN and no infinity: an output with one must be asked for in binary.
- What this server does not do (sequences) is refused, never ignored.

Source: Open Inference Protocol, "REST", version 2; Triton's extensions for binary tensors, shared memory, scheduling
policy (priority, timeout) and classification.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeopt_agent.serve.datatypes import (
    BYTES,
    DATATYPES,
    array_of,
    bytes_of,
    datatype_of,
    from_json,
    items_of,
    to_json,
)
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

MAX_INPUTS = 256
_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")
Read = Callable[[str, int, int], memoryview]


@dataclass(frozen=True)
class OutputWish:
    """How the caller wants one output."""

    name: str
    is_binary: bool = False
    top: int = 0
    region: str = ""
    offset: int = 0
    size: int = 0


@dataclass(frozen=True)
class InferRequest:
    """One infer request. An input is an array, or a list of files or texts where its datatype is BYTES."""

    inputs: Mapping[str, Any]
    outputs: tuple[OutputWish, ...] = ()
    is_binary: bool = False
    id: str = ""
    priority: int = 0
    timeout_us: int = 0
    may_cache: bool = True
    is_shared: bool = False
    """Whether an input lies in memory that the caller can still write to."""
    is_view: bool = False
    """Whether every input that is no JSON is the memory that it came in, not a copy of it."""
    parameters: Mapping[str, Any] = field(default_factory=dict)


def read_request(
    raw: bytes | bytearray, binary: memoryview, signature: Sequence[TensorSpec], read: Read | None = None
) -> InferRequest:
    """Read the JSON part of an infer request and the binary tensors behind it.

    Raises:
        RecipeError: Something does not fit the protocol or the model; the message says what was expected.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RecipeError("the body must be a JSON object")
    parameters = _object(body, "parameters")
    for name in _SEQUENCE:
        if parameters.get(name):
            raise RecipeError(f"{name}: models here have no state between requests; leave it out")
    reader = _Inputs(binary, read)
    inputs = reader.read(body, signature)
    return InferRequest(
        inputs,
        tuple(_wish(entry, parameters) for entry in _entries(body, "outputs")),
        is_binary=parameters.get("binary_data_output") is True,
        id=str(body.get("id", "")),
        priority=_whole(parameters, "priority"),
        timeout_us=_whole(parameters, "timeout"),
        may_cache=parameters.get("cache") is not False,
        is_shared=reader.is_shared,
        is_view=reader.is_view,
        parameters=parameters,
    )


def read_inputs(body: Mapping[str, Any], signature: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """Return the arrays of a request whose tensors are all JSON; errors as in `read_request`."""
    found = _Inputs(memoryview(b""), None).read(body, signature)
    for name, value in found.items():
        if isinstance(value, list):
            raise RecipeError(f"{name}: expected numbers, found BYTES")
    return found


class _Inputs:
    def __init__(self, binary: memoryview, read: Read | None) -> None:
        self._binary = binary
        self._read = read
        self._at = 0
        self.is_shared = False
        self.is_view = True

    def read(self, body: Mapping[str, Any], signature: Sequence[TensorSpec]) -> dict[str, Any]:
        if not isinstance(body.get("inputs"), list):
            raise RecipeError('the request needs "inputs", a list')
        specs = {spec.name: spec for spec in signature}
        found: dict[str, Any] = {}
        for entry in _entries(body, "inputs"):
            name = entry.get("name")
            if name not in specs or name in found:
                what = "stands twice" if name in found else "is unknown"
                raise RecipeError(f"the input {name!r} {what}; the model takes {list(specs)}")
            found[name] = self._tensor(entry, specs[name])
        if self._at != len(self._binary):
            raise RecipeError(
                f"{len(self._binary) - self._at} bytes follow the tensors; no input asks for them"
            )
        is_raw = any(isinstance(value, list) for value in found.values())
        missing = [name for name in specs if name not in found]
        if missing and not is_raw:
            raise RecipeError(f"the input {missing[0]!r} is missing; the model takes {list(specs)}")
        return found

    def _tensor(self, entry: Mapping[str, Any], spec: TensorSpec) -> Any:
        shape, datatype = _shape(entry, spec.name), entry.get("datatype")
        content = self._content(entry, spec.name)
        if datatype == BYTES:
            self.is_view = self.is_view and content is None
            return _texts(entry, spec.name, shape, content)
        is_photo = datatype == "UINT8" and len(shape) == 4 and shape[-1] == 3
        dtype = "uint8" if is_photo else spec.dtype
        if datatype != DATATYPES[dtype]:
            raise RecipeError(f"{spec.name}: expected datatype {DATATYPES[dtype]}, found {datatype!r}")
        if content is not None:
            array = array_of(content, dtype, shape, spec.name)
            self.is_view = self.is_view and not array.flags.owndata
            return array
        return from_json(entry.get("data"), dtype, shape, spec.name)

    def _content(self, entry: Mapping[str, Any], name: str) -> memoryview | None:
        parameters = _object(entry, "parameters")
        region = parameters.get("shared_memory_region")
        if region is not None:
            if self._read is None:
                raise RecipeError(f"{name}: shared memory is not for this connection; use the Unix socket")
            self.is_shared = True
            offset, size = (_whole(parameters, f"shared_memory_{key}") for key in ("offset", "byte_size"))
            return self._read(str(region), offset, size)
        if "binary_data_size" not in parameters:
            return None
        size = _whole(parameters, "binary_data_size")
        if self._at + size > len(self._binary):
            raise RecipeError(
                f"{name}: binary_data_size {size}, only {len(self._binary) - self._at} bytes are left"
            )
        self._at += size
        return self._binary[self._at - size : self._at]


def write_answer(
    head: Mapping[str, Any],
    outputs: Mapping[str, np.ndarray],
    request: InferRequest,
    write: Callable[[str, int, memoryview], None] | None = None,
) -> tuple[bytes, list[memoryview]]:
    """The JSON part of the answer, which begins with `head`, and the binary tensors to send behind it.

    Raises:
        RecipeError: An output cannot be given as wished.
    """
    binary: list[memoryview] = []
    wishes = request.outputs or tuple(OutputWish(name, request.is_binary) for name in outputs)
    listed = []
    for wish in wishes:
        array = outputs[wish.name]
        entry: dict[str, Any] = {
            "name": wish.name,
            "shape": list(array.shape),
            "datatype": datatype_of(array),
        }
        if wish.region:
            content = bytes_of(array)
            if write is None or len(content) > wish.size:
                raise RecipeError(
                    f"{wish.name}: {len(content)} bytes do not fit into {wish.size} of shared memory"
                )
            write(wish.region, wish.offset, content)
            entry["parameters"] = {
                "shared_memory_region": wish.region,
                "shared_memory_offset": wish.offset,
                "shared_memory_byte_size": len(content),
            }
        elif wish.is_binary:
            content = bytes_of(array)
            binary.append(content)
            entry["parameters"] = {"binary_data_size": len(content)}
        else:
            entry["data"] = to_json(array)
        listed.append(entry)
    identity = {"id": request.id} if request.id else {}
    try:
        text = json.dumps({**head, **identity, "outputs": listed}, allow_nan=False)
    except ValueError as error:
        raise RecipeError(
            "an output holds NaN or infinity, which JSON cannot say; ask for it with binary_data"
        ) from error
    return text.encode(), binary


def describe_tensor(spec: TensorSpec, max_batch: int = 1) -> dict[str, Any]:
    """A tensor in a model's metadata; -1 is the batch axis where that is free."""
    first = spec.shape[0] if max_batch == 1 else -1
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": [first, *spec.shape[1:]]}


def _wish(entry: Mapping[str, Any], request: Mapping[str, Any]) -> OutputWish:
    parameters = _object(entry, "parameters")
    is_binary = parameters.get("binary_data", request.get("binary_data_output", False)) is True
    region = parameters.get("shared_memory_region")
    if region is None:
        return OutputWish(str(entry.get("name")), is_binary, _whole(parameters, "classification"))
    offset, size = (_whole(parameters, f"shared_memory_{key}") for key in ("offset", "byte_size"))
    return OutputWish(str(entry.get("name")), region=str(region), offset=offset, size=size)


def _entries(body: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = body.get(key, [])
    if not isinstance(found, list) or len(found) > MAX_INPUTS or not all(isinstance(e, dict) for e in found):
        raise RecipeError(f"{key!r} must be a list of at most {MAX_INPUTS} objects")
    return found


def _object(body: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = body.get(key, {})
    if not isinstance(found, dict):
        raise RecipeError(f"{key!r} must be an object, found {type(found).__name__}")
    return found


def _whole(parameters: Mapping[str, Any], key: str) -> int:
    found = parameters.get(key, 0)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 2**63:
        raise RecipeError(f"{key} must be a whole number, not negative; found {str(found)[:40]!r}")
    return found


def _shape(entry: Mapping[str, Any], name: str) -> tuple[int, ...]:
    shape = entry.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) > 16
        or not all(type(a) is int and 0 < a < 2**31 for a in shape)
    ):
        raise RecipeError(
            f"{name}: the shape must be a list of positive whole numbers, found {str(shape)[:80]}"
        )
    return tuple(shape)


def _texts(
    entry: Mapping[str, Any], name: str, shape: Sequence[int], content: memoryview | None
) -> list[bytes]:
    data = entry.get("data")
    if content is not None:
        items = items_of(content, name)
    elif isinstance(data, list) and all(isinstance(item, str) for item in data):
        items = [item.encode("utf-8", "replace") for item in data]
    else:
        raise RecipeError(f'{name}: BYTES in JSON is "data", a list of texts; send files in binary')
    if len(shape) not in (1, 2) or shape[0] != len(items) or shape[1:] not in ((), (1,)):
        raise RecipeError(f"{name}: BYTES needs the shape [{len(items)}], found {list(shape)}")
    return items
