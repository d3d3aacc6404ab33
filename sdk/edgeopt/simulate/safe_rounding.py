# SPDX-License-Identifier: Apache-2.0
"""What a pass must keep to that chooses int8 weights one by one, so that they are safe on every x86 CPU.

Rounding each weight of a safe range to the nearest is safe by itself (`edgeopt.simulate.pairs`). A pass that rounds
for another aim (second moments, adaptive rounding) keeps pairs safe with three rules, which leave the same integers
to the native quantizer:
- the range of an output channel is `row_ranges`, its scale range / 127;
- what `pinned` says is fixed: the largest weight, or both of the worst pair, so that `row_ranges` of the rounded
  weights is again 127 times the scale;
- every other integer stays in the `room` that its partner leaves: no pair adds up to more than 127 on one side.

Rows are weights as (..., outputs, inputs), inputs flattened as ONNX has them; `partner` is `pairs.partners(...)`, or
`pairs.every_partner(...)` with a row for each way to pair, or -1 everywhere for a depthwise convolution, whose weights
are free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

GRID = 127
ALONE_SLACK = 1e-6
"""In steps of the grid: a largest weight this close to its end defines the range, float division notwithstanding."""


def row_ranges(rows: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """The magnitude that each output channel (..., outputs, 1) must hold; the same as `pairs.safe_ranges`."""
    import numpy as np

    sums = _one_sided(rows, partner).max(axis=-2)
    return np.asarray(np.maximum(np.abs(rows), sums).max(axis=-1, keepdims=True))


def pinned(target: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """For weights (outputs, inputs) in steps of their grid, the integers that are fixed, NaN where one is free."""
    import numpy as np

    pins = np.full(target.shape, np.nan)
    outputs = np.arange(len(target))
    largest = np.abs(target).argmax(axis=1)
    is_alone = np.abs(target[outputs, largest]) >= GRID - ALONE_SLACK
    pins[outputs[is_alone], largest[is_alone]] = np.rint(target[outputs, largest])[is_alone]
    ways = np.atleast_2d(partner)
    sums = (_one_sided(target, ways) * (ways >= 0)).reshape(len(target), -1)
    is_pair = ~is_alone & (sums.max(axis=1, initial=0) > 0)
    worst = sums.argmax(axis=1)[is_pair]
    first = worst % target.shape[1]
    rows, second = outputs[is_pair], ways.reshape(-1)[worst]
    # the side that the pair's sum is on; a weight of the other side counts as zero there
    side = np.where(target[rows, first].clip(min=0) + target[rows, second].clip(min=0) >= GRID - 1, 1, -1)
    pins[rows, first] = np.rint(target[rows, first])
    pins[rows, second] = side * GRID - pins[rows, first]
    return pins


def room(partner_integers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest integer that a weight may take beside its partner's, 0 for a partner not chosen yet."""
    return -GRID - partner_integers.clip(max=0), GRID - partner_integers.clip(min=0)


def room_among(integers: np.ndarray, column: int, partner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The `room` of one weight of each output among what was chosen so far, (outputs, inputs), beside all its partners."""
    import numpy as np

    beside = np.atleast_2d(partner)[:, column]
    low, high = room(np.where(beside >= 0, integers[:, beside], 0))
    return low.max(axis=1), high.min(axis=1)


def _one_sided(rows: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """Each weight and its partner, their positive parts added, or their negative ones: (..., outputs, orders, inputs)."""
    import numpy as np

    ways = np.atleast_2d(partner)
    other = np.where(ways >= 0, rows[..., ways], 0)
    alone = rows[..., None, :]
    up = alone.clip(min=0) + other.clip(min=0)
    down = alone.clip(max=0) + other.clip(max=0)
    return np.asarray(np.maximum(up, -down))
