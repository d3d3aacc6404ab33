# SPDX-License-Identifier: Apache-2.0
"""An ExecuTorch file (.pte) as a Model, and its parts, read by the exporter's own schema: nothing is executed.

Rules:
- Tensors at the edges have no names in a file; they are called after their place, `input_0` and `output_0`.
- A 4-axis float input is an image with channels first, as everywhere in PyTorch.
"""

from __future__ import annotations

import json
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from edgeopt_converters.model import Model
from edgeopt_converters.quiet import quiet
from edgeopt_wire.errors import RecipeError, StoreError, UnsupportedError
from edgeopt_wire.tensor import DTYPES, TensorSpec

METHOD = "forward"
XNNPACK = "XnnpackBackend"

NOISY = ("", "torch", "torchao", "executorch")
"""Loggers of what makes and reads ExecuTorch programs."""
_TYPES = {"byte": "uint8", "char": "int8", "short": "int16", "int": "int32", "long": "int64", "half": "float16", "float": "float32"}  # fmt: skip
"""PyTorch's names of element types where they are not ours."""


def load_executorch(path: Path, *, name: str) -> Model:
    """Read a .pte file.

    Raises:
        RecipeError: Not an ExecuTorch program, a damaged one, or one without the method `forward`.
        UnsupportedError: ExecuTorch is not installed, or a tensor at the edge has a type that we do not carry.
        StoreError: The disk refused.
    """
    try:
        program = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    inputs, outputs = edges(program)
    return Model("executorch", program, name, inputs, outputs)


def parse(program: bytes) -> Any:
    """Parse into the exporter's tree (`PTEFile`), with what its delegates hold.

    Raises:
        RecipeError: Not an ExecuTorch program, or a damaged one.
        UnsupportedError: ExecuTorch is not installed.
    """
    if program[4:6] != b"ET":
        raise RecipeError(f"this is no ExecuTorch program: expected b'ET' at byte 4, found {program[4:6]!r}")
    try:
        with quiet(*NOISY):
            from executorch.exir._serialize._program import deserialize_pte_binary
    except ImportError as error:
        raise UnsupportedError(
            "an ExecuTorch program needs executorch: pip install 'edgeopt[executorch]'"
        ) from error
    try:
        return deserialize_pte_binary(program)
    except (
        Exception
    ) as error:  # a damaged file ends in flatc, in json or in a slice, each with errors of its own
        raise RecipeError(f"this ExecuTorch program is damaged: {type(error).__name__}: {error}") from error


def method(file: Any) -> Any:
    """The plan of the method `forward`.

    Raises:
        RecipeError: The program has none.
    """
    plans = {plan.name: plan for plan in file.program.execution_plan}
    if METHOD not in plans:
        raise RecipeError(
            f"this ExecuTorch program has no method {METHOD!r}, it has {', '.join(plans) or 'none'}"
        )
    return plans[METHOD]


def edges(program: bytes) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of a program.

    Raises:
        RecipeError: As `parse`, or an edge is no tensor.
        UnsupportedError: A type that no device takes.
    """
    plan = method(parse(program))
    inputs, outputs = (
        tuple(_spec(plan.values[index].val, f"{what}_{place}") for place, index in enumerate(listed))
        for what, listed in (("input", plan.inputs), ("output", plan.outputs))
    )
    return inputs, outputs


def xnnpack_graph(data: bytes) -> dict[str, Any]:
    """What the XNNPACK delegate reads: its nodes and values, by the names of its own schema.

    Raises:
        RecipeError: These are no bytes of such a delegate.
    """
    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize import _flatbuffer

    try:
        header = XNNHeader.from_bytes(data[: XNNHeader.EXPECTED_LENGTH])
        payload = data[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
        with tempfile.TemporaryDirectory(prefix="edgeopt-") as name:
            folder = Path(name)
            schema, packed = folder / "schema.fbs", folder / "graph.bin"
            schema.write_bytes(resources.files(serialization).joinpath("schema.fbs").read_bytes())
            packed.write_bytes(payload)
            _flatbuffer._flatc_decompile(name, str(schema), str(packed), ["--raw-binary"])  # noqa: SLF001 - the wheel's only reader
            found: dict[str, Any] = json.loads(_finite((folder / "graph.json").read_text()))
    except (ValueError, OSError, KeyError) as error:
        raise RecipeError(f"the program's XNNPACK delegate is damaged: {error}") from error
    return found


def dtype_name(tensor: Any) -> str:
    """A tensor's element type, e.g. "float32"."""
    name = str(tensor.scalar_type.name).lower()
    return _TYPES.get(name, name)


def _finite(text: str) -> str:
    """The limits of a ReLU are written as bare inf, which JSON has not."""
    return text.replace(": inf", ": Infinity").replace(": -inf", ": -Infinity").replace(": nan", ": NaN")


def _spec(tensor: Any, name: str) -> TensorSpec:
    if not hasattr(tensor, "sizes"):
        raise RecipeError(f"{name} of this ExecuTorch program is no tensor, found {type(tensor).__name__}")
    dtype = dtype_name(tensor)
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"tensor {name!r} is {dtype}; the edges of a model must be one of {', '.join(DTYPES)}"
        )
    shape = tuple(int(size) for size in tensor.sizes)
    is_image = len(shape) == 4 and "float" in dtype and name.startswith("input")
    return TensorSpec(name, shape, dtype, "NCHW" if is_image else "")
