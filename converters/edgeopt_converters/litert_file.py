# SPDX-License-Identifier: Apache-2.0
"""A LiteRT file (.tflite, a flatbuffer) as a Model, read by the schema alone: nothing is executed.

Rules:
- Tensors at the edges carry the names of the file's one signature, or the file's own where it has none.
- They stand in the order of the subgraph, which is the order in which every interpreter lists them.
- Where the file leaves an axis free, the shape is the one that an interpreter allocates (batch 1).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from edgeopt_converters.model import Model
from edgeopt_wire.errors import RecipeError, StoreError, UnsupportedError
from edgeopt_wire.tensor import DTYPES, Affine, TensorSpec

_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16
"""What the schema promises for the data of constants."""


def load_litert(path: Path, *, name: str, layouts: tuple[str, ...] = ()) -> Model:
    """Read a .tflite file. A 4-axis input is NHWC, as LiteRT's convolutions want it, unless `layouts` says otherwise.

    Raises:
        RecipeError: Not a LiteRT model, or one with free axes or several subgraphs.
        UnsupportedError: ai-edge-litert is not installed, or a tensor at the edge has a type that we do not carry.
        StoreError: The disk refused.
    """
    try:
        program = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    inputs, outputs = edges(program)
    if len(layouts) > len(inputs):
        raise RecipeError(f"{path}: {len(layouts)} layouts are given for {len(inputs)} inputs")
    padded = [*layouts, *[""] * (len(inputs) - len(layouts))]
    described = tuple(
        TensorSpec(spec.name, spec.shape, spec.dtype, layout or _layout(spec), spec.affine)
        for spec, layout in zip(inputs, padded, strict=True)
    )
    return Model("litert", program, name, described, outputs)


def parse(program: bytes) -> Any:
    """Parse into the schema's object tree (`ModelT`).

    Raises:
        RecipeError: Not a LiteRT model.
        UnsupportedError: ai-edge-litert is not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as error:
        raise UnsupportedError(
            "a LiteRT model needs ai-edge-litert: pip install 'edgeopt[litert]'"
        ) from error
    if program[4:8] != _IDENTIFIER:
        raise RecipeError(
            f"this is no LiteRT model: expected {_IDENTIFIER!r} at byte 4, found {program[4:8]!r}"
        )
    try:
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(program, 0))
    except (struct.error, IndexError, ValueError, TypeError) as error:
        raise RecipeError(f"this LiteRT model is damaged: {error}") from error
    if not model.subgraphs:
        raise RecipeError("this LiteRT model is damaged: it has no subgraph")
    _take_in(model, program)
    return model


def pack(model: Any) -> bytes:
    """The bytes of an object tree that `parse` gave, changed or not; the same tree gives the same bytes.

    Constants begin at multiples of 16 bytes, where a runtime that maps the file reads them in place.
    """
    import flatbuffers  # type: ignore[import-untyped]

    class Aligned(flatbuffers.Builder):  # type: ignore[misc]
        def CreateNumpyVector(self, values: Any) -> Any:  # noqa: N802 - the library's name
            self.Prep(_ALIGNMENT if values.itemsize == 1 else values.itemsize, values.nbytes)
            return super().CreateNumpyVector(values)

    builder = Aligned(1024)
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    return bytes(builder.Output())


def edges(program: bytes) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of a program.

    Raises:
        RecipeError: Not a LiteRT model, or an axis is free.
        UnsupportedError: A type that no device takes.
    """
    model = parse(program)
    graph = model.subgraphs[0]
    signatures = model.signatureDefs or []
    signature = signatures[0] if len(signatures) == 1 else None
    inputs, outputs = (
        {int(entry.tensorIndex): _text(entry.name) for entry in (entries or [])}
        for entries in ((signature.inputs, signature.outputs) if signature else ([], []))
    )
    return (
        tuple(_spec(graph.tensors[index], inputs.get(int(index), "")) for index in graph.inputs),
        tuple(_spec(graph.tensors[index], outputs.get(int(index), "")) for index in graph.outputs),
    )


def dtype_name(tensor: Any) -> str:
    """A tensor's element type in lower case, e.g. "float32"."""
    from ai_edge_litert import schema_py_generated as schema

    names: dict[int, str] = {
        value: name.lower() for name, value in vars(schema.TensorType).items() if isinstance(value, int)
    }
    return names.get(tensor.type, f"type {tensor.type}")


def _take_in(model: Any, program: bytes) -> None:
    """Constants that lie behind the flatbuffer, as writers put them from some size on, become constants like all."""
    import numpy as np

    for buffer in model.buffers or []:
        if buffer.offset > 1:
            if buffer.offset + buffer.size > len(program):
                raise RecipeError("this LiteRT model is damaged: a constant lies behind its end")
            buffer.data = np.frombuffer(program, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0


def _spec(tensor: Any, label: str) -> TensorSpec:
    name = label or _text(tensor.name)
    dtype = dtype_name(tensor)
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"tensor {name!r} is {dtype}; the edges of a model must be one of {', '.join(DTYPES)}"
        )
    shape = () if tensor.shape is None else tuple(int(size) for size in tensor.shape)
    if any(size < 1 for size in shape):
        raise RecipeError(
            f"tensor {name!r} has free axes {shape}; devices run static shapes: convert it with fixed ones"
        )
    return TensorSpec(name, shape, dtype, "", _affine(tensor))


def _affine(tensor: Any) -> Affine | None:
    found = tensor.quantization
    if found is None or not _has(found.scale) or len(found.scale) != 1:
        return None
    return Affine(float(found.scale[0]), int(found.zeroPoint[0]) if _has(found.zeroPoint) else 0)


def _layout(spec: TensorSpec) -> str:
    return "NHWC" if len(spec.shape) == 4 else ""


def _has(values: Any) -> bool:
    """Whether a vector of a flatbuffer is there and not empty (it is None, a list or an array)."""
    return values is not None and len(values) > 0


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name
