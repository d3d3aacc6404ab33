# SPDX-License-Identifier: Apache-2.0
"""Divide a value by a constant of each channel without a new operator: in what makes it, where that is exact.

A normalization's weight and bias, a Mul or Add with a constant, the outputs of a matrix product, and through Relu, which
scales with its input. Everything else, GELU and softmax among it, cannot take a scale (Lin et al. 2023, AWQ, section
3.2 folds into the same places).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgeopt_converters.onnx_subgraphs import graphs

if TYPE_CHECKING:
    import numpy as np

NORMALIZATIONS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")


class Folding:
    """The main graph of a program whose values are to be divided; `divide` changes its constants."""

    def __init__(self, program: Any) -> None:
        self._graph = program.graph
        self._makers = {name: node for node in program.graph.node for name in node.output if name}
        self._readers = {name: node for node in program.graph.node for name in node.input if name}
        self._uses = Counter(name for graph in graphs(program) for node in graph.node for name in node.input)
        self._uses.update(entry.name for graph in graphs(program) for entry in graph.output)
        self._widths = {
            entry.name: entry.type.tensor_type.shape.dim[-1].dim_value
            for entry in (*program.graph.value_info, *program.graph.input)
            if entry.type.tensor_type.shape.dim
        }
        self._constants = {tensor.name: tensor for tensor in program.graph.initializer}

    def root(self, value: str, width: int) -> str:
        """The value that `value` only repeats in another shape, with the same channels last; itself if there is none.

        ONNX Runtime's optimizer puts such a Reshape before each product that it makes a Gemm.
        """
        node = self._makers.get(value)
        while node is not None and node.op_type == "Reshape" and self._widths.get(node.input[0]) == width:
            value = node.input[0]
            node = self._makers.get(value)
        return value

    def only_for(self, root: str, values: Sequence[str]) -> int:
        """How many uses of `root` lead to the products that read `values`; 0 if any leads elsewhere too."""
        readers = Counter(values)
        first: set[str] = set()
        for value in readers:
            link, wanted = value, readers[value]
            while link != root:
                if self._uses[link] != wanted:
                    return 0
                first, link, wanted = first | {link}, self._makers[link].input[0], 1
        steps = {link for link in first if self._makers[link].input[0] == root}
        return len(steps) + readers[root]

    def places(self, value: str, readers: int) -> tuple[tuple[Any, int], ...]:
        """The (node, input) constants to divide so that `value` is divided; empty if that cannot be done.

        `readers` is how many of the value's uses take the scale back; there must be no other use.
        """
        node = self._makers.get(value)
        if node is None or readers == 0 or self._uses[value] != readers:
            return ()
        kind = node.op_type
        if kind in NORMALIZATIONS:
            return self._all_constant(node, range(1, len(node.input))) if len(node.output) == 1 else ()
        if kind == "Relu":
            return self.places(node.input[0], 1)
        if kind in ("Gemm", "MatMul"):
            return self._all_constant(node, range(1, len(node.input))) if self._is_plain(node) else ()
        if kind in ("Mul", "Add"):
            at = next((number for number in (0, 1) if self._is_vector(node.input[number])), None)
            if at is None:
                return ()
            here = ((node, at),)
            if kind == "Mul":
                return here
            before = self.places(node.input[1 - at], 1)
            return (*before, *here) if before else ()
        return ()

    def bias(self, node: Any, outputs: int) -> str:
        """The constant (outputs,) that is added to what a product gives, and to nothing else; empty if there is none."""
        if node.op_type == "Gemm":
            name = node.input[2] if len(node.input) > 2 else ""
        else:
            reader = self._readers.get(node.output[0])
            if reader is None or reader.op_type != "Add" or self._uses[node.output[0]] != 1:
                return ""
            name = reader.input[1 - list(reader.input).index(node.output[0])]
        fits = name in self._constants and self._is_vector(name) and self._uses[name] == 1
        return name if fits and self._constants[name].dims[-1:] == [outputs] else ""

    def divide(self, places: tuple[tuple[Any, int], ...], scale: np.ndarray) -> None:
        """Divide the constants of `places` by `scale`, (channels,); each gets a copy of its own."""
        import onnx

        for node, at in places:
            name = node.input[at]
            values = onnx.numpy_helper.to_array(self._constants[name])
            is_rows = node.op_type == "Gemm" and at == 1 and _flag(node, "transB")
            divided = (values / (scale[:, None] if is_rows else scale)).astype(values.dtype)
            if self._uses[name] == 1:
                self._constants[name].CopyFrom(onnx.numpy_helper.from_array(divided, name))
                continue
            self._uses[name] -= 1
            node.input[at] = copy = f"{name}_{node.output[0]}_scaled"
            tensor = self._graph.initializer.add()
            tensor.CopyFrom(onnx.numpy_helper.from_array(divided, copy))
            self._constants[copy] = tensor
            self._uses[copy] = 1

    def _all_constant(self, node: Any, numbers: range) -> tuple[tuple[Any, int], ...]:
        given = [number for number in numbers if node.input[number]]
        if not all(node.input[number] in self._constants for number in given):
            return ()
        return tuple((node, number) for number in given)

    def _is_vector(self, name: str) -> bool:
        """A float constant that is the same in all axes but the last."""
        tensor = self._constants.get(name)
        return (
            tensor is not None and tensor.data_type == 1 and all(size == 1 for size in list(tensor.dims)[:-1])
        )

    def _is_plain(self, node: Any) -> bool:
        weight = self._constants.get(node.input[1])
        has_bias = len(node.input) > 2 and bool(node.input[2])
        fits = not has_bias or self._is_vector(node.input[2])
        return weight is not None and len(weight.dims) == 2 and self._uses[node.input[1]] == 1 and fits


def _flag(node: Any, name: str) -> bool:
    return any(entry.name == name and entry.i for entry in node.attribute)
