# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a model file lie: name -> (offset, length), from the bytes alone.

Rules:
- Nothing is loaded and nothing is trusted: what cannot be read has no spans, and is compared without them.
- ONNX: `raw_data` of initializers and of constants' values, found in the Protocol Buffers wire format.
- LiteRT: the buffers of tensors, found by the flatbuffer's own offsets.

Sources: onnx.proto (field numbers); Protocol Buffers, "Encoding"; TensorFlow Lite's schema.fbs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

Spans = dict[str, tuple[int, int]]

_GRAPH, _INITIALIZER, _NODE, _ATTRIBUTE, _TENSOR = 7, 5, 1, 5, 5
_NODE_OUTPUT, _TENSOR_NAME, _RAW_DATA = 2, 8, 9
_BYTES = 2


def spans_of(name: str, content: bytes) -> Spans:
    """The tensors of a file called `name`; nothing where its format is another one or it cannot be read."""
    try:
        if name.endswith(".onnx"):
            return dict(_onnx(content))
        if name.endswith(".tflite"):
            return dict(_litert(content))
    except (IndexError, ValueError, ImportError, struct.error, AttributeError, TypeError):
        return {}
    return {}


def _onnx(content: bytes) -> Iterator[tuple[str, tuple[int, int]]]:
    for field, start, end in _fields(content, 0, len(content)):
        if field != _GRAPH:
            continue
        for inner, begin, stop in _fields(content, start, end):
            if inner == _INITIALIZER:
                yield from _tensor(content, begin, stop, "")
            elif inner == _NODE:
                yield from _constant(content, begin, stop)


def _constant(content: bytes, start: int, end: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The tensor attributes of a node, by its first output."""
    outputs, tensors = [], []
    for field, begin, stop in _fields(content, start, end):
        if field == _NODE_OUTPUT:
            outputs.append(content[begin:stop].decode("utf-8", "replace"))
        elif field == _ATTRIBUTE:
            tensors += [(b, s) for inner, b, s in _fields(content, begin, stop) if inner == _TENSOR]
    for number, (begin, stop) in enumerate(tensors):
        yield from _tensor(content, begin, stop, f"{outputs[0] if outputs else ''}:{number}")


def _tensor(content: bytes, start: int, end: int, owner: str) -> Iterator[tuple[str, tuple[int, int]]]:
    name, span = "", None
    for field, begin, stop in _fields(content, start, end):
        if field == _TENSOR_NAME:
            name = content[begin:stop].decode("utf-8", "replace")
        elif field == _RAW_DATA:
            span = (begin, stop - begin)
    if span is not None and span[1]:
        yield owner or name, span


def _fields(content: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Every length-delimited field of a message: its number, and where its content begins and ends."""
    at = start
    while at < end:
        key, at = _varint(content, at)
        kind = key & 7
        if kind == _BYTES:
            size, at = _varint(content, at)
            if at + size > end:
                raise ValueError("a field reaches beyond its message")
            yield key >> 3, at, at + size
            at += size
        elif kind == 0:
            _, at = _varint(content, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError("an old or odd wire type")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = content[at]
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, at
        if shift > 63:
            raise ValueError("a number that does not end")


def _litert(content: bytes) -> Iterator[tuple[str, tuple[int, int]]]:
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    model: Any = schema.Model.GetRootAs(content, 0)
    begin = np.frombuffer(content, np.uint8).__array_interface__["data"][0]
    for graph_number in range(model.SubgraphsLength()):
        graph = model.Subgraphs(graph_number)
        for number in range(graph.TensorsLength()):
            tensor = graph.Tensors(number)
            found = model.Buffers(tensor.Buffer()).DataAsNumpy()
            if isinstance(found, np.ndarray) and found.size:
                name = f"{graph_number}:{tensor.Name().decode('utf-8', 'replace')}"
                yield name, (found.__array_interface__["data"][0] - begin, found.nbytes)
