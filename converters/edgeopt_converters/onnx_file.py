# SPDX-License-Identifier: Apache-2.0
"""An ONNX file as a Model: read with its external data, with static shapes, and checked.

Rules:
- A free batch axis becomes 1. Any other free axis is refused, unless the caller gives the input's shape.
- Weights are constants: an initializer that is also listed as an input (files before 2019) is no input.
- Files older than opset 13 are brought to opset 17 by ONNX's own version converter; newer ones stay as they are.
- Every operator has a name of its own, from what it makes where the file gives none: recipes and reports call it so.
- Everything is in memory: weights outside the file are read from beside it, and missing ones are named.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeopt_converters.model import Model
from edgeopt_converters.onnx_subgraphs import specialise
from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError, StoreError, UnsupportedError
from edgeopt_wire.tensor import DTYPES, TensorSpec

_log = logging.getLogger(__name__)
OLDEST_OPSET = 13  # the first with quantization per channel
CONVERTED_OPSET = 17


def load_onnx(
    path: Path, *, name: str, inputs: Sequence[TensorSpec] = (), constants: Mapping[str, Any] | None = None
) -> Model:
    """Read, check and make static. `inputs` gives shapes and layouts where the file leaves them open.

    `constants` fixes inputs to values (a number or nested lists); branches that are decided thereby are taken.

    Raises:
        RecipeError: Not an ONNX model, external data is missing, an axis is free, or `inputs` contradicts the file.
        UnsupportedError: onnx is not installed, or the file is too old to be brought to a current opset.
        StoreError: The disk refused.
    """
    program = _read(path)
    _check(program, path)
    _drop_weight_inputs(program.graph)
    _make_static(program, {spec.name: spec for spec in inputs}, path)
    if constants or _has_branches(program.graph) or not _says_shapes(program):
        program, notes = specialise(program, _typed(program, constants or {}, path))
        for note in notes:
            _log.info("%s: %s", path, note)
    program = _modern(program, path)
    _name_operators(program.graph)
    return _checked(program, name, {spec.name: spec.layout for spec in inputs}, path)


def save_onnx(model: Model, path: Path) -> None:
    """Write an ONNX model; the same model gives the same bytes.

    Raises:
        RecipeError: `model` is in another format.
        StoreError: The disk refused.
    """
    if model.format != "onnx":
        raise RecipeError(f"expected an ONNX model, found {model.format}; convert it first")
    try:
        path.write_bytes(model.program.SerializeToString(deterministic=True))
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error


def edges(program: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of a program with static shapes.

    Raises:
        RecipeError: An axis is free.
        UnsupportedError: A type that no device takes.
    """
    graph = program.graph
    return tuple(_spec(value) for value in graph.input), tuple(_spec(value) for value in graph.output)


