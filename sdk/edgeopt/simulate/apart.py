# SPDX-License-Identifier: Apache-2.0
"""A QDQ model taken apart at its quantized tensors, so that ONNX Runtime computes each piece from integers that are given.

Why: a tensor between two fused operators cannot be asked for without changing what is fused (an int8 tensor that is an
output of the model keeps its neighbours in floats on x86). Here each tensor becomes an output of the piece before it and
an input of the piece behind it, as floats that lie on its grid; the runtime sees Q and DQ at both ends of every piece as
it does in the whole model, and takes the same kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.simulate.values import Grid

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_GIVEN, _SEEN, _AGAIN = "/given", "/seen", "/again"


@dataclass(frozen=True)
class Pieces:
    """The model in pieces. `tensors` are those at which it was cut; `program` is the ONNX ModelProto."""

    program: Any
    tensors: tuple[str, ...]

    def feeds(
        self, inputs: Mapping[str, np.ndarray], reals: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """What to run `program` on: the model's inputs, and for each tensor the float32 values of its integers."""
        return {**inputs, **{name + _GIVEN: reals[name] for name in self.tensors}}

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs of `program` that show `tensors`, in their order."""
        return tuple(name + _SEEN for name in self.tensors)


def take_apart(program: Any) -> Pieces:
    """Cut an ONNX program at every 8-bit activation that is dequantized again; the program is not changed."""
    import onnx

    cut = onnx.ModelProto()
    cut.CopyFrom(program)
    graph = cut.graph
    del graph.value_info[:]
    outputs = {output.name for output in graph.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    tensors, nodes = [], []
    for node in graph.node:
        nodes.append(node)
        name = node.output[0]
        dequantized = readers.get(name, [])
        if node.op_type != _QUANTIZE or not dequantized or name in outputs:
            continue
        if any(reader.op_type != _DEQUANTIZE for reader in dequantized):
            continue
        tensors.append(name)
        grid = list(node.input[1:])
        reals = [reader.output[0] for reader in dequantized]
        is_read_once = sum(len(readers.get(real, ())) + (real in outputs) for real in reals) == 1
        for suffix in (_SEEN,) if is_read_once else (_SEEN, _AGAIN):
            nodes.append(onnx.helper.make_node(_DEQUANTIZE, [name, *grid], [name + suffix]))
            graph.output.append(_float_value(name + suffix))
        graph.input.append(_float_value(name + _GIVEN))
        nodes.append(onnx.helper.make_node(_QUANTIZE, [name + _GIVEN, *grid], [name + "/integers"]))
        for reader in dequantized:
            reader.input[0] = name + "/integers"
    kept = [_copied(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return Pieces(cut, tuple(tensors))


def integers(reals: np.ndarray, grid: Grid) -> np.ndarray:
    """The integers that float values on a grid stand for, int32."""
    import numpy as np

    rank = reals.ndim
    steps = np.rint(reals.astype(np.float64) / grid.spread(grid.scale, rank).astype(np.float64))
    return np.asarray(steps.astype(np.int32) + grid.spread(grid.zero_point, rank))


def _float_value(name: str) -> Any:
    import onnx

    value = onnx.ValueInfoProto(name=name)
    value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return value


def _copied(node: Any) -> Any:
    import onnx

    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
