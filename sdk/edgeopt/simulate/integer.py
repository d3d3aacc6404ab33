# SPDX-License-Identifier: Apache-2.0
"""The integer reference of a QDQ ONNX model: every 8-bit tensor that ONNX Runtime gives, computed in numpy.

What it is for: seeing every quantized tensor (ONNX Runtime shows those that it has not fused away), and computing
what a CPU would give that is not here (`edgeopt.simulate.saturation`).

It is exact where ONNX Runtime's rounding is known (convolutions, matrix products, pooling by sums) and within one
integer step of it elsewhere, if it gets the same inputs. Where a layer runs in float (`edgeopt.simulate.fusions`) a
few values in 100,000 round to the other side, and later layers see that. Models of `quantize_dynamic` run too; the test `tests/edgeopt/simulate/test_integer.py` compares whole networks with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.simulate import products
from edgeopt.simulate.fusions import find_layers, grid_of
from edgeopt.simulate.layers import Layer, Node, parse
from edgeopt.simulate.operators import table
from edgeopt.simulate.products import Adjust
from edgeopt.simulate.values import Grid, Quantized, Value, quantize, real
from edgeopt_wire.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

_PRODUCTS = {
    "Conv": products.conv,
    "MatMul": products.matmul,
    "Gemm": products.gemm,
    "MatMulInteger": products.matmul_integer,
}
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_DOMAINS = ("", "ai.onnx", "com.microsoft")


@dataclass(frozen=True)
class Prediction:
    """What one run gives: the model's outputs as it types them, and every activation that is quantized, by name."""

    outputs: Mapping[str, np.ndarray]
    integers: Mapping[str, np.ndarray]


class IntegerNet:
    """A QDQ model that can be run in numpy; constants are computed once, when it is made.

    `layers` are its integer layers in the order in which they run.
    """

    def __init__(self, program: Any, *, native_int8: bool = False) -> None:
        """Read an ONNX ModelProto; it is not changed.

        Args:
            program: The model.
            native_int8: Whether activations of int8 stay int8, as on ARM; on x86 they become uint8.

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
        self._layers = find_layers(
            self._live,
            self._constants,
            inputs=self._inputs,
            outputs=self._outputs,
            native_int8=native_int8,
        )

    def grid(self, name: str) -> Grid:
        """The grid of an activation that is quantized, by the name of its integers."""
        node = next(node for node in self._live if node.op_type == _QUANTIZE and node.outputs[0] == name)
        return grid_of(node, [self._constants.get(given) for given in node.inputs])

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
            return (quantize(given[0], grid_of(node, given)),)
        if node.op_type == _DEQUANTIZE:
            import numpy as np

            return (Quantized(np.asarray(given[0]), grid_of(node, given)),)
        if node.op_type in _PRODUCTS:
            layer = self._layers.get(node.outputs[0])
            return (_PRODUCTS[node.op_type](node, given, layer, adjust),)
        return self._operators[node.op_type](node, given)

    def _fold_constants(self) -> None:
        for node in self._nodes:
            if all(not name or name in self._constants for name in node.inputs):
                found = self._evaluate(node, self._constants, None)
                self._constants |= {name: v for name, v in zip(node.outputs, found, strict=True) if name}


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
