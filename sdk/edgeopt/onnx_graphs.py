# SPDX-License-Identifier: Apache-2.0
"""What several passes need of an ONNX model: folding it, and seeing what flows through it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.calibrate import Observe

if TYPE_CHECKING:
    import numpy as np


OLDEST_OPSET = 13
"""The first in which QuantizeLinear and DequantizeLinear take a scale per channel."""


def fold(program: Any) -> Any:
    """Let ONNX Runtime's basic optimizer fold batch normalization and constants, then infer shapes.

    A model of an older opset is brought to `OLDEST_OPSET` first.
    """
    import onnx
    import onnxruntime as ort

    opsets = {entry.domain: entry.version for entry in program.opset_import}
    if opsets.get("", OLDEST_OPSET) < OLDEST_OPSET:
        program = onnx.version_converter.convert_version(program, OLDEST_OPSET)
    with tempfile.TemporaryDirectory(prefix="edgeopt-") as folder:
        folded = Path(folder) / "folded.onnx"
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        options.log_severity_level = 3
        ort.InferenceSession(program.SerializeToString(), options, providers=["CPUExecutionProvider"])
        plain = onnx.shape_inference.infer_shapes(onnx.load(folded), strict_mode=True, data_prop=True)
    return onnx.shape_inference.infer_shapes(_pool_means(plain), strict_mode=True, data_prop=True)


def _pool_means(program: Any) -> Any:
    """Say GlobalAveragePool where an exporter said ReduceMean over height and width.

    Runtimes pool in integers only what is called pooling.
    """
    import onnx

    constants = {tensor.name: tensor for tensor in program.graph.initializer}
    shapes = {info.name: info.type.tensor_type.shape.dim for info in program.graph.value_info}
    for node in program.graph.node:
        if node.op_type != "ReduceMean" or len(shapes.get(node.input[0], ())) != 4:
            continue
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        axes = attributes.get("axes", ())
        if len(node.input) > 1 and node.input[1] in constants:
            axes = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
        if sorted(axis % 4 for axis in axes) == [2, 3] and attributes.get("keepdims", 1) == 1:
            pooled = onnx.helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output), node.name)
            node.CopyFrom(pooled)
    used = {name for node in program.graph.node for name in node.input}
    kept = [tensor for tensor in program.graph.initializer if tensor.name in used]
    del program.graph.initializer[:]
    program.graph.initializer.extend(kept)
    return program


def observer(program: Any, names: frozenset[str] | None = None) -> Observe:
    """Run the float model with every float activation as an output, or only those named; inputs are seen too."""
    import onnx
    import onnxruntime as ort

    watched = onnx.ModelProto()
    watched.CopyFrom(program)
    types = {info.name: info.type.tensor_type for info in (*program.graph.value_info, *program.graph.output)}
    known = {output.name for output in program.graph.output}
    for name in (name for node in program.graph.node for name in node.output):
        tensor = types.get(name)
        is_float = tensor is None or tensor.elem_type == onnx.TensorProto.FLOAT
        if name and name not in known and is_float and (names is None or name in names):
            watched.graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]

    def observe(inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        for name, values in (*inputs.items(), *zip(outputs, session.run(outputs, dict(inputs)), strict=True)):
            if values.dtype.kind == "f" and (names is None or name in names):
                yield name, values

    return observe


def channel_extremes(
    observe: Observe, samples: Iterable[Mapping[str, np.ndarray]], on_sample: Callable[[], None]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The smallest and largest value of every channel (axis 1) of what is observed, over all samples."""
    import numpy as np

    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for sample in samples:
        for name, values in observe(sample):
            axes = (0, *range(2, values.ndim))
            low, high = values.min(axis=axes), values.max(axis=axes)
            if name in found:
                low, high = np.minimum(found[name][0], low), np.maximum(found[name][1], high)
            found[name] = (low, high)
        on_sample()
    return found
