# SPDX-License-Identifier: Apache-2.0
"""Clip every group where the squared error is least: the few largest weights give way to all the others.

A search over shrunken ranges, group by group (the "MSE" range setting of Nagel et al. 2021, "A White Paper on Neural
Network Quantization", section 3.1). `importance` weighs the error of each input, by how active that input is: the
diagonal of the layer's second moments, to which the error of the layer's output is proportional if inputs are
uncorrelated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.weights.grid import Grid, Grouped, full_range, grouped, packed, rounded, safe, span

if TYPE_CHECKING:
    import numpy as np

SHRINKS = tuple(1 - 0.04 * step for step in range(13))
"""From the full range to half of it; at 4 bits the best of a normal distribution is near 0.85."""

CHUNK = 1 << 17
"""Weights at a time: a search over what fits in a core's cache is several times faster."""


def quantize(weight: np.ndarray, grid: Grid, importance: np.ndarray | None = None) -> Grouped:
    """Round (outputs, inputs) to the best of the shrunken grids; `importance` is (inputs,), equal if None."""
    blocks = grouped(weight, grid.group)
    scale, zero = best_range(blocks, grid, importance)
    return packed(rounded(blocks, scale, zero, grid), scale, zero, grid)


def best_range(
    blocks: np.ndarray, grid: Grid, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The scale and zero point of least error of every group, (outputs, groups) each."""
    import numpy as np

    weights = np.ones(1, np.float32) if importance is None else grouped(importance[None], grid.group)
    few = max(1, CHUNK // (blocks.shape[1] * blocks.shape[2]))
    parts = [_best(blocks[start : start + few], grid, weights) for start in range(0, len(blocks), few)]
    return np.concatenate([scale for scale, _ in parts]), np.concatenate([zero for _, zero in parts])


def _best(blocks: np.ndarray, grid: Grid, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    scale, zero = full_range(blocks, grid)
    least = np.full(scale.shape, np.inf)
    best_scale, best_zero = scale.copy(), zero.copy()
    for shrink in SHRINKS:
        for tried_scale, tried_zero in _tries(blocks, scale, zero, shrink, grid):
            integers = rounded(blocks, tried_scale, tried_zero, grid)
            back = (integers - tried_zero[..., None]) * tried_scale[..., None]
            error = (weights * (blocks - back) ** 2).sum(-1)
            better = error < least
            least = np.where(better, error, least)
            best_scale = np.where(better, tried_scale, best_scale)
            best_zero = np.where(better, tried_zero, best_zero)
    return best_scale, best_zero


def _tries(
    blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray, shrink: float, grid: Grid
) -> list[tuple[np.ndarray, np.ndarray]]:
    import numpy as np

    if grid.symmetric:  # the longer side of the grid may serve either sign
        return [(safe(scale * shrink), zero), (safe(-scale * shrink), zero)]
    low, high = np.minimum(blocks.min(-1), 0.0), np.maximum(blocks.max(-1), 0.0)
    return [
        span(low * shrink, high * shrink, grid),
        span(low * shrink, high, grid),
        span(low, high * shrink, grid),
    ]
