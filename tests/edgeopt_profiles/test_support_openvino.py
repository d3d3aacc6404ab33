# SPDX-License-Identifier: Apache-2.0
"""The rules for OpenVINO are those of the installed one: it is asked what it makes of each operator between convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt_profiles.operators import Operator, Tensor
from edgeopt_profiles.support import openvino as rules

onnx = pytest.importorskip("onnx")
pytest.importorskip("openvino")

IMAGE = (1, 16, 8, 8)


def _i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# type: (further inputs ("q": another quantized tensor, tuple: int8 weights, array), attributes)
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "Abs": ((), {}),
    "Add": (("q",), {}),
    "AveragePool": ((), {"kernel_shape": [2, 2]}),
    "Clip": ((np.float32(0), np.float32(6)), {}),
    "Concat": (("q",), {"axis": 1}),
    "Conv": (((16, 16, 3, 3),), {}),
    "ConvTranspose": (((16, 16, 3, 3),), {}),
    "DepthToSpace": ((), {"blocksize": 2}),
    "Div": (("q",), {}),
    "Elu": ((), {}),
    "Erf": ((), {}),
    "GlobalAveragePool": ((), {}),
    "GlobalMaxPool": ((), {}),
    "HardSigmoid": ((), {}),
    "HardSwish": ((), {}),
    "LeakyRelu": ((), {}),
    "MatMul": (((8, 6),), {}),
    "Max": (("q",), {}),
    "MaxPool": ((), {"kernel_shape": [2, 2]}),
    "Mul": (("q",), {}),
    "Pad": ((_i64(0, 0, 1, 1, 0, 0, 1, 1),), {}),
    "ReduceMax": ((), {"axes": [2]}),
    "ReduceMean": ((), {"axes": [2, 3]}),
    "Relu": ((), {}),
    "Reshape": ((_i64(1, 16, 4, 16),), {}),
    "Resize": ((None, np.array([1, 1, 2, 2], np.float32)), {"mode": "nearest"}),
    "Sigmoid": ((), {}),
    "Slice": ((_i64(0), _i64(8), _i64(1)), {}),
    "Softmax": ((), {}),
    "Sqrt": ((), {}),
    "Sub": (("q",), {}),
    "Tanh": ((), {}),
    "Transpose": ((), {"perm": [0, 2, 3, 1]}),
}


@pytest.mark.parametrize("kind", CASES)
def test_rule_says_what_the_installed_runtime_does(kind: str, tmp_path: Path) -> None:
    tensor = Tensor("x", IMAGE, "uint8")
    operator = Operator("op", kind, (tensor,), (tensor,), 0, 0, "int8")

    says_integer = rules.place([operator]).left_out == ()

    assert says_integer == _runs_in_integers(kind, tmp_path)


def test_floats_are_told_and_shapes_are_not_counted() -> None:
    def of(kind: str, dtype: str) -> Operator:
        tensor = Tensor("x", IMAGE, dtype)
        return Operator(kind, kind, (tensor,), (tensor,), 0, 0, dtype)

    placement = rules.place([of("Conv", "float32"), of("Shape", "int64"), of("Softmax", "int8")])

    assert placement.on_accelerator == ("Shape",)
    assert ["no quantized tensor" in entry.reason for entry in placement.left_out] == [True, False]


def _runs_in_integers(kind: str, folder: Path) -> bool:
    from edgeopt.coverage import read

    (folder / "model.onnx").write_bytes(_model(kind))
    found = read(folder / "model.onnx", "openvino")
    left = found.left_out_products if kind in ("Conv", "ConvTranspose", "MatMul") else found.left_out
    return "op" not in {entry.name for entry in left}


def _model(kind: str) -> bytes:
    """Two convolutions, the operator behind them, and a third one; all between integers."""
    further, attributes = CASES[kind]
    make, net = onnx.helper.make_node, _Net()
    net.quantized("x")
    for name in ("left", "right"):
        net.weights(f"{name}_w", (16, 3, 3, 3))
        net.nodes.append(make("Conv", ["x_float", f"{name}_w_float"], [name], f"head_{name}", pads=[1] * 4))
        net.quantized(name)
    reads = ["left_float"]
    for index, entry in enumerate(further):
        if isinstance(entry, str):
            reads.append("right_float")
        elif isinstance(entry, tuple):
            net.weights(f"in{index}", entry)
            reads.append(f"in{index}_float")
        else:
            reads.append("" if entry is None else net.constant(f"in{index}", entry))
    net.nodes.append(make(kind, reads, ["y"], "op", **attributes))
    net.quantized("y")
    net.weights("tail_w", (8, net.channels("y"), 1, 1))
    net.nodes.append(make("Conv", ["y_float", "tail_w_float"], ["z"], "tail"))
    return bytes(net.model("z").SerializeToString())


class _Net:
    """Nodes and constants of a quantized net."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self._random = np.random.default_rng(0)
        self.constant("scale", np.float32(0.05))
        self.constant("zero", np.uint8(128))
        self.constant("weight_scale", np.float32(0.02))
        self.constant("none", np.int8(0))

    def constant(self, name: str, value: Any) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def weights(self, name: str, shape: tuple[int, ...]) -> None:
        self.constant(name, self._random.integers(-100, 100, shape).astype(np.int8))
        self.nodes.append(
            onnx.helper.make_node("DequantizeLinear", [name, "weight_scale", "none"], [f"{name}_float"])
        )

    def quantized(self, name: str) -> None:
        make = onnx.helper.make_node
        self.nodes.append(make("QuantizeLinear", [name, "scale", "zero"], [f"{name}_int"]))
        self.nodes.append(make("DequantizeLinear", [f"{name}_int", "scale", "zero"], [f"{name}_float"]))

    def channels(self, name: str) -> int:
        inferred = onnx.shape_inference.infer_shapes(self.model(name))
        return int(inferred.graph.output[0].type.tensor_type.shape.dim[1].dim_value)

    def model(self, output: str) -> Any:
        make = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            self.nodes, "net", [make("x", onnx.TensorProto.FLOAT, [1, 3, 8, 8])], [make(output, onnx.TensorProto.FLOAT, None)],
            [onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )  # fmt: skip
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
