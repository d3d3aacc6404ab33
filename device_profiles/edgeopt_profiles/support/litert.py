# SPDX-License-Identifier: Apache-2.0
"""LiteRT on the CPU: an operator computes in the type of its tensors, so what stays float can be read off the file.

QUANTIZE and DEQUANTIZE stand at the edges between integers and floats and count as integer.
Source: LiteRT 8-bit quantization specification (ai.google.dev/edge/litert/models/quantization_spec).
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeopt_profiles.operators import Operator
from edgeopt_profiles.support import LeftOut, Placement


def place(operators: Sequence[Operator]) -> Placement:
    """Tell integer operators from those that stay in float."""
    return Placement(
        tuple(operator.name for operator in operators if "float" not in operator.dtype),
        tuple(
            LeftOut(
                operator.name, operator.type, f"its tensors are {operator.dtype}, so it computes in floats"
            )
            for operator in operators
            if "float" in operator.dtype
        ),
    )
