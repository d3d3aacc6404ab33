# SPDX-License-Identifier: Apache-2.0
"""The rules for ONNX Runtime are those of the installed one: it is asked what it makes of each operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt_profiles.operators import Operator, Tensor
from edgeopt_profiles.support import onnxruntime as rules

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

IMAGE = (1, 4, 8, 8)
ZERO = {"uint8": np.uint8(128), "int8": np.int8(0)}


def _i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# type: (shape of the input, further inputs ("q": another quantized tensor, tuple: int8 weights, array), attributes)
CASES: dict[str, tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = {
    "Abs": (IMAGE, (), {}),
    "Add": (IMAGE, ("q",), {}),
    "ArgMax": (IMAGE, (), {"axis": 1}),
    "AveragePool": (IMAGE, (), {"kernel_shape": [2, 2]}),
    "Concat": (IMAGE, ("q",), {"axis": 1}),
    "Conv": (IMAGE, ((4, 4, 3, 3),), {}),
    "ConvTranspose": (IMAGE, ((4, 4, 3, 3),), {}),
    "DepthToSpace": (IMAGE, (), {"blocksize": 2}),
    "Div": (IMAGE, ("q",), {}),
    "Elu": (IMAGE, (), {}),
    "Erf": (IMAGE, (), {}),
    "Expand": (IMAGE, (_i64(2, 4, 8, 8),), {}),
    "Flatten": (IMAGE, (), {}),
    "Gather": (IMAGE, (_i64(0, 1),), {"axis": 1}),
    "GatherElements": (IMAGE, (np.zeros(IMAGE, np.int64),), {"axis": 1}),
    "Gemm": ((8, 4), ((4, 6),), {}),
    "GlobalAveragePool": (IMAGE, (), {}),
    "GlobalMaxPool": (IMAGE, (), {}),
    "HardSigmoid": (IMAGE, (), {}),
    "LayerNormalization": (IMAGE, (np.ones(8, np.float32),), {}),
    "LeakyRelu": (IMAGE, (), {}),
    "MatMul": ((8, 4), ((4, 6),), {}),
    "Max": (IMAGE, ("q",), {}),
    "MaxPool": (IMAGE, (), {"kernel_shape": [2, 2]}),
    "Mul": (IMAGE, ("q",), {}),
    "Pad": (IMAGE, (_i64(0, 0, 1, 1, 0, 0, 1, 1),), {}),
    "ReduceMax": (IMAGE, (), {"axes": [2]}),
    "ReduceMean": (IMAGE, (), {"axes": [2, 3]}),
    "ReduceMin": (IMAGE, (), {"axes": [2]}),
    "Relu": (IMAGE, (), {}),
    "Reshape": (IMAGE, (_i64(1, -1),), {}),
    "Resize": (IMAGE, (None, np.array([1, 1, 2, 2], np.float32)), {"mode": "nearest"}),
    "Sigmoid": (IMAGE, (), {}),
    "Slice": (IMAGE, (_i64(0), _i64(2), _i64(1)), {}),
    "Softmax": (IMAGE, (), {}),
    "SpaceToDepth": (IMAGE, (), {"blocksize": 2}),
    "Sqrt": (IMAGE, (), {}),
    "Squeeze": (IMAGE, (_i64(0),), {}),
    "Sub": (IMAGE, ("q",), {}),
    "Tanh": (IMAGE, (), {}),
    "Tile": (IMAGE, (_i64(1, 1, 2, 2),), {}),
    "Transpose": (IMAGE, (), {"perm": [0, 2, 3, 1]}),
    "Unsqueeze": (IMAGE, (_i64(0),), {}),
}


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("kind", CASES)
def test_rule_says_what_the_installed_runtime_does(kind: str, dtype: str, tmp_path: Path) -> None:
    tensor = Tensor("x", IMAGE, dtype)
    operator = Operator("op", kind, (tensor,), (tensor,), 0, 0, "int8")

    says_integer = rules.place([operator]).left_out == ()

    assert says_integer == _runs_in_integers(kind, dtype, tmp_path)


def _runs_in_integers(kind: str, dtype: str, folder: Path) -> bool:
    """Whether no operator of the optimized graph reads what a DequantizeLinear made."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(_model(kind, dtype), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "optimized.onnx").graph.node
    floats = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    return not any(name in floats for node in nodes for name in node.input)


def _model(kind: str, dtype: str) -> bytes:
    """Q and DQ, the operator, Q and DQ."""
    shape, further, attributes = CASES[kind]
    make, constants, nodes = onnx.helper.make_node, {}, []
    constants |= {
        "scale": np.float32(0.05),
        "zero": ZERO[dtype],
        "weight_scale": np.float32(0.02),
        "none": np.int8(0),
    }
    edges = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)]
    reads = ["x_float"]
    for index, entry in enumerate(further):
        name = f"in{index}"
        if isinstance(entry, str):
            edges.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
            nodes += _pair(name)
            reads.append(f"{name}_float")
        elif isinstance(entry, tuple):
            constants[name] = np.ones(entry, np.int8)
            nodes.append(make("DequantizeLinear", [name, "weight_scale", "none"], [f"{name}_float"]))
            reads.append(f"{name}_float")
        elif entry is None:
            reads.append("")
        else:
            constants[name] = entry
            reads.append(name)
    nodes = [*_pair("x"), *nodes, make(kind, reads, ["y"], **attributes)]
    if kind == "ArgMax":
        made = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, None)
    else:
        nodes += _pair("y")
        made = onnx.helper.make_tensor_value_info("y_float", onnx.TensorProto.FLOAT, None)
    initializers = [
        onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    ]
    graph = onnx.helper.make_graph(nodes, "one", edges, [made], initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _pair(name: str) -> list[Any]:
    return [
        onnx.helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_int"]),
        onnx.helper.make_node("DequantizeLinear", [f"{name}_int", "scale", "zero"], [f"{name}_float"]),
    ]
