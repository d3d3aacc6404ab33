# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime makes of an ONNX file: its own optimized graph is saved and read.

The level is "extended": all fusions of Q and DQ happen there, and what comes after it only changes the layout in
memory. Shapes, for multiply-accumulates, are those of one run with zeros.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.coverage import PRODUCT_TYPES, Coverage, Left
from edgeopt_wire.errors import RuntimeFailure

if TYPE_CHECKING:
    import numpy as np

CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_DYNAMIC = frozenset({
    "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"
})  # fmt: skip
_INTEGER = _DYNAMIC | {"QGemm", "QAttention", "QEmbedLayerNormalization", "QMoE", "MatMulNBits"}
_WEIGHT_AT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
_FLOATS = ("float32", "float16", "float64")


def read(file: Path) -> Coverage:
    """Load `file` on the CPU and read what became of it.

    Raises:
        RuntimeFailure: ONNX Runtime cannot load or run it.
    """
    program = _optimized(file)
    view = _View(program, _values(program))
    nodes = [_look(view, node) for node in view.nodes]
    counted = [found for found in nodes if found is not None]
    products = [found for found in counted if found.is_product]
    return Coverage(
        runtime="onnxruntime",
        operators=len(counted),
        integer_operators=sum(found.is_integer for found in counted),
        products=len(products),
        integer_products=sum(found.is_integer for found in products),
        macs=sum(found.macs for found in products),
        integer_macs=sum(found.macs for found in products if found.is_integer),
        conversions=sum(node.op_type in CONVERSIONS for node in view.nodes),
        dynamic=sum(node.op_type in _DYNAMIC for node in view.nodes),
        left_out=tuple(_left(view, found) for found in counted if not found.is_integer),
    )


@dataclass(frozen=True)
class _Found:
    """An operator that computes something of the model."""

    node: Any
    is_integer: bool
    is_product: bool
    macs: int


def _optimized(file: Path) -> Any:
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="edgeopt-") as folder:
        target = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(target)
        try:
            ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            raise RuntimeFailure(f"onnxruntime cannot load {file.name}: {error}") from error
        return onnx.load(target)


