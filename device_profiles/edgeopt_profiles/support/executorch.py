# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch on the CPU: what its XNNPACK delegate has in integers, and what stays float.

An operator of the delegate computes in the types of its tensors, so that what is float can be read off the file;
`INTEGER` says whether it had to be. Conversions at the edges and what only moves values count as integer.
Source: executorch 1.5, backends/xnnpack/partition/config (STATIC_QUANT), which the tests ask the installed one again.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeopt_profiles.operators import Operator
from edgeopt_profiles.support import Placement, sort_out

INTEGER = frozenset({
    "Conv2d", "DepthwiseConv2d", "ConvTranspose2d", "FullyConnected", "Add", "Subtract", "Multiply", "GlobalAvgPooling2d",
    "MaxPooling2d", "Clamp", "Concatenate2", "Concatenate3", "Concatenate4", "Concatenate5",
})  # fmt: skip
"""Operators that compute in int8 where their values are int8; the names are those of the delegate's schema."""

MOVES = frozenset({"StaticTranspose", "StaticReshape", "StaticSlice", "StaticConstantPad", "Copy"})
CONVERSION = "Convert"

_OWN_KERNEL = "aten::"


def place(operators: Sequence[Operator]) -> Placement:
    """Tell integer operators from those that stay in float."""
    return sort_out(operators, why_float)


def why_float(operator: Operator) -> str:
    """Say why an operator computes in floats, or nothing where it does not."""
    if "float" not in operator.dtype or operator.type in (*MOVES, CONVERSION):
        return ""
    if _OWN_KERNEL in operator.type:
        return (
            f"the XNNPACK delegate did not take it, and ExecuTorch's own kernel computes in {operator.dtype}"
        )
    if operator.type in INTEGER:
        return f"its tensors are {operator.dtype}, though the XNNPACK delegate has {operator.type} in int8"
    return f"the XNNPACK delegate has no {operator.type} in int8"
