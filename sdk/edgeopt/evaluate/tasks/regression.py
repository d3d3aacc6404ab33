# SPDX-License-Identifier: Apache-2.0
"""Regression: mean absolute error, root mean square error, R2.

The output has as many numbers a sample as the label. R2 is 1 - sum of squared errors / sum of squares around the mean of
the labels, per number of a label and then averaged, numbers whose labels never change left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.evaluate import expect
from edgeopt.evaluate.scores import Score, Scores, mean_score
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.outputs import Outputs

CONSTANT = 1e-20
"""Spread over sum of squares below which a label is one number and its spread is rounding (float64 squared: 5e-32)."""


@dataclass(frozen=True)
class Options:
    """`output` names the output to look at (default: the first)."""

    output: str = ""


def score(outputs: Outputs, baseline: Outputs, options: Options) -> Scores:
    """Tell MAE, RMSE and, where the labels differ, R2.

    Raises:
        RecipeError: Labels and output do not have the same number of values a sample, or a label is not finite.
    """
    import numpy as np

    del baseline
    labels = expect.labels(outputs, "target values")
    said = expect.output(outputs, options.output)
    if labels.dtype.kind not in "fiu" or math.prod(labels.shape[1:]) != math.prod(said.shape[1:]):
        raise RecipeError(
            f"regression expects as many numbers a label as the output has: labels are {labels.dtype} "
            f"{labels.shape}, the output is {said.shape}"
        )
    target = labels.reshape(len(labels), -1).astype(np.float64)
    if not np.isfinite(target).all():
        raise RecipeError("regression expects finite labels, found NaN or infinity")
    errors = said.reshape(len(said), -1).astype(np.float64) - target
    squares = (errors**2).mean(1)
    found = [
        mean_score("mae", np.abs(errors).mean(1), higher_is_better=False),
        Score(
            "rmse",
            math.sqrt(squares.mean()),
            len(squares),
            higher_is_better=False,
            weigh=lambda weights: math.sqrt(float(weights @ squares) / float(weights.sum())),
        ),
    ]
    every = np.ones(len(target))
    if (target != target[0]).any():
        found.append(
            Score("r2", _r2(errors, target, every), len(target), weigh=lambda w: _r2(errors, target, w))
        )
    return Scores(tuple(found))


def _r2(errors: np.ndarray, target: np.ndarray, weights: np.ndarray) -> float:
    mean = weights @ target / weights.sum()
    around = weights @ (target - mean) ** 2
    varies = around > CONSTANT * (weights @ target**2)
    if not varies.any():
        return math.nan
    return float((1 - (weights @ errors**2)[varies] / around[varies]).mean())
