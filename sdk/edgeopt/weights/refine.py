# SPDX-License-Identifier: Apache-2.0
"""Go over a rounded weight again: the scales that suit its integers best, then each integer beside all others.

What GPTQ leaves: its scales were chosen before it moved weights, and a column that was rounded early never saw what
came after it. Both are mended in turn, for the same error of the layer's output:
- scales by least squares, all groups of an output together, since the error is quadratic in them;
- integers one column after another to the best that the rest allows (coordinate descent: Behdin et al. 2023, "QuantEase",
  section 3), columns of a batch updated together.

An output keeps each step only if its error fell. On MiniLM (groups of 64) the layers' errors fell by 9 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.weights.grid import SMALLEST_SCALE, Grouped, packed

if TYPE_CHECKING:
    import numpy as np

ROUNDS = 2
BATCH = 64
ENTRIES = 1 << 22
"""Of the normal equations that are solved at a time: 32 MiB."""


def refined(weight: np.ndarray, start: Grouped, moments: np.ndarray, rounds: int = ROUNDS) -> Grouped:
    """Better scales and integers for (outputs, inputs) `weight`; `moments` as GPTQ used them, positive definite."""
    import numpy as np

    wide = weight.astype(np.float64)
    best, least = start, _errors(wide, start, moments)
    for _ in range(rounds):
        for step in (_fitted, _descended):
            found = step(wide, best, moments)
            errors = _errors(wide, found, moments)
            better = errors < least
            least = np.where(better, errors, least)
            best = Grouped(
                start.grid,
                np.where(better[:, None, None], found.integers, best.integers),
                np.where(better[:, None], found.scale, best.scale),
                best.zero,
            )
    return best


def _errors(weight: np.ndarray, found: Grouped, moments: np.ndarray) -> np.ndarray:
    """The squared error of each output, (outputs,)."""
    import numpy as np

    error = weight - found.floats(weight.shape[1])
    result: np.ndarray = np.einsum("oi,oi->o", error @ moments, error)
    return result


def _fitted(weight: np.ndarray, found: Grouped, moments: np.ndarray) -> Grouped:
    """The scales of least error for the integers as they are; a sign never turns, and a dead group keeps its scale."""
    import numpy as np

    groups = found.scale.shape[1]
    few = max(1, ENTRIES // groups**2)
    parts = [
        _solved(weight[at : at + few], found.integers[at : at + few], found.zero[at : at + few], moments)
        for at in range(0, len(weight), few)
    ]
    scale = np.concatenate(parts)
    fits = np.isfinite(scale) & (np.abs(scale) > SMALLEST_SCALE) & (np.sign(scale) == np.sign(found.scale))
    return Grouped(
        found.grid, found.integers, np.where(fits, scale, found.scale).astype(np.float32), found.zero
    )


def _solved(weight: np.ndarray, integers: np.ndarray, zero: np.ndarray, moments: np.ndarray) -> np.ndarray:
    import numpy as np

    outputs, groups, group = integers.shape
    inputs = weight.shape[1]
    signed = integers.astype(np.float64) - zero[..., None]
    flat = signed.reshape(outputs, -1)[:, :inputs]
    wanted = weight @ moments
    normal = np.zeros((outputs, groups, groups))
    right = np.zeros((outputs, groups))
    for at in range(groups):
        part = slice(at * group, min((at + 1) * group, inputs))
        reached = np.pad((flat[:, part] @ moments[part]) * flat, ((0, 0), (0, groups * group - inputs)))
        normal[:, at] = reached.reshape(outputs, groups, group).sum(-1)
        right[:, at] = (flat[:, part] * wanted[:, part]).sum(1)
    floor = 1e-9 * np.trace(normal, axis1=1, axis2=2) / groups + 1e-30
    normal[:, range(groups), range(groups)] += floor[:, None]
    solved: np.ndarray = np.linalg.solve(normal, right[..., None])[..., 0]
    return solved


def _descended(weight: np.ndarray, found: Grouped, moments: np.ndarray) -> Grouped:
    """Each integer to the one of least error beside all others, once from the first column to the last."""
    import numpy as np

    outputs, inputs = weight.shape
    group, highest = found.grid.group, found.grid.highest
    scale, zero = (
        np.repeat(values, group, 1)[:, :inputs].astype(np.float64) for values in (found.scale, found.zero)
    )
    integers = found.integers.reshape(outputs, -1).astype(np.float64)
    values = (integers[:, :inputs] - zero) * scale
    pull = (weight - values) @ moments
    size = np.maximum(moments.diagonal(), 1e-30)
    for start in range(0, inputs, BATCH):
        stop = min(start + BATCH, inputs)
        moved = np.zeros((outputs, stop - start))
        for at in range(start, stop):
            best = values[:, at] + pull[:, at] / size[at]
            integers[:, at] = np.clip(np.rint(best / scale[:, at]) + zero[:, at], 0, highest)
            now = (integers[:, at] - zero[:, at]) * scale[:, at]
            moved[:, at - start] = now - values[:, at]
            values[:, at] = now
            pull[:, at:stop] -= moved[:, at - start, None] * moments[at, at:stop]
        pull[:, stop:] -= moved @ moments[start:stop, stop:]
    return packed(integers.reshape(found.integers.shape), found.scale, found.zero, found.grid)