def _read(path: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise UnsupportedError("an ONNX file needs onnx: pip install 'edgeopt[onnx]'") from error
    try:
        program = onnx.load_model(str(path), load_external_data=False)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    except (DecodeError, ValueError) as error:
        raise RecipeError(f"{path} is not an ONNX model: {error}") from error
    if not program.HasField("graph") or not program.opset_import:
        raise RecipeError(
            f"{path} is not an ONNX model: it has no {'opset' if program.graph.node else 'graph'}"
        )
    try:
        onnx.load_external_data_for_model(program, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise RecipeError(
            f"{path} keeps weights in other files that cannot be read: {error}. Put them beside it, "
            "or save the model with its weights inside"
        ) from error
    return program


def _name_operators(graph: Any) -> None:
    taken: set[str] = set()
    for node in graph.node:
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{next(filter(None, node.output), len(taken))}"
        taken.add(node.name)


def _drop_weight_inputs(graph: Any) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(kept)


def _typed(program: Any, constants: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Values of inputs in the types that the model has for them."""
    import numpy as np
    import onnx

    known = {value.name: value.type.tensor_type.elem_type for value in program.graph.input}
    found = {}
    for name, value in constants.items():
        if name not in known:
            raise RecipeError(f"{path}: {seam.unknown('input', name, known)}")
        try:
            found[name] = np.asarray(value, onnx.helper.tensor_dtype_to_np_dtype(known[name]))
        except (ValueError, TypeError, OverflowError) as error:
            raise RecipeError(
                f"{path}: the constant of input {name!r} is no number or list of numbers: {error}"
            ) from error
    return found


def _make_static(program: Any, given: Mapping[str, TensorSpec], path: Path) -> None:
    names = [value.name for value in program.graph.input]
    for name in given:
        if name not in names:
            raise RecipeError(f"{path}: {seam.unknown('input', name, names)}")
    changed = [_fix_shape(value, given.get(value.name), path) for value in program.graph.input]
    if any(changed):
        del program.graph.value_info[:]  # they speak of the free axes
        for value in program.graph.output:
            value.type.tensor_type.ClearField("shape")


def _fix_shape(value: Any, given: TensorSpec | None, path: Path) -> bool:
    """Write the static shape into an input; say whether it was free."""
    if not value.type.HasField("tensor_type"):
        raise UnsupportedError(
            f"{path}: input {value.name!r} is a {value.type.WhichOneof('value')}, not a tensor"
        )
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        if given is None:
            raise RecipeError(f"{path}: the shape of input {value.name!r} is unknown; {_advice(value.name)}")
        for _ in given.shape:
            tensor.shape.dim.add()
    axes = tensor.shape.dim
    if given is not None and len(given.shape) != len(axes):
        raise RecipeError(
            f"{path}: input {value.name!r} has {len(axes)} axes, the recipe gives {given.shape}"
        )
    free = [not axis.HasField("dim_value") or axis.dim_value < 1 for axis in axes]
    for index, axis in enumerate(axes):
        wanted = (
            given.shape[index] if given is not None else (1 if index == 0 and free[0] else axis.dim_value)
        )
        if not free[index] and wanted != axis.dim_value:
            raise RecipeError(
                f"{path}: axis {index} of input {value.name!r} is {axis.dim_value}, the recipe says {wanted}"
            )
        if wanted < 1:
            raise RecipeError(
                f"{path}: axis {index} ({axis.dim_param or 'unnamed'!r}) of input {value.name!r} is free, and devices "
                f"run static shapes; {_advice(value.name)}"
            )
        axis.dim_value = wanted
    return any(free)


def _advice(name: str) -> str:
    return f"give its shape in the recipe: [[inputs]] with name = {name!r}, shape = [...] and dtype"


def _has_branches(graph: Any) -> bool:
    return any(attribute.HasField("g") for node in graph.node for attribute in node.attribute)


def _says_shapes(program: Any) -> bool:
    """Whether ONNX's own inference finds all output shapes; it does not follow every way to compute a shape."""
    import onnx

    try:
        found = onnx.shape_inference.infer_shapes(program, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError):
        return True  # what is wrong is told where the model is checked
    return all(
        value.type.tensor_type.HasField("shape")
        and all(axis.dim_value > 0 for axis in value.type.tensor_type.shape.dim)
        for value in found.graph.output
    )


def _modern(program: Any, path: Path) -> Any:
    from onnx import version_converter

    found = {opset.domain: opset.version for opset in program.opset_import}
    opset = found.get("", found.get("ai.onnx", 0))
    if opset >= OLDEST_OPSET or opset == 0:
        return program
    try:
        converted = version_converter.convert_version(program, CONVERTED_OPSET)
    except (RuntimeError, ValueError) as error:
        raise UnsupportedError(
            f"{path} is of opset {opset}; expected {OLDEST_OPSET} or newer, and ONNX cannot convert it: {error}. "
            "Export it again with a newer exporter"
        ) from error
    _log.info("%s: brought from opset %d to %d", path, opset, CONVERTED_OPSET)
    return converted


def _checked(program: Any, name: str, layouts: Mapping[str, str], path: Path) -> Model:
    import onnx

    try:
        inferred = onnx.shape_inference.infer_shapes(program, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise RecipeError(f"{path} is not a correct ONNX model: {error}") from error
    for value, known in zip(program.graph.output, inferred.graph.output, strict=True):
        value.CopyFrom(known)
    inputs, outputs = edges(program)
    _check(program, path)
    return Model(
        format="onnx",
        program=program,
        name=name,
        inputs=tuple(
            TensorSpec(
                spec.name, spec.shape, spec.dtype, layouts.get(spec.name) or _layout(program.graph, spec)
            )
            for spec in inputs
        ),
        outputs=outputs,
    )


def _check(program: Any, path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(program)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise RecipeError(f"{path} is not a correct ONNX model: {error}") from error


def _layout(graph: Any, spec: TensorSpec) -> str:
    """NCHW as ONNX's convolutions want it, unless the first thing that the graph does is to bring NHWC there."""
    if len(spec.shape) != 4 or not spec.dtype.startswith("float"):
        return ""
    readers = [node for node in graph.node if spec.name in node.input]
    from_nhwc = [
        node.op_type == "Transpose"
        and any(list(attribute.ints) == [0, 3, 1, 2] for attribute in node.attribute)
        for node in readers
    ]
    return "NHWC" if from_nhwc and all(from_nhwc) else "NCHW"


def _spec(value: Any) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type
    axes = tensor.shape.dim
    if not tensor.HasField("shape") or any(axis.dim_value < 1 for axis in axes):
        shape = [axis.dim_value or axis.dim_param or "?" for axis in axes]
        raise RecipeError(
            f"the shape of tensor {value.name!r} depends on the data ({shape}); devices run static shapes. "
            "Cut the model before the operator that decides it"
        )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name if tensor.elem_type else "undefined"
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"tensor {value.name!r} is {dtype}; the edges of a model must be one of {', '.join(DTYPES)}"
        )
    return TensorSpec(value.name, tuple(axis.dim_value for axis in axes), dtype)