def _values(program: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every tensor, from one run of the optimized graph with zeros: name -> (shape, dtype)."""
    import numpy as np
    import onnx
    import onnxruntime as ort

    watched = onnx.ModelProto()
    watched.CopyFrom(program)
    known = {output.name for output in program.graph.output}
    for node in program.graph.node:
        for name in node.output:
            if name and name not in known:
                watched.graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for tensor in program.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        found[tensor.name] = (tuple(tensor.dims), dtype)
    try:
        session = ort.InferenceSession(
            watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        feeds = {entry.name: _zeros(entry) for entry in session.get_inputs()}
        names = [output.name for output in session.get_outputs()]
        results = session.run(names, feeds)
    except Exception:  # noqa: BLE001 - shapes are a help, not a need: what cannot run has no multiply-accumulates
        return found
    for name, value in (*feeds.items(), *zip(names, results, strict=True)):
        if isinstance(value, np.ndarray):
            found[name] = (value.shape, value.dtype.name)
    return found


def _zeros(entry: Any) -> np.ndarray:
    import numpy as np

    types = {"float": "float32", "double": "float64"}
    name = entry.type.removeprefix("tensor(").removesuffix(")")
    shape = [axis if isinstance(axis, int) and axis > 0 else 1 for axis in entry.shape]
    return np.zeros(shape, types.get(name, name))


class _View:
    """The nodes of a graph and of the graphs inside it, who makes and who reads each tensor, and what it is."""

    def __init__(self, program: Any, values: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        self.nodes = list(_walk(program.graph))
        self.values = values
        self.constants = {tensor.name: tensor for tensor in _constants(program.graph)}
        self.writer = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values.get(name, ((), ""))[0]

    def is_float(self, name: str) -> bool:
        if name in self.values:
            return self.values[name][1] in _FLOATS
        writer = self.writer.get(name)
        return writer is None or not (writer.op_type == "QuantizeLinear" or _is_integer(writer))


def _walk(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        if node.op_type != "Constant":
            yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _walk(attribute.g)


def _constants(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _constants(attribute.g)


def _is_integer(node: Any) -> bool:
    return node.op_type in _INTEGER or node.op_type.startswith("QLinear")


def _look(view: _View, node: Any) -> _Found | None:
    """What a node computes, or None for conversions, control flow, and what only handles shapes and indices."""
    if node.op_type in CONVERSIONS or any(attribute.HasField("g") for attribute in node.attribute):
        return None
    is_product = node.op_type in PRODUCT_TYPES
    if _is_integer(node):
        return _Found(node, True, is_product, _macs(view, node))
    made = [name for name in node.output if name]
    reads_values = any(name and view.is_float(name) for name in node.input)
    if not any(view.is_float(name) for name in made):
        # a Reshape of integers belongs to the integer part; a Shape or a comparison belongs to neither
        is_moved = any(view.values.get(name, ((), ""))[1] in ("int8", "uint8") for name in made)
        return _Found(node, True, is_product, 0) if is_moved else None
    return _Found(node, False, is_product, _macs(view, node)) if reads_values or is_product else None


def _macs(view: _View, node: Any) -> int:
    output = view.shape(node.output[0]) if node.output else ()
    position = _WEIGHT_AT.get(node.op_type, 1)
    weight = view.shape(node.input[position]) if len(node.input) > position else ()
    if not output or not weight:
        return 0
    if "Conv" in node.op_type:
        return prod(output) * prod(weight[1:])
    if node.op_type in ("LSTM", "GRU", "DynamicQuantizeLSTM"):
        steps = view.shape(node.input[0])[:2]
        return prod(steps) * (prod(weight) + prod(view.shape(node.input[2])))
    if node.op_type not in PRODUCT_TYPES:
        return 0
    inner = view.shape(node.input[0])
    return prod(output) * (inner[-1] if inner else 0)


def _left(view: _View, found: _Found) -> Left:
    node = found.node
    name = node.name or (node.output[0] if node.output else node.op_type)
    reason, remedy = _why(view, node, is_product=found.is_product)
    return Left(name, node.op_type, found.macs, reason, remedy)


def _why(view: _View, node: Any, *, is_product: bool) -> tuple[str, str]:
    """Find what keeps an operator from its integer kernel by looking at its neighbours in the optimized graph."""
    data = [name for name in node.input[: 2 if is_product else None] if name and view.is_float(name)]
    for name in data:
        writer = view.writer.get(name)
        if name in view.constants and is_product:
            return (
                f"its weight {name!r} is float",
                "quantize it (is the layer or its type excluded, or its weight shared?)",
            )
        if writer is None and name not in view.constants:
            return (
                f"its input {name!r} is an input of the model in floats",
                "the quantizer must put a QuantizeLinear behind that input",
            )
        if writer is not None and writer.op_type != "DequantizeLinear":
            return (
                f"its input comes from {writer.op_type} {writer.name}, which computes in floats",
                f"an integer form of {writer.op_type}, or another operator in its place, would let this one follow",
            )
    return _why_not_fused(view, node)


def _why_not_fused(view: _View, node: Any) -> tuple[str, str]:
    """Every input is dequantized: something about the output or the types is in the way."""
    readers = view.readers[node.output[0]] if node.output else []
    quantizers = [reader for reader in readers if reader.op_type == "QuantizeLinear"]
    others = [reader for reader in readers if reader.op_type != "QuantizeLinear"]
    if not readers:
        return (
            "its output leaves the model in floats",
            "quantize the output too, if the runtime has no such kernel",
        )
    if not quantizers or others:
        reader = others[0] if others else readers[0]
        return (
            f"its output is read by {reader.op_type} {reader.name} in floats before it is quantized",
            f"take the range behind {reader.op_type}, so that no Q stands between, or replace it by one that is fused",
        )
    inner = sorted({_type(view, writer, 2) for writer in _dequantizers(view, node)})
    outer = _type(view, quantizers[0], 2)
    if inner != [outer]:
        return (
            f"it reads {' and '.join(inner)} and writes {outer}: the fusion wants one type on all sides",
            "use one type for all activations: uint8 on x86, int8 on ARM",
        )
    return (
        f"ONNX Runtime has no integer kernel for {node.op_type} with {outer} activations here",
        "leave it in floats on purpose, or use an operator that has one",
    )


def _dequantizers(view: _View, node: Any) -> list[Any]:
    """Who dequantizes the activations that a node reads."""
    writers = [view.writer.get(name) for name in node.input]
    return [
        writer
        for writer in writers
        if writer is not None
        and writer.op_type == "DequantizeLinear"
        and writer.input[0] not in view.constants
    ]


def _type(view: _View, node: Any, position: int) -> str:
    if len(node.input) <= position:
        return "uint8"
    return view.values.get(node.input[position], ((), "unknown"))[1]
