# SPDX-License-Identifier: Apache-2.0
"""The integer reference of a QDQ ONNX model: every 8-bit tensor that ONNX Runtime gives, computed in numpy.

What it is for: seeing every quantized tensor (ONNX Runtime shows those that it has not fused away), and computing
what a CPU would give that is not here (`edgeopt.simulate.saturation`).

It is exact where ONNX Runtime's rounding is known (convolutions, matrix products, pooling by sums) and within one
integer step elsewhere; the test `tests/edgeopt/simulate/test_integer.py` compares whole networks with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.simulate import products
from edgeopt.simulate.layers import LAYER_TYPES, Layer, Node, is_depthwise, parse, weight_matrix
from edgeopt.simulate.operators import MOVES, table
from edgeopt.simulate.products import Adjust
from edgeopt.simulate.values import Grid, Quantized, Value, quantize, real
from edgeopt_wire.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

_PRODUCTS = {"Conv": products.conv, "MatMul": products.matmul, "Gemm": products.gemm}
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_DOMAINS = ("", "ai.onnx", "com.microsoft")
CLIP_SLACK = 1e-6
"""Relative: a Clip is absorbed by the rounding behind it if their ends differ by no more than float32 does."""


@dataclass(frozen=True)
class Prediction:
    """What one run gives: the model's outputs as it types them, and every activation that is quantized, by name."""

    outputs: Mapping[str, np.ndarray]
    integers: Mapping[str, np.ndarray]


