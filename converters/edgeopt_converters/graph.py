# SPDX-License-Identifier: Apache-2.0
"""Graph: the operators of a model, read-only, with shapes, multiply-accumulates, bytes and number formats.

What an operator's `dtype` says:
- "int8" where it computes in 8-bit integers: ONNX, where every float input comes from a DequantizeLinear and every
  output goes to a QuantizeLinear (a Relu or Clip between belongs to it); LiteRT, where its tensors are integers.
- Otherwise the type of its first output, such as "float32"; so what a quantizer left in float can be listed.

Constants are no operators; a pair of QuantizeLinear and DequantizeLinear that a runtime folds into its neighbours is
none either. Why not the runtimes' own profilers? They know what ran, not what was left out and how large it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt_converters.model import Model
from edgeopt_profiles.operators import Operator
from edgeopt_wire.errors import UnsupportedError


@dataclass(frozen=True)
class Graph:
    """Operators in the order in which they run."""

    operators: tuple[Operator, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference, batch included."""
        return sum(operator.macs for operator in self.operators)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constants, each counted once."""
        return sum(operator.weight_bytes for operator in self.operators)

    def floats(self) -> tuple[Operator, ...]:
        """The operators that compute in floating point."""
        return tuple(operator for operator in self.operators if "float" in operator.dtype)


def of(model: Model) -> Graph:
    """Read the operators of an ONNX, LiteRT or ExecuTorch model.

    Raises:
        UnsupportedError: Another format; convert the model first.
        RecipeError: The program is damaged.
    """
    if model.format == "onnx":
        from edgeopt_converters.onnx_graph import operators as onnx_operators

        return Graph(onnx_operators(model.program))
    if model.format == "litert":
        from edgeopt_converters.litert_graph import operators as litert_operators

        return Graph(litert_operators(model.program))
    if model.format == "executorch":
        from edgeopt_converters.executorch_graph import operators as executorch_operators

        return Graph(executorch_operators(model.program))
    raise UnsupportedError(
        f"{model.name}: expected an ONNX, LiteRT or ExecuTorch model to list its operators, found {model.format}; convert "
        "it first"
    )
