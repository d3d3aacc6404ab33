# SPDX-License-Identifier: Apache-2.0
"""Grouped weights as the bytes that ONNX Runtime's block-wise operators read.

MatMulNBits and GatherBlockQuantized, com.microsoft version 1: two 4-bit integers a byte, the earlier one in the lower
half (docs/ContribOperators.md of onnxruntime 1.32; `tests/edgeopt/passes/test_quantize_weights.py` runs both against NumPy).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.weights.grid import Grouped

if TYPE_CHECKING:
    import numpy as np


def integers(weight: Grouped) -> np.ndarray:
    """(outputs, groups, bytes of a group) uint8."""
    return _halved(weight.integers) if weight.grid.bits == 4 else weight.integers


def zero_points(weight: Grouped) -> np.ndarray | None:
    """(outputs, bytes) uint8; None on a symmetric grid, whose zero the operators know."""
    import numpy as np

    if weight.grid.symmetric:
        return None
    if weight.grid.bits == 8:
        return weight.zero
    return _halved(np.pad(weight.zero, ((0, 0), (0, weight.zero.shape[1] % 2))))


def _halved(values: np.ndarray) -> np.ndarray:
    """Two neighbours of the last axis in one byte."""
    low, high = values[..., 0::2], values[..., 1::2]
    both: np.ndarray = low | (high << 4)
    return both