class IntegerNet:
    """A QDQ model that can be run in numpy; constants are computed once, when it is made.

    `layers` are its integer layers in the order in which they run.
    """

    def __init__(self, program: Any) -> None:
        """Read an ONNX ModelProto; it is not changed.

        Raises:
            UnsupportedError: It has operators that are not simulated; all are named.
        """
        from onnx import numpy_helper

        graph = program.graph
        self._nodes = tuple(parse(node) for node in graph.node)
        self._operators = table(program.opset_import)
        _refuse_unknown(self._nodes, frozenset(self._operators))
        self._outputs = tuple(output.name for output in graph.output)
        self._constants: dict[str, Value] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer
        }
        self._inputs = tuple(entry.name for entry in graph.input if entry.name not in self._constants)
        self._layers: dict[str, Layer] = {}
        self._fold_constants()
        self._live = tuple(node for node in self._nodes if node.outputs[0] not in self._constants)
        self._uses = Counter(name for node in self._live for name in node.inputs)
        self._uses.update(self._outputs)
        self._layers = self._find_layers()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every Conv, MatMul and Gemm that runs in integers."""
        return tuple(self._layers.values())

    def run(self, inputs: Mapping[str, np.ndarray], *, adjust: Adjust | None = None) -> Prediction:
        """Run one input, any batch; `adjust` may change the sums of layers that x86 multiplies in pairs.

        Raises:
            RecipeError: An input of the model is missing.
        """
        missing = [name for name in self._inputs if name not in inputs]
        if missing:
            raise RecipeError(
                f"simulation: the model wants the inputs {', '.join(self._inputs)}; missing {missing}"
            )
        values: dict[str, Value] = dict(self._constants)
        values |= {name: inputs[name] for name in self._inputs}
        remaining = Counter(self._uses)
        integers: dict[str, np.ndarray] = {}
        for node in self._live:
            found = self._evaluate(node, values, adjust)
            values |= {name: value for name, value in zip(node.outputs, found, strict=True) if name}
            if node.op_type == _QUANTIZE:
                integers[node.outputs[0]] = values[node.outputs[0]]
            for name in node.inputs:
                remaining[name] -= 1
                if remaining[name] == 0 and name not in self._constants:
                    values.pop(name, None)
        return Prediction({name: real(values[name]) for name in self._outputs}, integers)

    def _evaluate(self, node: Node, values: Mapping[str, Value], adjust: Adjust | None) -> Sequence[Value]:
        given = [values[name] if name else None for name in node.inputs]
        if node.op_type == _QUANTIZE:
            return (quantize(given[0], _grid(node, given)),)
        if node.op_type == _DEQUANTIZE:
            import numpy as np

            return (Quantized(np.asarray(given[0]), _grid(node, given)),)
        if node.op_type in _PRODUCTS:
            layer = self._layers.get(node.outputs[0])
            return (_PRODUCTS[node.op_type](node, given, layer, adjust),)
        return self._operators[node.op_type](node, given)

    def _fold_constants(self) -> None:
        for node in self._nodes:
            if all(not name or name in self._constants for name in node.inputs):
                found = self._evaluate(node, self._constants, None)
                self._constants |= {name: v for name, v in zip(node.outputs, found, strict=True) if name}

    def _find_layers(self) -> dict[str, Layer]:
        producers = {name: node for node in self._live for name in node.outputs}
        consumers: dict[str, list[Node]] = {}
        for node in self._live:
            for name in node.inputs:
                consumers.setdefault(name, []).append(node)
        found: dict[str, Layer] = {}
        for node in self._live:
            weights = self._constants.get(node.inputs[1]) if node.op_type in LAYER_TYPES else None
            if not isinstance(weights, Quantized) or weights.integers.dtype.itemsize != 1:
                continue
            matrix = weight_matrix(node, weights.integers)
            source, source_grid = self._integer_source(node.inputs[0], producers)
            output, grid = self._rounded(node.outputs[0], consumers)
            if matrix is None or source_grid is None:
                continue
            is_unsigned = self._is_unsigned(source, source_grid, consumers)
            is_alike = grid is None or self._is_unsigned(output, grid, consumers) == is_unsigned
            if node.op_type != "Gemm" and not is_unsigned:
                continue
            if not is_alike or (node.op_type == "Conv" and grid is None):
                continue
            found[node.outputs[0]] = Layer(
                node.name,
                node.op_type,
                self._initializer(node.inputs[1]),
                matrix,
                output,
                grid,
                raw_offset=128 if source_grid.dtype.kind == "i" else 0,
                is_unsigned=is_unsigned,
                is_depthwise=is_depthwise(node, weights.integers.shape),
            )
        return found

    def _integer_source(self, name: str, producers: Mapping[str, Node]) -> tuple[str, Grid | None]:
        """The integer tensor that arrives here as an activation, and its grid; None if floats arrive."""
        node = producers.get(name)
        while node is not None and (node.op_type in MOVES or node.op_type in ("MaxPool", "Resize")):
            node = producers.get(node.inputs[0])
        if node is None or node.op_type != _DEQUANTIZE:
            return "", None
        grid = _grid(node, [self._constants.get(entry) for entry in node.inputs])
        return node.inputs[0], grid if grid.dtype.itemsize == 1 else None

    def _is_unsigned(self, name: str, grid: Grid, consumers: Mapping[str, Sequence[Node]]) -> bool:
        """Whether a tensor is uint8 on x86: int8 becomes so where it is read once."""
        if grid.dtype.kind == "u":
            return True
        readers = consumers.get(name, ())
        if name in self._outputs or name in self._inputs or len(readers) != 1:
            return False
        (reader,) = readers
        real_name = reader.outputs[0]
        uses = len(consumers.get(real_name, ())) + self._outputs.count(real_name)
        return reader.op_type == _DEQUANTIZE and uses == 1

    def _rounded(self, name: str, consumers: Mapping[str, Sequence[Node]]) -> tuple[str, Grid | None]:
        """The integer tensor that a sum is rounded to, through a Relu or Clip that the rounding absorbs."""
        passed: list[Node] = []
        while name not in self._outputs and len(consumers.get(name, ())) == 1:
            node = consumers[name][0]
            if node.op_type == _QUANTIZE:
                grid = _grid(node, [self._constants.get(entry) for entry in node.inputs])
                absorbed = all(self._is_absorbed(activation, grid) for activation in passed)
                return (node.outputs[0], grid) if absorbed else ("", None)
            if node.op_type not in ("Relu", "Clip"):
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
        ends = [self._constants.get(name) if name else None for name in (*node.inputs[1:], "", "")]
        slack = CLIP_SLACK * max(abs(low), abs(high))
        above = ends[0] is None or float(real(ends[0])) <= low + slack
        return above and (ends[1] is None or float(real(ends[1])) >= high - slack)

    def _initializer(self, name: str) -> str:
        for node in self._nodes:
            if name in node.outputs:
                return node.inputs[0]
        return name


def _grid(node: Node, given: Sequence[Value]) -> Grid:
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


def _refuse_unknown(nodes: Sequence[Node], known: frozenset[str]) -> None:
    known |= {_QUANTIZE, _DEQUANTIZE, *_PRODUCTS}
    unknown = sorted(
        {node.op_type for node in nodes if node.op_type not in known or node.proto.domain not in _DOMAINS}
    )
    if unknown:
        raise UnsupportedError(
            f"simulation: these operators are not simulated: {', '.join(unknown)}; "
            "leave the parts of the model that hold them out, or judge it by running it"
        )
