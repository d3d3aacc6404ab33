# SPDX-License-Identifier: Apache-2.0
"""Which Conv, MatMul and Gemm ONNX Runtime runs in integers, and what it does to their inputs first.

Rules (`core/optimizer/qdq_transformer/`, ONNX Runtime 1.32):
- A Conv runs in integers only if a QuantizeLinear stands behind it (a Relu or Clip between them is absorbed if its
  ends are those of the integers); a MatMul or Gemm in any case (`selectors_actions/qdq_selectors.cc`:
  `QLinearMatMul`, `MatMulIntegerToFloat`, `QGemm`). A MatMulInteger is one.
- On x86 activations of int8 become uint8 with 128 added before anything runs, if they are read once (`qdq_s8_to_u8.cc`,
  after `common_subexpression_elimination.cc` and `ensure_unique_dq_for_node_unit.cc`): mostly, an s8s8 model is a
  u8s8 model on x86. Others keep their Conv or MatMul in float; a Gemm of them runs as s8s8.
- A layer whose output is unsigned and whose input is not, or the other way round, runs in float.
- On ARM int8 stays int8 and every layer of it is an integer one (`QDQIsInt8Allowed` in
  `core/optimizer/graph_transformer_utils.cc`; the session option `session.qdqisint8allowed` gives that graph on x86).
- Weights are constants here; a product of two activations is u8u8 and exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgeopt.simulate.layers import LAYER_TYPES, Layer, Node, is_depthwise, weight_matrix
from edgeopt.simulate.operators import MOVES
from edgeopt.simulate.values import Grid, Quantized, Value, real
from edgeopt_wire.errors import UnsupportedError

CLIP_SLACK = 1e-6
"""Relative: a Clip is absorbed by the rounding behind it if their ends differ by no more than float32 does."""

_QUANTIZE, _DEQUANTIZE, _DYNAMIC = "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"
_PASSED = MOVES | {"MaxPool", "Resize"}


def find_layers(
    nodes: Sequence[Node],
    constants: Mapping[str, Value],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    native_int8: bool = False,
) -> dict[str, Layer]:
    """Find the integer layers of a graph, by the name of the tensor that each computes, in their order.

    `nodes` are those that are not constant; `inputs` and `outputs` are the model's. With `native_int8` activations of
    int8 stay int8, as on ARM.
    """
    graph = _Graph(tuple(nodes), constants, frozenset(inputs), tuple(outputs), native_int8)
    found = {node.outputs[0]: graph.layer(node) for node in nodes if node.op_type in LAYER_TYPES}
    return {name: layer for name, layer in found.items() if layer is not None}


def grid_of(node: Node, given: Sequence[Value]) -> Grid:
    """Read the grid of a QuantizeLinear or DequantizeLinear off its inputs' values.

    Raises:
        UnsupportedError: It is quantized in blocks, or to something that is no 8-, 16- or 32-bit integer.
    """
    import numpy as np

    scale = np.asarray(given[1], np.float32)
    if node.attributes.get("block_size", 0):
        raise UnsupportedError(f"simulation: {node.op_type} {node.name!r} is quantized in blocks")
    if len(given) > 2 and given[2] is not None:
        zero_point = np.asarray(given[2])
        dtype = zero_point.dtype
    else:
        dtype = np.dtype(np.uint8) if node.op_type == _QUANTIZE else np.asarray(given[0]).dtype
        zero_point = np.zeros_like(scale, dtype)
    if dtype.kind not in "iu" or dtype.itemsize not in (1, 2, 4):
        raise UnsupportedError(f"simulation: {node.op_type} {node.name!r} has the type {dtype}")
    return Grid(dtype, scale, zero_point.astype(np.int32), int(node.attributes.get("axis", 1)))


@dataclass(frozen=True)
class _Graph:
    """Who makes a tensor and who reads it."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, Value]
    inputs: frozenset[str]
    outputs: tuple[str, ...]
    native_int8: bool
    producers: dict[str, Node] = field(default_factory=dict)
    consumers: dict[str, list[Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.nodes:
            self.producers.update(dict.fromkeys(node.outputs, node))
            for name in node.inputs:
                self.consumers.setdefault(name, []).append(node)

    def layer(self, node: Node) -> Layer | None:
        """The integer layer that a node is, or None if it runs in float."""
        if node.op_type == "MatMulInteger":
            return self._dynamic_layer(node)
        weights = self.constants.get(node.inputs[1])
        if not isinstance(weights, Quantized) or weights.integers.dtype.itemsize != 1:
            return None
        matrix = weight_matrix(node, weights.integers)
        source, source_grid = self._integer_source(node.inputs[0])
        output, grid = self._rounded(node.outputs[0])
        if matrix is None or source_grid is None or (node.op_type == "Conv" and grid is None):
            return None
        is_unsigned = self._is_unsigned(source, source_grid)
        is_alike = grid is None or self._is_unsigned(output, grid) == is_unsigned
        if not is_alike or not (is_unsigned or self.native_int8 or node.op_type == "Gemm"):
            return None
        return Layer(
            node.name,
            node.op_type,
            matrix,
            output,
            grid,
            raw_offset=128 if is_unsigned and source_grid.dtype.kind == "i" else 0,
            is_unsigned=is_unsigned,
            is_depthwise=is_depthwise(node, weights.integers.shape),
            channels=weights.integers.shape[1] if node.op_type == "Conv" else matrix.shape[1],
        )

    def _dynamic_layer(self, node: Node) -> Layer | None:
        """A product whose input is quantized as it comes, always to uint8; its output is int32."""
        import numpy as np

        weights = self.constants.get(node.inputs[1])
        source = self._moved_from(node.inputs[0])
        matrix = weight_matrix(node, np.asarray(weights)) if weights is not None else None
        if matrix is None or source is None or source.op_type != _DYNAMIC:
            return None
        return Layer(
            node.name, node.op_type, matrix, "", None,
            raw_offset=0, is_unsigned=True, is_depthwise=False, channels=matrix.shape[1],
        )  # fmt: skip

    def _moved_from(self, name: str) -> Node | None:
        node = self.producers.get(name)
        while node is not None and node.op_type in _PASSED:
            node = self.producers.get(node.inputs[0])
        return node

    def _integer_source(self, name: str) -> tuple[str, Grid | None]:
        """The integer tensor that arrives here as an activation, and its grid; None if floats arrive."""
        node = self._moved_from(name)
        if node is None or node.op_type != _DEQUANTIZE:
            return "", None
        grid = self._grid(node)
        return node.inputs[0], grid if grid.dtype.itemsize == 1 else None

    def _is_unsigned(self, name: str, grid: Grid) -> bool:
        """Whether a tensor is uint8 on x86: int8 becomes so where it is read once, its equals counted in."""
        if grid.dtype.kind == "u":
            return True
        if name in self.inputs or self.native_int8:
            return False
        readers = [
            (reader, equal) for equal in self._equals(name) for reader in self.consumers.get(equal, ())
        ]
        if any(reader.op_type != _DEQUANTIZE or equal in self.outputs for reader, equal in readers):
            return False
        real_names = [reader.outputs[0] for reader, _ in readers]
        return sum(len(self.consumers.get(real, ())) + self.outputs.count(real) for real in real_names) == 1

    def _equals(self, name: str) -> list[str]:
        """The tensors that round the same values to the same grid; the runtime makes one of them."""
        node = self.producers.get(name)
        if node is None or node.op_type != _QUANTIZE:
            return []
        others = [other for other in self.consumers[node.inputs[0]] if other.op_type == _QUANTIZE]
        return [other.outputs[0] for other in others if _is_same(self._grid(other), self._grid(node))]

    def _rounded(self, name: str) -> tuple[str, Grid | None]:
        """The integer tensor that a sum is rounded to, through a Relu or Clip that the rounding absorbs."""
        passed: list[Node] = []
        while name not in self.outputs and name in self.consumers:
            node, *others = self.consumers[name]
            if node.op_type == _QUANTIZE:
                grid = self._grid(node)
                is_one = len(self._equals(node.outputs[0])) == 1 + len(others)
                is_absorbed = all(self._is_absorbed(activation, grid) for activation in passed)
                return (node.outputs[0], grid) if is_one and is_absorbed else ("", None)
            if others or node.op_type not in ("Relu", "Clip"):
                break
            passed.append(node)
            name = node.outputs[0]
        return "", None

    def _is_absorbed(self, node: Node, grid: Grid) -> bool:
        import numpy as np

        limits = np.iinfo(grid.dtype)
        low, high = (
            (end - float(grid.zero_point.reshape(-1)[0])) * float(grid.scale.reshape(-1)[0])
            for end in (limits.min, limits.max)
        )
        if node.op_type == "Relu":
            return low >= 0
        ends = [self.constants.get(name) if name else None for name in (*node.inputs[1:], "", "")]
        slack = CLIP_SLACK * max(abs(low), abs(high))
        above = ends[0] is None or float(real(ends[0])) <= low + slack
        return above and (ends[1] is None or float(real(ends[1])) >= high - slack)

    def _grid(self, node: Node) -> Grid:
        return grid_of(node, [self.constants.get(name) for name in node.inputs])


def _is_same(first: Grid, second: Grid) -> bool:
    import numpy as np

    is_alike = first.dtype == second.dtype and np.array_equal(first.scale, second.scale)
    return is_alike and bool(np.array_equal(first.zero_point, second.zero_point))
