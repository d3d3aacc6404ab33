# SPDX-License-Identifier: Apache-2.0
"""Agreement with the float file, and KL from it, in the terms of each task."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.outputs import Outputs
    from edgeopt.evaluate.tasks import Task

AGREEMENTS = {
    "classification": "samples of which the same class is said",
    "frames": "frames that are decided alike",
    "embeddings": "the 10 nearest neighbours that are kept",
    "speech": "1 - character error rate against the float file's text",
}
"""What the column `agreement` is a share of, by task."""


def agreement(task: Task, outputs: Outputs, baseline: Outputs) -> float | None:
    """How often the file says what the float file says; None where the task has no such thing."""
    unlabelled = replace(outputs, labels=None)
    if task.name == "classification":
        ours, theirs = (next(iter(found.arrays.values())).argmax(1) for found in (outputs, baseline))
        return float((ours == theirs).mean())
    if task.name not in AGREEMENTS:
        return None
    scores = {score.name: score.value for score in task.score(unlabelled, baseline).scores}
    if task.name == "speech":
        return 1 - scores["cer_from_baseline"]
    return scores["frame_agreement"] if task.name == "frames" else scores["neighbours_at_10"]


def divergence(task: str, outputs: Outputs, baseline: Outputs) -> float | None:
    """Mean KL(float || file) in nats of the first output's distributions; None where it has none."""
    ours, theirs = (next(iter(found.arrays.values())) for found in (outputs, baseline))
    if task == "embeddings":
        return None
    from edgeopt.evaluate.fidelity import divergence as mean_divergence

    if task == "frames":
        return mean_divergence(_yes_and_no(theirs), _yes_and_no(ours))
    if ours.ndim == 2:
        return mean_divergence(theirs, ours)
    each = [mean_divergence(exact, other) for exact, other in zip(theirs, ours, strict=True)]
    return float(sum(each) / len(each))


def _yes_and_no(shares: np.ndarray) -> np.ndarray:
    import numpy as np

    yes = shares.reshape(-1, 1).astype(np.float64)
    return np.concatenate([yes, 1 - yes], 1)
