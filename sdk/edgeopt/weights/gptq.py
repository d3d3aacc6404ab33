# SPDX-License-Identifier: Apache-2.0
"""Round column by column and spread each error over the columns that are still free.

Frantar et al. 2022, "GPTQ": the error of a column is weighted by the inverse of the layer's second moments (section
3.3: Cholesky factor, lazy batches). The most active columns go first (`act_order` of the authors' code); scales are
set beforehand from the float weights (their `static_groups`), so that a group's neighbours stay together in the file
whatever the order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.weights.grid import Grid, Grouped, grouped, packed
from edgeopt.weights.mse import best_range

if TYPE_CHECKING:
    import numpy as np

DAMPING = 0.01
"""The share of the mean diagonal that is added to it, as in the paper: inputs that never fire break no inverse."""

BATCH = 128
"""Columns whose errors reach the columns after the batch in one product (GPTQ, section 3.3, step 2)."""


def quantize(weight: np.ndarray, grid: Grid, moments: np.ndarray, damping: float = DAMPING) -> Grouped:
    """Round (outputs, inputs) given `moments`, (inputs, inputs): the sum of x x^T over the layer's inputs."""
    import numpy as np

    outputs, inputs = weight.shape
    blocks = grouped(weight, grid.group)
    scale, zero = best_range(blocks, grid, np.diag(moments))
    order = np.argsort(-np.diag(moments), kind="stable")
    factor = _spread(damped(moments, damping)[np.ix_(order, order)])
    work = weight[:, order].astype(np.float64)
    integers = np.repeat(zero[..., None], grid.group, -1).reshape(outputs, -1)  # filled-up columns are 0.0
    for start in range(0, inputs, BATCH):
        stop = min(start + BATCH, inputs)
        errors = np.zeros((outputs, stop - start))
        for column in range(start, stop):
            at = order[column]
            step, middle = scale[:, at // grid.group], zero[:, at // grid.group]
            integer = np.clip(np.rint(work[:, column] / step) + middle, 0, grid.highest)
            integers[:, at] = integer
            error = (work[:, column] - (integer - middle) * step) / factor[column, column]
            work[:, column + 1 : stop] -= np.outer(error, factor[column, column + 1 : stop])
            errors[:, column - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return packed(integers.reshape(blocks.shape), scale, zero, grid)


def damped(moments: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """Moments with a share of their mean diagonal added to it, so that they have an inverse."""
    import numpy as np

    result = moments.astype(np.float64)
    diagonal = np.diag_indices(len(result))
    result[diagonal] += damping * max(float(np.mean(result[diagonal])), 1e-12)
    return result


def _spread(moments: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the inverse: row j weighs how column j's error is spread over those after it."""
    import numpy as np

    factor: np.ndarray = np.linalg.cholesky(np.linalg.inv(moments)).T
    return factor
