# SPDX-License-Identifier: Apache-2.0
"""A figure of merit over a data set, kept with what an interval and a paired test need.

Rules:
- A figure that is a mean of samples keeps the samples' values. One that is not (mAP, mIoU, RMSE, word error rate)
  keeps `weigh`: the figure for a data set in which sample i stands w[i] times, which is all that a bootstrap asks.
- Scores of baseline and candidate are comparable only for the same samples in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 1000
"""Draws of a bootstrap: enough for the 2.5 % and 97.5 % quantiles (Efron and Tibshirani 1993, section 14.2)."""


@dataclass(frozen=True)
class Score:
    """One figure: `values` (samples,) where it is their mean, else `weigh` from counts (samples,) to the figure.

    `is_share` says that every sample contributes between 0 and 1, so that a drop is said in points. `resamples` is
    lower where a draw is slow; 0 means that no interval can be had.
    """

    name: str
    value: float
    samples: int
    higher_is_better: bool = True
    is_share: bool = False
    values: np.ndarray | None = None
    weigh: Callable[[np.ndarray], float] | None = None
    resamples: int = RESAMPLES

    @property
    def is_right_or_wrong(self) -> bool:
        """Whether every sample is either right or wrong, as in top-1."""
        return self.values is not None and self.values.dtype.kind == "b"

    def worse_by(self, other: Score) -> float:
        """How much worse `other` is than this, positive when it is worse, in the figure's own unit."""
        return self.value - other.value if self.higher_is_better else other.value - self.value


def mean_score(
    name: str, values: np.ndarray, *, higher_is_better: bool = True, is_share: bool = False
) -> Score:
    """A score that is the mean of the samples' values; boolean values are right and wrong."""
    is_share = is_share or values.dtype.kind == "b"
    return Score(name, float(values.mean()), len(values), higher_is_better, is_share, values)


@dataclass(frozen=True)
class Scores:
    """What a task says of one model; the first score is the one that is judged unless a recipe names another."""

    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        if not self.scores:
            raise RecipeError("the task gave no score; give labels, or leave the task out of the recipe")

    def find(self, name: str = "") -> Score:
        """The score called `name`, the first without a name.

        Raises:
            RecipeError: The task has no such score.
        """
        for score in self.scores:
            if name in ("", score.name):
                return score
        raise RecipeError(seam.unknown("metric", name, [score.name for score in self.scores]))
