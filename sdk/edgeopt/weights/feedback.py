# SPDX-License-Identifier: Apache-2.0
"""Rounding with error feedback: each column's error is spread over the columns that are still free.

Frantar et al. 2022 ("GPTQ", sections 3 and 4), after Optimal Brain Surgeon: with the second moments H of a layer's
inputs, the inverse of H is taken once as its upper Cholesky factor, whose row j holds the weights with which column j's
error goes to the columns after it. Columns are taken by activity, the most active first: they find all others free.
Far columns are updated once a block, as one matrix product (section 4, lazy batch updates).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.simulate.safe_rounding import GRID, pinned, room_among

if TYPE_CHECKING:
    import numpy as np

BLOCK = 64


def round_with_feedback(
    target: np.ndarray, moments: np.ndarray, damping: float, partner: np.ndarray
) -> np.ndarray:
    """Round weights (groups, outputs, inputs), in steps of their grid, to integers -127 .. 127, all groups at once.

    `moments` are (groups, inputs, inputs); `damping` is the share of their mean diagonal that is added to it;
    `partner` says which weights share a pair (`edgeopt.simulate.safe_rounding`), -1 where none does.
    """
    import numpy as np

    if len(target) > 1 and (partner >= 0).any():  # pairs are of one group's columns, in an order of its own
        rows = zip(target, moments, strict=True)
        return np.concatenate(
            [round_with_feedback(own[None], part[None], damping, partner) for own, part in rows]
        )
    groups, outputs, inputs = target.shape
    diagonal = np.arange(inputs)
    order = np.argsort(-moments[:, diagonal, diagonal], axis=1, kind="stable")
    damped = np.take_along_axis(moments, order[:, :, None], 1)
    damped = np.take_along_axis(damped, order[:, None, :], 2)
    mean = damped[:, diagonal, diagonal].mean(axis=1, keepdims=True)
    damped[:, diagonal, diagonal] += damping * np.maximum(mean, 1e-12)
    factor = np.swapaxes(np.linalg.cholesky(np.linalg.inv(damped)), 1, 2)
    pins = pinned(target.reshape(groups * outputs, inputs), partner).reshape(target.shape)
    sorted_pins = np.take_along_axis(pins, order[:, None, :], 2)
    work = np.take_along_axis(target, order[:, None, :], 2)
    result = np.nan_to_num(sorted_pins)
    chosen = np.nan_to_num(pins[0])  # in the weights' own order, for pairs
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = np.zeros((groups, outputs, end - start))
        for column in range(start, end):
            ends = room_among(chosen, order[0, column], partner) if groups == 1 else (-GRID, GRID)
            rounded = np.clip(np.rint(work[..., column]), *ends)
            pin = sorted_pins[..., column]
            rounded = np.where(np.isnan(pin), rounded, pin)
            result[..., column] = rounded
            chosen[:, order[0, column]] = rounded[0]
            error = (work[..., column] - rounded) / factor[:, column, column, None]
            errors[..., column - start] = error
            work[..., column + 1 : end] -= error[..., None] * factor[:, None, column, column + 1 : end]
        work[..., end:] -= errors @ factor[:, start:end, end:]
    found: np.ndarray = np.empty_like(result)
    np.put_along_axis(found, np.broadcast_to(order[:, None, :], result.shape), result, 2)
    return found
