# SPDX-License-Identifier: Apache-2.0
"""Layers of an ONNX graph whose channels take factors, with their weights in double precision until they are written back."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_products import attributes
from edgeopt.onnx_select import select

if TYPE_CHECKING:
    import numpy as np

LAYERS = ("Conv", "Gemm")
FLATTENS = frozenset({"Reshape", "Flatten", "Squeeze"})
"""What can take a picture of one pixel to a row, so that channels stay what they are."""


class Channels:
    """Who reads each tensor, and the weights that take factors; what `exclude` selects takes part in nothing."""

    def __init__(self, program: Any, exclude: tuple[str, ...]) -> None:
        import numpy as np
        import onnx

        self.graph = program.graph
        self.constants = {tensor.name: tensor for tensor in program.graph.initializer}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in program.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.edges = {value.name for value in (*program.graph.input, *program.graph.output)}
        self.shapes = {
            info.name: tuple(axis.dim_value for axis in info.type.tensor_type.shape.dim)
            for info in program.graph.value_info
        }
        left = select(program, exclude)
        self.layers = {
            id(node): node for node in program.graph.node if node.name not in left and self._is_layer(node)
        }
        self.values = {
            name: onnx.numpy_helper.to_array(self.constants[name]).astype(np.float64)
            for node in self.layers.values()
            for name in node.input[1:]
            if name
        }

    def _is_layer(self, node: Any) -> bool:
        import onnx

        if node.op_type not in LAYERS:
            return False
        constant = [name for name in node.input[1:] if name]
        for name in constant:
            tensor = self.constants.get(name)
            if tensor is None or len(self.readers[name]) > 1 or tensor.data_type != onnx.TensorProto.FLOAT:
                return False
        if node.op_type == "Conv":
            return True
        given = attributes(node)
        plain = given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0
        return plain and not given.get("transA", 0) and all(self._is_row(name) for name in constant[1:])

    def _is_row(self, name: str) -> bool:
        """Whether a Gemm's bias has a value an output; one that is broadcast cannot be scaled by channel."""
        return len(self.constants[name].dims) == 1 and self.constants[name].dims[0] > 1

    def flattens(self, node: Any, name: str) -> bool:
        """Whether a node makes a row of a picture of one pixel."""
        before, after = self.shapes.get(name, ()), self.shapes.get(node.output[0], ())
        return node.op_type in FLATTENS and len(before) == 4 and before[2:] == (1, 1) and before[:2] == after

    def bias(self, node: Any) -> str:
        """The name of a layer's bias, or nothing."""
        return str(node.input[2]) if len(node.input) > 2 else ""

    def scale_outputs(self, node: Any, factors: np.ndarray) -> None:
        """Multiply what a layer gives, channel by channel."""
        rows, groups = self.blocks(node)
        rows *= factors.reshape(groups, -1, 1, 1)
        if name := self.bias(node):
            self.values[name] *= factors

    def scale_inputs(self, node: Any, factors: np.ndarray) -> None:
        """Multiply what a layer makes of each channel that it reads."""
        rows, groups = self.blocks(node)
        rows *= factors.reshape(groups, 1, -1, 1)

    def blocks(self, node: Any) -> tuple[np.ndarray, int]:
        """A view of the weights as (groups, outputs of a group, inputs of a group, kernel), and the groups."""
        values = self.values[node.input[1]]
        given = attributes(node)
        if node.op_type == "Gemm":
            rows = values if given.get("transB", 0) else values.T
            return rows[None, :, :, None], 1
        groups = int(given.get("group", 1))
        return values.reshape(groups, values.shape[0] // groups, values.shape[1], -1), groups

    def write(self) -> None:
        """Write the weights back, in single precision."""
        import numpy as np
        import onnx

        for name, values in self.values.items():
            single = np.ascontiguousarray(values.astype(np.float32))
            self.constants[name].CopyFrom(onnx.numpy_helper.from_array(single, name))
