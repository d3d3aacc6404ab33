# SPDX-License-Identifier: Apache-2.0
"""Figures that compare a candidate with the baseline on the same samples, and what they can tell.

SQNR ranks first, because it is continuous; agreement second; top-1, which needs labels and many of them, third.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.evaluate.outputs import Outputs
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.manifest import Quality

if TYPE_CHECKING:
    import numpy as np

Z_95 = 1.959963984540054
Z_POWER_80 = 0.8416212335729143
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
    if baseline.labels is None:
        return Quality(found.samples, agreement, found.sqnr_db)
    _check_labels(baseline.labels, ours.shape[1])
    top1 = [round(float((guess == baseline.labels).mean()), 4) for guess in right]
    return Quality(found.samples, agreement, found.sqnr_db, "top1", top1[0], top1[1])


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n samples (Wilson 1927)."""
    centre = share + Z_95**2 / (2 * n)
    spread = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n))
    scale = 1 + Z_95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@dataclass(frozen=True)
class Verdict:
    """What the samples tell of a drop: `answer` is "met", "not met" or "cannot be told"."""

    answer: str
    drop: float
    low: float
    high: float
    samples: int
    samples_needed: int | None

    def sentence(self) -> str:
        """Say it with its figures, in points."""
        text = (
            f"measured drop {100 * self.drop:.2f} points, 95 % interval {100 * self.low:.2f} to {100 * self.high:.2f} "
            f"with {self.samples} samples: {self.answer}"
        )
        if self.answer == "cannot be told" and self.samples_needed:
            text += f"; about {self.samples_needed} samples would tell, if the true drop is none"
        return text


def judge_drop(baseline: Outputs, candidate: Outputs, max_drop: float) -> Verdict | None:
    """Judge a drop of top-1 on paired samples; None without labels.

    The interval is Wald's for paired proportions (Agresti, Categorical Data Analysis, section 11.1), with at least one
    flip assumed so that it is never empty. `samples_needed` is for 80 % power at 5 %,
    two-sided as the interval is, with the measured share of samples whose answer flips (Connor 1987).
    """
    first = next(iter(baseline.arrays))
    if baseline.labels is None or baseline.arrays[first].ndim != 2:
        return None
    was = baseline.arrays[first].argmax(1) == baseline.labels
    now = candidate.arrays[first].argmax(1) == baseline.labels
    n = len(was)
    lost, gained = int((was & ~now).sum()), int((~was & now).sum())
    drop = (lost - gained) / n
    flips = (lost + gained) / n
    spread = Z_95 * math.sqrt(max(flips - drop**2, 1 / n) / n)
    low, high = drop - spread, drop + spread
    answer = "met" if high <= max_drop else "not met" if low > max_drop else "cannot be told"
    needed = None
    if max_drop > 0:
        rate = max(flips, 1 / n)
        needed = math.ceil(((Z_95 + Z_POWER_80) ** 2) * rate / max_drop**2)
    return Verdict(answer, drop, low, high, n, needed)


def _check_labels(labels: np.ndarray, classes: int) -> None:
    if labels.min() < 0 or labels.max() >= classes:
        raise RecipeError(
            f"labels run from {labels.min()} to {labels.max()}, the model has the classes 0 to {classes - 1}; "
            "check labels.csv, or the order of the class folders"
        )
