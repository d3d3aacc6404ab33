# SPDX-License-Identifier: Apache-2.0
"""Figures that compare a candidate with the baseline on the same samples, and what they can tell.

SQNR ranks first, because it is continuous; agreement second; top-1, which needs labels and many of them, third.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgeopt.evaluate import expect
from edgeopt.evaluate.fidelity import SQNR_CEILING_DB, measure_fidelity
from edgeopt.evaluate.outputs import Outputs
from edgeopt.evaluate.scores import mean_score
from edgeopt.evaluate.statistics import Verdict, judge, wilson
from edgeopt_wire.manifest import Quality

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SQNR_CEILING_DB", "Verdict", "compare", "judge_drop", "wilson"]


def compare(baseline: Outputs, candidate: Outputs) -> Quality:
    """Compare all outputs by SQNR, and the first output by arg-max where it looks like classes.

    A candidate that gives NaN or infinity where the baseline does not gets the lowest SQNR, `-SQNR_CEILING_DB`.
    Shares are rounded to 1e-4 and decibels to 0.1, so that a signed manifest does not depend on the last bit.

    Raises:
        RecipeError: The labels do not fit the classes, or the outputs do not fit each other.
    """
    fidelity = measure_fidelity(baseline, candidate)
    found = Quality(fidelity.samples, fidelity.agreement, fidelity.sqnr_db)
    labels = baseline.labels
    if fidelity.agreement is None or labels is None or not _are_classes(labels):
        return found
    first = next(iter(baseline.arrays))
    expect.check_classes(labels, baseline.arrays[first].shape[1])
    top1 = [
        round(float((outputs.arrays[first].argmax(1) == labels).mean()), 4)
        for outputs in (baseline, candidate)
    ]
    return replace(found, metric="top1", baseline_value=top1[0], value=top1[1])


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
