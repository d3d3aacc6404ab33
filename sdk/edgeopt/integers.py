# SPDX-License-Identifier: Apache-2.0
"""The int8 weights that a file holds, in one layout whatever its format, and how many of two files are the same.

Rules:
- A product's weights are (outputs, inputs of a group x height x width): a 1x1 convolution and a fully connected layer,
  which converters turn into each other, look alike. Scales, biases and zero points are not looked at.
- Files list their products in orders of their own, so those of the same shape are matched by how much they agree.
- Only constants that a product reads as int8 count: what a file left in floats, the other has too many.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_products import attributes

if TYPE_CHECKING:
    import numpy as np

    from edgeopt_converters.model import Model

_ONNX_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LITERT_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED")
_LITERT_DEPTHWISE, _EXECUTORCH_DEPTHWISE = "DEPTHWISE_CONV_2D", "XNNDepthwiseConv2d"


def int8_weights(model: Model) -> tuple[np.ndarray, ...]:
    """The int8 weights of every product of an ONNX (QDQ), LiteRT or ExecuTorch (XNNPACK) file: (outputs, rest) each.

    Raises:
        RecipeError: The program is damaged.
        UnsupportedError: The library that reads its format is not installed.
    """
    read = {"onnx": _of_onnx, "litert": _of_litert, "executorch": _of_executorch}[model.format]
    return tuple(weights.reshape(len(weights), -1) for weights in read(model.program))


def share_of_same(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """The share of int8 weights that are the same in both, of the file that has more of them; 0 where one has none."""
    import numpy as np

    left: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
    for weights in second:
        left[weights.shape].append(weights)
    same = 0
    for weights in first:
        others = left[weights.shape]
        if not others:
            continue
        counts = [int(np.count_nonzero(weights == other)) for other in others]
        same += max(counts)
        others.pop(counts.index(max(counts)))
    total = max(sum(weights.size for weights in given) for given in (first, second))
    return same / total if total else 0.0


def _of_onnx(program: Any) -> Iterator[np.ndarray]:
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in program.graph.initializer}
    stored = {
        node.output[0]: constants[node.input[0]]
        for node in program.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    for node in program.graph.node:
        if node.op_type not in _ONNX_PRODUCTS or node.input[1] not in stored:
            continue
        weights = numpy_helper.to_array(stored[node.input[1]])
        if weights.dtype != "int8" or weights.ndim < 2:
            continue
        if node.op_type == "ConvTranspose":  # (inputs, outputs, height, width)
            weights = weights.swapaxes(0, 1)
        elif node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes(node).get("transB")):
            weights = weights.swapaxes(-1, -2)
        yield weights


def _of_litert(program: bytes) -> Iterator[np.ndarray]:
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    from edgeopt_converters.litert_file import parse

    wanted = {getattr(schema.BuiltinOperator, name): name for name in _LITERT_PRODUCTS}
    model = parse(program)
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            kind = wanted.get(max(code.builtinCode, code.deprecatedBuiltinCode))
            if kind is None:
                continue
            tensor = graph.tensors[operator.inputs[1]]
            stored = model.buffers[tensor.buffer].data
            if tensor.type != schema.TensorType.INT8 or stored is None:
                continue
            weights = np.frombuffer(bytes(stored), np.int8).reshape(tensor.shape)
            yield _channels_second(weights, is_depthwise=kind == _LITERT_DEPTHWISE)


def _of_executorch(program: bytes) -> Iterator[np.ndarray]:
    import numpy as np

    from edgeopt_converters import executorch_file

    file = executorch_file.parse(program)
    for delegate in file.program.backend_delegate_data:
        graph = executorch_file.xnnpack_graph(bytes(delegate.data))
        unions = (entry["xvalue_union"] for entry in graph["xvalues"])
        values = {value["id_out"]: value for union in unions for value in [union.get("tensor_value", union)]}
        for node in graph["xnodes"]:
            value = values.get(node["xnode_union"].get("filter_id"))
            if value is None or "qcint8" not in str(value["datatype"]):
                continue
            key = graph["constant_data"][value["constant_buffer_idx"]]["named_key"]
            stored = bytes(file.named_data.buffers[file.named_data.pte_data[key].buffer_index])
            weights = np.frombuffer(stored, np.int8)[: int(np.prod(value["dims"]))].reshape(value["dims"])
            yield _channels_second(weights, is_depthwise=node["xnode_union_type"] == _EXECUTORCH_DEPTHWISE)


def _channels_second(weights: np.ndarray, *, is_depthwise: bool) -> np.ndarray:
    """From (outputs, height, width, inputs), depthwise (1, height, width, outputs), to (outputs, inputs, ...)."""
    if is_depthwise:
        return weights.transpose(3, 0, 1, 2)
    return weights.transpose(0, 3, 1, 2) if weights.ndim == 4 else weights
