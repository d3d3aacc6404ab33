# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU: a QDQ operator computes in integers only where the runtime has a fusion for its type.

Any other operator between DequantizeLinear and QuantizeLinear runs in floats, which costs two conversions as well.
Operators on indices and shapes (no float tensor at all) are at home on the CPU.
Source: what ONNX Runtime 1.32 makes of each operator between Q and DQ, which the tests ask the installed one again.
Not checked: Relu and Clip vanish only where the zero point is the lowest integer, as asymmetric schemes make it.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeopt_profiles.operators import Operator
from edgeopt_profiles.support import Placement, sort_out

_COMPUTES = frozenset({
    "Conv", "MatMul", "Gemm", "Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid",
    "Softmax", "Concat", "Where"
})  # fmt: skip
_MOVES = frozenset({
    "MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Gather", "GatherElements",
    "Resize", "Split", "Slice", "Expand", "Tile", "ArgMax", "DepthToSpace", "Identity", "ReduceMax",
    "ReduceMin"
})  # fmt: skip
"""These give back values that they got (or order them), so the Q and DQ around them are dropped."""

_FUSES_INTO_PRODUCER = frozenset({"Relu", "Clip"})
"""These vanish between a producer and its Q; behind a DQ of their own they run in float."""

_CONVERTS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_FUSES = _COMPUTES | _MOVES | _CONVERTS


def place(operators: Sequence[Operator]) -> Placement:
    """Tell integer operators from those that run in float."""
    return sort_out(operators, _reason)


def _reason(operator: Operator) -> str:
    if operator.dtype == "int8":
        is_integer = (
            operator.type in _FUSES
            or operator.type.startswith("QLinear")
            or operator.type.endswith("Integer")
        )
        if is_integer:
            return ""
        return f"ONNX Runtime has no integer kernel for {operator.type}: it runs in float between DQ and Q"
    if "float" in operator.dtype:
        return f"it computes in {operator.dtype}: no quantized tensor on one of its sides"
    return ""
