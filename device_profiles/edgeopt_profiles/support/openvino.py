# SPDX-License-Identifier: Apache-2.0
"""OpenVINO on an x86-64 CPU: which operators between Q and DQ compute in integers, or vanish into one that does.

Most kinds are merged into the convolution before them, with their Q and DQ. What is not listed runs in floats and costs
conversions.
Sources: docs.openvino.ai, "OpenVINO Low Precision Transformations" (what a dequantization is moved behind) and "CPU
Device" (quantized data types); what OpenVINO 2026.4 makes of each operator behind a convolution, which the tests ask the
installed one again.
Not checked: products of two activations and transposed convolutions run in integers where zero points are 0
(`edgeopt.coverage` reads what a file really gets).
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeopt_profiles.operators import Operator
from edgeopt_profiles.support import Placement, sort_out

_PRODUCTS = frozenset({"Conv", "MatMul", "Gemm"})
_FUSED = frozenset({
    "Abs", "Add", "AveragePool", "Clip", "Elu", "Erf", "GlobalAveragePool", "GlobalMaxPool", "HardSwish", "LeakyRelu",
    "MaxPool", "ReduceMax", "ReduceMean", "Relu", "Resize", "Sigmoid", "Sqrt", "Sub", "Tanh",
})  # fmt: skip
"""They read and write 8 bits, whatever a generated kernel computes in between."""

_MOVES = frozenset({
    "Concat", "DepthToSpace", "Flatten", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
"""They move what they get, so that a DequantizeLinear is moved behind them."""

_CONVERTS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_INTEGER = _PRODUCTS | _FUSED | _MOVES | _CONVERTS


def place(operators: Sequence[Operator]) -> Placement:
    """Tell integer operators from those that run in float."""
    return sort_out(operators, _reason)


def _reason(operator: Operator) -> str:
    if operator.dtype == "int8" and operator.type not in _INTEGER:
        return f"OpenVINO has no integer kernel for {operator.type}: it runs in float between DQ and Q"
    if "float" in operator.dtype:
        return f"it computes in {operator.dtype}: no quantized tensor on one of its sides"
    return ""
