# SPDX-License-Identifier: Apache-2.0
"""Half-quadratic quantization: fit the grid to most weights and let a sparse error carry the outliers; no samples.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": minimise an l_p norm (p < 1) of
W - dequantized(W) by splitting it into a sparse error E and the grid, and solving for both in turn. E is the
generalised soft threshold of the residual (their equation 3), and the grid parameter has a closed form.

Why not their float zero point alone: ONNX Runtime's integer kernels take integer zero points only, and a rounded one
hardly moves. The scale is fitted too, by least squares of what is left without E; where there is a zero point it is
fitted as they do and rounded. Of all iterations a group keeps the one with the smallest l_p error, the first included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.weights.grid import Grid, Grouped, full_range, grouped, packed, rounded, safe
from edgeopt.weights.mse import CHUNK

if TYPE_CHECKING:
    import numpy as np

NORM = 0.7  # l_p, beta and its growth, and the iterations are those of the authors' implementation
BETA = 10.0
GROWTH = 1.01
ITERATIONS = 20


def quantize(weight: np.ndarray, grid: Grid) -> Grouped:
    """Round (outputs, inputs) to a grid of least l_p error."""
    import numpy as np

    blocks = grouped(weight, grid.group)
    few = max(1, CHUNK // (blocks.shape[1] * blocks.shape[2]))
    parts = [_fitted(blocks[start : start + few], grid) for start in range(0, len(blocks), few)]
    scale = np.concatenate([part[0] for part in parts])
    zero = np.concatenate([part[1] for part in parts])
    return packed(rounded(blocks, scale, zero, grid), scale, zero, grid)


def _fitted(blocks: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The scale and zero point of the smallest l_p error, (outputs, groups) each."""
    import numpy as np

    scale, zero = full_range(blocks, grid)
    best_scale, best_zero = scale.copy(), zero.copy()
    least = np.full(scale.shape, np.inf)
    beta = BETA
    for _ in range(ITERATIONS):
        integers = rounded(blocks, scale, zero, grid)
        residual = blocks - (integers - zero[..., None]) * scale[..., None]
        error = (np.abs(residual) ** NORM).sum(-1)
        better = error < least
        least = np.where(better, error, least)
        best_scale, best_zero = np.where(better, scale, best_scale), np.where(better, zero, best_zero)
        kept = blocks - _shrunk(residual, beta)
        signed = integers - zero[..., None]
        squares = (signed**2).sum(-1)
        scale = safe(np.where(squares > 0, (signed * kept).sum(-1) / np.maximum(squares, 1), scale))
        if not grid.symmetric:
            zero = np.clip(np.rint((integers - kept / scale[..., None]).mean(-1)), 0, grid.highest)
        beta *= GROWTH
    return best_scale, best_zero


def _shrunk(residual: np.ndarray, beta: float) -> np.ndarray:
    """The generalised soft threshold of the l_p norm."""
    import numpy as np

    size = np.abs(residual)
    threshold = np.maximum(size, 1e-12) ** (NORM - 1) / beta
    result: np.ndarray = np.sign(residual) * np.maximum(size - threshold, 0.0)
    return result
