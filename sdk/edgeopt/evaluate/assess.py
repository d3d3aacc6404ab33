# SPDX-License-Identifier: Apache-2.0
"""What is to be known of a candidate: fidelity, every figure of the task with its interval, and a verdict on each.

Rules:
- The recipe's `[evaluate]` names the task. Without one, class labels mean classification, and other labels are not
  looked at: a figure that nobody asked for could be the wrong one.
- The first figure of the task is judged, or the one that `metric` names; the others are told with whether they moved.
- Refer to the baseline first: labels that do not fit are refused there, before any candidate is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgeopt.evaluate.fidelity import Fidelity, measure_fidelity
from edgeopt.evaluate.scores import Score, Scores
from edgeopt.evaluate.statistics import Interval, Verdict, interval, judge, unchanged
from edgeopt.evaluate.tasks import Task, load_task
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.manifest import Quality
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    from edgeopt.evaluate.outputs import Outputs

DIGITS = 4
"""Shares are rounded to so many places and other figures to so many more significant ones: a manifest is signed."""


@dataclass(frozen=True)
class Evaluation:
    """A recipe's `[evaluate]`: the task, the figure of it that is judged, and the task's own options."""

    task: str = ""
    metric: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task:
            load_task(self.task, self.options)
        elif self.metric or self.options:
            raise RecipeError(
                "[evaluate]: metric and options belong to a task; give `task`, as in task = 'detection'"
            )


@dataclass(frozen=True)
class Reference:
    """The baseline's outputs, its scores, and the task that they are of; both None where there is nothing to score."""

    outputs: Outputs
    task: Task | None
    scores: Scores | None
    metric: str


@dataclass(frozen=True)
class Figure:
    """One figure of the task, of baseline and candidate; `interval` is the candidate's, None where it cannot be had."""

    name: str
    baseline: float
    value: float
    higher_is_better: bool
    is_share: bool
    interval: Interval | None
    verdict: Verdict


@dataclass(frozen=True)
class Assessment:
    """All of it. `quality` is what a manifest keeps; `figures` has the judged one first and is empty without a task."""

    quality: Quality
    fidelity: Fidelity
    figures: tuple[Figure, ...]

    @property
    def verdict(self) -> Verdict | None:
        """The verdict on the judged figure."""
        return self.figures[0].verdict if self.figures else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the judged figure, rounded as `quality.value` is."""
        found = self.figures[0].interval if self.figures else None
        if found is None:
            return None
        is_share = self.figures[0].is_share
        low, high = _rounded(found.low, is_share), _rounded(found.high, is_share)
        return None if low is None or high is None else (low, high)


def refer(baseline: Outputs, evaluation: Evaluation) -> Reference:
    """Score the baseline.

    Raises:
        RecipeError: Its outputs or labels do not fit the task, or the task has no such figure.
    """
    task = load_task(evaluation.task, evaluation.options) if evaluation.task else None
    if task is None and _looks_like_classes(baseline):
        task = load_task("classification")
    if task is None:
        return Reference(baseline, None, None, "")
    scores = task.score(baseline, baseline)
    judged = scores.find(evaluation.metric)
    if not math.isfinite(judged.value):
        raise RecipeError(
            f"the unmodified model's {judged.name} is no number; check preprocessing and labels"
        )
    return Reference(baseline, task, scores, judged.name)


def assess(
    reference: Reference,
    candidate: Outputs,
    *,
    specs: tuple[TensorSpec, ...] = (),
    max_drop: float | None = None,
    relative: bool = False,
    seed: int = 0,
) -> Assessment:
    """Compare a candidate with the baseline on the same samples.

    `specs` are the candidate's own outputs, for clipping (`measure_fidelity`); `max_drop` and `relative` are for the
    judged figure (`judge`).

    Raises:
        RecipeError: The outputs do not fit each other.
    """
    fidelity = measure_fidelity(reference.outputs, candidate, specs)
    quality = Quality(fidelity.samples, fidelity.agreement, fidelity.sqnr_db)
    if reference.task is None or reference.scores is None:
        return Assessment(quality, fidelity, ())
    now = reference.task.score(candidate, reference.outputs)
    figures = []
    for was in reference.scores.scores:
        is_judged = was.name == reference.metric
        if not (is_judged or math.isfinite(was.value)):
            continue
        score = now.find(was.name)
        limit = max_drop if is_judged else None
        if fidelity.is_equal:
            verdict = unchanged(was, limit)
        else:
            verdict = judge(was, score, limit, relative=relative, seed=seed)
        figures.append(_figure(was, score, verdict, seed))
    figures.sort(key=lambda figure: figure.name != reference.metric)
    judged = figures[0]
    quality = replace(
        quality,
        metric=judged.name,
        baseline_value=_rounded(judged.baseline, judged.is_share),
        value=_rounded(judged.value, judged.is_share),
    )
    return Assessment(quality, fidelity, tuple(figures))


def _figure(was: Score, now: Score, verdict: Verdict, seed: int) -> Figure:
    return Figure(
        was.name,
        was.value,
        now.value,
        was.higher_is_better,
        was.is_share,
        interval(now, seed=seed),
        verdict,
    )


def _looks_like_classes(outputs: Outputs) -> bool:
    first = next(iter(outputs.arrays.values()))
    labels = outputs.labels
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
        return False
    return first.ndim == 2 and first.shape[1] >= 2


def _rounded(value: float, is_share: bool) -> float | None:
    """None for what is no number, which a manifest cannot say."""
    if not math.isfinite(value):
        return None
    return round(value, DIGITS) if is_share else float(f"{value:.{DIGITS + 2}g}")
