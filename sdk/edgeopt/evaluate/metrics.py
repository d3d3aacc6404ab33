# SPDX-License-Identifier: Apache-2.0
"""Figures that compare a candidate with the baseline on the same samples, and what they can tell.

SQNR ranks first, because it is continuous; agreement second; top-1, which needs labels and many of them, third.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeopt.evaluate import expect
from edgeopt.evaluate.outputs import Outputs
from edgeopt.evaluate.scores import mean_score
from edgeopt.evaluate.statistics import Verdict, judge, wilson
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.manifest import Quality

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SQNR_CEILING_DB", "Verdict", "compare", "judge_drop", "wilson"]

SQNR_CEILING_DB = 200.0
"""Identical outputs have no noise; they are reported as this, above what float32 can tell."""


def compare(baseline: Outputs, candidate: Outputs) -> Quality:
    """Compare all outputs by SQNR, and the first output by arg-max where it looks like classes.

    A candidate that gives NaN or infinity where the baseline does not gets the lowest SQNR, `-SQNR_CEILING_DB`.
    Shares are rounded to 1e-4 and decibels to 0.1, so that a signed manifest does not depend on the last bit.

    Raises:
        RecipeError: The labels do not fit the classes.
    """
    import numpy as np

    signal = noise = 0.0
    for name, reference in baseline.arrays.items():
        exact = reference.astype(np.float64)
        if not np.isfinite(exact).all():
            raise RecipeError(
                f"the unmodified model gives NaN or infinity in output {name!r}; check preprocessing and data"
            )
        signal += float((exact**2).sum())
        noise += float(((exact - candidate.arrays[name].astype(np.float64)) ** 2).sum())
    if noise == 0:
        db = SQNR_CEILING_DB
    elif signal > 0 and math.isfinite(noise):
        db = 10 * math.log10(signal / noise)
    else:
        db = -SQNR_CEILING_DB
    first = next(iter(baseline.arrays))
    ours, theirs = baseline.arrays[first], candidate.arrays[first]
    found = Quality(samples=len(baseline), sqnr_db=round(min(db, SQNR_CEILING_DB), 1))
    if ours.ndim != 2 or ours.shape[1] < 2:
        return found
    right = ours.argmax(1), theirs.argmax(1)
    agreement = round(float((right[0] == right[1]).mean()), 4)
    if baseline.labels is None or not _are_classes(baseline.labels):
        return Quality(found.samples, agreement, found.sqnr_db)
    expect.check_classes(baseline.labels, ours.shape[1])
    top1 = [round(float((guess == baseline.labels).mean()), 4) for guess in right]
    return Quality(found.samples, agreement, found.sqnr_db, "top1", top1[0], top1[1])


def judge_drop(baseline: Outputs, candidate: Outputs, max_drop: float) -> Verdict | None:
    """Judge a drop of top-1 on paired samples; None without class labels. See `statistics.judge`."""
    first = next(iter(baseline.arrays))
    labels = baseline.labels
    scores = baseline.arrays[first]
    if labels is None or not _are_classes(labels) or scores.ndim != 2 or scores.shape[1] < 2:
        return None
    was, now = (
        mean_score("top1", outputs.arrays[first].argmax(1) == labels) for outputs in (baseline, candidate)
    )
    return judge(was, now, max_drop)


def _are_classes(labels: np.ndarray) -> bool:
    return labels.ndim == 1 and labels.dtype.kind in "iu"
