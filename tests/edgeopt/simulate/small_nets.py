# SPDX-License-Identifier: Apache-2.0
"""Small float nets with seeded weights that have every kind of operator which is simulated."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeopt_converters.model import Model
from edgeopt_wire.tensor import TensorSpec


class Net:
    """Writes a float ONNX graph down, one call a node."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = shape
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def constant(self, values: Any) -> str:
        name = f"constant{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def weight(self, *shape: int) -> str:
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        return self.constant(self.rng.normal(0, (2 / fan) ** 0.5, shape).astype(np.float32))

    def node(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        name = f"{op_type.lower()}{len(self.nodes)}"
        made = [f"{name}_out{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), made, name, **attributes))
        return made[0] if outputs == 1 else made

    def conv(self, x: str, channels: int, outputs: int, kernel: int = 3, **attributes: Any) -> str:
        groups = attributes.get("group", 1)
        weights = self.weight(outputs, channels // groups, kernel, kernel)
        pads = {} if "auto_pad" in attributes else {"pads": [kernel // 2] * 4}
        return str(self.node("Conv", x, weights, self.weight(outputs), **pads, **attributes))

    def model(self, output: str) -> Model:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [onnx.ValueInfoProto(name=output)],
            self.tensors,
        )
        program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        program = onnx.shape_inference.infer_shapes(program, strict_mode=True)
        shape = tuple(dim.dim_value for dim in program.graph.output[0].type.tensor_type.shape.dim)
        specs = TensorSpec("x", self.shape, "float32"), TensorSpec(output, shape, "float32")
        return Model("onnx", program, "net", (specs[0],), (specs[1],))


def convolutions() -> Model:
    """Strides, pads, groups, dilation, depthwise, both poolings, a residual addition, a classifier."""
    net = Net((1, 3, 24, 24), 1)
    x = net.node("Relu", net.conv("x", 3, 16, strides=[2, 2]))
    y = net.node("Clip", net.conv(x, 16, 32, 1), net.constant(np.float32(0)), net.constant(np.float32(6)))
    y = net.node("Relu", net.conv(y, 32, 32, 5, group=32))
    x = net.node("Add", x, net.conv(y, 32, 16, 1))
    x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    x = net.node("Relu", net.conv(x, 16, 24, group=4, auto_pad="SAME_UPPER", strides=[2, 2]))
    x = net.node("LeakyRelu", net.conv(x, 24, 24, 3, group=12, dilations=[1, 1]), alpha=0.1)
    x = net.node("AveragePool", x, kernel_shape=[2, 2], strides=[1, 1], pads=[1, 1, 0, 0])
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    return net.model(net.node("Gemm", x, net.weight(10, 24), net.weight(10), transB=1))


def branches() -> Model:
    """Squeeze and excitation, concatenation, split, resize, transposition, softmax."""
    net = Net((2, 4, 12, 12), 2)
    x = net.node("Relu", net.conv("x", 4, 16))
    gate = net.node("Relu", net.conv(net.node("GlobalAveragePool", x), 16, 4, 1))
    gate = net.node("Sigmoid", net.conv(gate, 4, 16, 1))
    x = net.node("Mul", x, gate)
    left, right = net.node("Split", x, net.constant(np.array([8, 8])), outputs=2, axis=1)
    left = net.node("HardSwish", net.conv(left, 8, 8))
    x = net.node("Concat", left, net.node("Tanh", right), axis=1)
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    x = net.node("Resize", x, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric",
                 nearest_mode="floor")  # fmt: skip
    x = net.node("Transpose", net.conv(x, 16, 6, 1, strides=[2, 2]), perm=[0, 2, 3, 1])
    x = net.node("Reshape", x, net.constant(np.array([2, 144, 6])))
    return net.model(net.node("Softmax", x, axis=-1))


def attention() -> Model:
    """One transformer block: products of two activations, softmax, normalization, GELU."""
    net = Net((1, 12, 32), 3)
    heads = net.constant(np.array([1, 12, 4, 8]))

    def project(x: str, perm: list[int]) -> str:
        return str(net.node("Transpose", net.node("Reshape", net.node("MatMul", x, net.weight(32, 32)), heads),
                            perm=perm))  # fmt: skip

    query, key = project("x", [0, 2, 1, 3]), project("x", [0, 2, 3, 1])
    scores = net.node("Div", net.node("MatMul", query, key), net.constant(np.float32(8**0.5)))
    mixed = net.node("MatMul", net.node("Softmax", scores, axis=-1), project("x", [0, 2, 1, 3]))
    joined = net.node(
        "Reshape", net.node("Transpose", mixed, perm=[0, 2, 1, 3]), net.constant(np.array([1, 12, 32]))
    )
    x = net.node("Add", net.node("MatMul", joined, net.weight(32, 32)), "x")
    ones = net.constant(np.ones(32, np.float32))
    x = net.node("LayerNormalization", x, ones, net.weight(32), axis=-1)
    y = net.node("MatMul", x, net.weight(32, 64))
    y = net.node("Add", y, net.weight(64))
    erf = net.node("Erf", net.node("Mul", y, net.constant(np.float32(0.5**0.5))))
    y = net.node("Mul", net.node("Mul", y, net.constant(np.float32(0.5))),
                 net.node("Add", erf, net.constant(np.float32(1))))  # fmt: skip
    return net.model(net.node("Add", net.node("MatMul", y, net.weight(64, 32)), x))


def hard_swish() -> Model:
    """Hard-swish and hard-sigmoid gates around depthwise convolutions, as in MobileNetV3."""
    net = Net((1, 3, 16, 16), 5)
    x = net.node("HardSwish", net.conv("x", 3, 16, strides=[2, 2]))
    y = net.node("HardSwish", net.conv(x, 16, 32, 1))
    y = net.node("HardSwish", net.conv(y, 32, 32, 5, group=32))
    gate = net.node("Relu", net.conv(net.node("GlobalAveragePool", y), 32, 8, 1))
    gate = net.node("HardSigmoid", net.conv(gate, 8, 32, 1), alpha=1 / 6)
    x = net.node("Add", x, net.conv(net.node("Mul", y, gate), 32, 16, 1))
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    x = net.node("HardSwish", net.node("Gemm", x, net.weight(24, 16), net.weight(24), transB=1))
    return net.model(net.node("Gemm", x, net.weight(10, 24), net.weight(10), transB=1))


NETS: dict[str, Callable[[], Model]] = {
    "convolutions": convolutions,
    "branches": branches,
    "attention": attention,
    "hard-swish": hard_swish,
}


def inputs(model: Model, count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 1, model.inputs[0].shape).astype(np.float32) for _ in range(count)]
