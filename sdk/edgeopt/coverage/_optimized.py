# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime made of a file: the graph that its optimizer saved, and the shapes and types of one profiled run.

The optimized graph is run as it is, with every node named by its number, so that a line of the profile is one node.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_wire.errors import RuntimeFailure

if TYPE_CHECKING:
    import numpy as np

Values = dict[str, tuple[tuple[int, ...], str]]
"""Shape and type of a tensor by its name."""

DYNAMIC = frozenset({
    "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention",
})  # fmt: skip
"""Products of integers whose activations are quantized in every inference, and whose sums become floats."""

FLOAT_PRODUCTS = frozenset({
    "Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Einsum", "LSTM", "GRU", "RNN",
    "Attention", "MultiHeadAttention", "GroupQueryAttention", "DeformConv",
})  # fmt: skip

_LOG_FATAL = 4
_PROFILE_TYPES = {"float": "float32", "double": "float64"}
"""Names of types in ONNX Runtime's words; all others are numpy's."""


def optimize(model: Path | bytes, *, keep_layout: bool = False) -> Any:
    """Let ONNX Runtime optimize a model for this CPU with one thread, and return the ModelProto that it would run.

    `keep_layout` leaves out its last step, which reorders tensors in memory (and renames what it touches).

    Raises:
        RuntimeFailure: ONNX Runtime cannot load it.
    """
    import onnx
    import onnxruntime as ort

    options = _options()
    if keep_layout:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory(prefix="edgeopt-") as folder:
        target = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(target)
        source = model if isinstance(model, bytes) else str(model)
        try:
            ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except errors() as error:
            name = "the model" if isinstance(model, bytes) else model.name
            raise RuntimeFailure(f"onnxruntime cannot load {name}: {error}") from error
        return onnx.load(target)


def observe(program: Any, sample: Mapping[str, np.ndarray] | None) -> Values:
    """Run an optimized graph once and tell every tensor's shape and type, those in branches that were taken included.

    Without a `sample`, inputs are zeros, and 1 long where an axis is free.

    Raises:
        RuntimeFailure: ONNX Runtime cannot run it on such inputs.
    """
    import onnx
    import onnxruntime as ort

    numbered = onnx.ModelProto()
    numbered.CopyFrom(program)
    nodes = list(walk(numbered.graph))
    for number, node in enumerate(nodes):
        node.name = f"n{number}"
    values = {
        tensor.name: (tuple(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name)
        for tensor in constants(program.graph)
    }
    options = _options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    with tempfile.TemporaryDirectory(prefix="edgeopt-") as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            session = ort.InferenceSession(
                numbered.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            inputs = dict(sample) if sample is not None else {e.name: _zeros(e) for e in session.get_inputs()}
            session.run(None, inputs)
            events = json.loads(Path(session.end_profiling()).read_text())
        except errors() as error:
            what = "zeros" if sample is None else "the sample"
            raise RuntimeFailure(f"onnxruntime cannot run the model on {what}: {error}") from error
    values |= {name: (array.shape, array.dtype.name) for name, array in inputs.items()}
    for name, shapes in _events(events):
        number = int(name[1:]) if name[1:].isdigit() else len(nodes)
        if number < len(nodes):
            made = [output for output in nodes[number].output if output]
            values |= dict(zip(made, shapes, strict=False))
    return values


def errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own classes have no common base below Exception."""
    import onnxruntime as ort

    state = vars(ort.capi.onnxruntime_pybind11_state).values()
    own = [entry for entry in state if isinstance(entry, type) and issubclass(entry, Exception)]
    return (*own, RuntimeError, ValueError, TypeError)


def is_integer_type(op_type: str) -> bool:
    """Whether an operator of this type computes with integers, whatever its tensors are."""
    return op_type.startswith("QLinear") or op_type in DYNAMIC or op_type in ("QGemm", "QMoE")


def integer_elements() -> tuple[int, ...]:
    """The 8-bit element types of ONNX."""
    import onnx

    return (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)


def walk(graph: Any) -> Iterator[Any]:
    """Every node of a graph and of the graphs inside it, in order; Constants are none."""
    for node in graph.node:
        if node.op_type != "Constant":
            yield node
        for inner in inner_graphs(node):
            yield from walk(inner)


def constants(graph: Any) -> Iterator[Any]:
    """Every initializer and Constant of a graph and of the graphs inside it, as TensorProto under its name."""
    import onnx

    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    tensor = onnx.TensorProto()
                    tensor.CopyFrom(attribute.t)
                    tensor.name = node.output[0]
                    yield tensor
        for inner in inner_graphs(node):
            yield from constants(inner)


def inner_graphs(node: Any) -> Iterator[Any]:
    """The branches or the body of a control flow operator."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _options() -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_FATAL
    return options


def _events(profile: Any) -> Iterator[tuple[str, list[tuple[tuple[int, ...], str]]]]:
    """(node's name, shape and type of each output) of every kernel that ran."""
    suffix = "_kernel_time"
    for event in profile:
        if event.get("cat") == "Node" and event["name"].endswith(suffix):
            shapes = [
                (tuple(shape), _PROFILE_TYPES.get(kind, kind))
                for entry in event["args"].get("output_type_shape", ())
                for kind, shape in entry.items()
            ]
            yield event["name"].removesuffix(suffix), shapes


def _zeros(entry: Any) -> np.ndarray:
    import numpy as np

    name = entry.type.removeprefix("tensor(").removesuffix(")")
    shape = [axis if isinstance(axis, int) and axis > 0 else 1 for axis in entry.shape]
    return np.zeros(shape, _PROFILE_TYPES.get(name, name))
