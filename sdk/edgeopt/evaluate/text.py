# SPDX-License-Identifier: Apache-2.0
"""From rows of scores to text, and how far two texts are apart.

Rules:
- CTC greedy decoding: the best index of every frame, repetitions joined, blanks left out (Graves et al. 2006,
  section 3.2, best path decoding).
- Distance is Levenshtein's: insertions, deletions and replacements, one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def ctc_greedy(scores: np.ndarray, blank: int) -> tuple[int, ...]:
    """Decode (frames, symbols) into symbol indexes."""
    import numpy as np

    best = scores.argmax(1)
    first = np.concatenate(([True], best[1:] != best[:-1]))
    return tuple(int(index) for index in best[first & (best != blank)])


def edit_distance(one: Sequence[object], other: Sequence[object]) -> int:
    """The fewest edits that make `one` into `other`; a row at a time, so that it takes memory for one row."""
    import numpy as np

    known: dict[object, int] = {}
    left, right = (
        np.asarray([known.setdefault(item, len(known)) for item in items], np.int64) for items in (one, other)
    )
    steps = np.arange(len(right) + 1)
    row = steps.copy()
    for number, item in enumerate(left, start=1):
        # From above (deleted) and from the diagonal (kept or replaced); then insertions, which run along the row:
        # row[j] = min over i <= j of row[i] + (j - i).
        best = row + 1
        best[1:] = np.minimum(best[1:], row[:-1] + (right != item))
        best[0] = number
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])
