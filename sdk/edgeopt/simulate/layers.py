# SPDX-License-Identifier: Apache-2.0
"""The integer layers of a quantized model, and how their weights lie.

A layer is a Conv, MatMul or Gemm whose input and weights are 8-bit integers when ONNX Runtime runs it; which ones are
is decided in `edgeopt.simulate.fusions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.simulate.values import Grid

LAYER_TYPES = ("Conv", "MatMul", "Gemm", "MatMulInteger")


@dataclass(frozen=True)
class Layer:
    """One of them.

    `matrix` has its weights as (groups, K, N), K in the order of `edgeopt.simulate.sums`, N the outputs of a group.
    `output` names the integer tensor that the layer is rounded to, empty if it is not; `grid` is that tensor's. `raw_offset` is what x86 adds to an input before multiplying (128 for
    int8), `is_unsigned` whether that input is uint8 then. `is_depthwise` marks a convolution with one input and one output channel a group.
    """

    name: str
    op_type: str
    matrix: np.ndarray
    output: str
    grid: Grid | None
    raw_offset: int
    is_unsigned: bool
    is_depthwise: bool
    channels: int
    """How many inputs of a group there are at each position of a kernel; K itself for a matrix product."""

    @property
    def is_paired(self) -> bool:
        """Whether x86 without VNNI multiplies this layer in pairs (vpmaddubsw).

        Weights of int8 do, uint8 ones are multiplied in 16 bits (`QgemmU8U8KernelAvx2.S`, vpmaddwd). Depthwise
        kernels widen to 32 or 16 bits first (`ConvSymKernelAvx2.S`, `qdwconv_avx2.cpp`).
        """
        return self.is_unsigned and self.matrix.dtype.kind == "i" and not self.is_depthwise


@dataclass(frozen=True)
class Node:
    """An ONNX node, parsed; `name` is its first output's where it has none."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    proto: Any


def parse(proto: Any) -> Node:
    """Parse an ONNX NodeProto."""
    import onnx

    attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in proto.attribute}
    name = proto.name or next(iter(proto.output), "")
    return Node(name, proto.op_type, tuple(proto.input), tuple(proto.output), attributes, proto)


def weight_matrix(node: Node, weights: np.ndarray) -> np.ndarray | None:
    """Lay the weights of a layer out as (groups, K, N); None if they have another shape than a layer's."""
    import numpy as np

    if node.op_type == "Conv":
        groups = int(node.attributes.get("group", 1))
        outputs = weights.shape[0] // groups
        flat = weights.reshape(groups, outputs, weights.shape[1], -1)
        return np.ascontiguousarray(flat.transpose(0, 3, 2, 1)).reshape(groups, -1, outputs)
    if weights.ndim != 2:
        return None
    if node.op_type == "Gemm" and node.attributes.get("transB", 0):
        weights = weights.T
    return np.ascontiguousarray(weights)[None]


def output_axis(node: Node) -> int:
    """The axis of a layer's weights that its output channels lie along."""
    return 0 if node.op_type == "Conv" or node.attributes.get("transB", 0) else 1


def is_depthwise(node: Node, shape: tuple[int, ...]) -> bool:
    """Whether weights of this shape make a convolution with one channel in and one out a group."""
    return node.op_type == "Conv" and shape[1] == 1 and shape[0] == node.attributes.get("group", 1)
