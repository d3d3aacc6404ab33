# SPDX-License-Identifier: Apache-2.0
"""Products that ONNX Runtime fuses though the scales of their weights lie along another axis than its kernels take.

Its integer kernels take one scale for an output channel. A DequantizeLinear of weights along another axis of the same
length is fused all the same, and the results are wrong: measured with version 1.32 on square weights, Conv along axis 1,
MatMul along 0, Gemm along 0 (1 with transB), with errors as large as the outputs
(`tests/edgeopt/coverage/test_causes.py` repeats it).
"""

from __future__ import annotations

from math import prod
from typing import Any

from edgeopt.coverage._cuts import DEQUANTIZE, Scope

_DEFAULT_AXIS = 1


def has_scales_along_inputs(scope: Scope, index: int) -> bool:
    """Whether an operator of the file has weights with a scale for each of something else than its outputs."""
    node = scope.nodes[index]
    dequantizer = scope.writer(node.input[1]) if len(node.input) > 1 else None
    if dequantizer is None or dequantizer.op_type != DEQUANTIZE:
        return False
    scale = scope.constants.get(dequantizer.input[1])
    weights = scope.constants.get(dequantizer.input[0])
    if scale is None or weights is None or prod(scale.dims) < 2 or _attribute(dequantizer, "block_size", 0):
        return False
    rank = len(weights.dims)
    expected = _output_axis(node, rank)
    return expected is not None and _attribute(dequantizer, "axis", _DEFAULT_AXIS) % rank != expected


def _output_axis(node: Any, rank: int) -> int | None:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if _attribute(node, "transB", 0) else 1
    return rank - 1 if node.op_type == "MatMul" else None


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)
