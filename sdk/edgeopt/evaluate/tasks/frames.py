# SPDX-License-Identifier: Apache-2.0
"""Yes or no for every frame, as voice activity detectors say it: does the candidate decide as the baseline, or as labels?

Rules:
- The output is one number a frame, (samples, frames) or a single one a sample; above `threshold` is yes.
- AUC looks at the numbers themselves: the probability that a frame of yes has a larger one than a frame of no, ties
  counting half (Mann and Whitney 1947; Hanley and McNeil 1982). Unlike the shares it cannot be saved by a threshold.
- Labels, where the data has them, are 0 or 1 a frame; frames padded with -1 do not count.
- Samples of a stream follow each other, so neighbours are alike and an interval over frames would be too narrow; the
  figure is a mean over samples, and a sample should be a recording.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.evaluate import expect
from edgeopt.evaluate.scores import Score, Scores, mean_score
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.outputs import Outputs


@dataclass(frozen=True)
class Options:
    """`output` names the output (default: the first); `threshold` is in its unit (0 for logits)."""

    output: str = ""
    threshold: float = 0.5


def score(outputs: Outputs, baseline: Outputs, options: Options) -> Scores:
    """Tell the share of right frames, F1 and AUC where there are labels, and the share decided as the baseline does.

    Raises:
        RecipeError: The labels are not 0 or 1 for every frame.
    """
    import numpy as np

    said = expect.rows(outputs, options.output, "one number a frame")
    decided = said > options.threshold
    expected = expect.rows(baseline, options.output, "one number a frame") > options.threshold
    same = mean_score("frame_agreement", _shares(decided == expected, np.ones_like(decided)), is_share=True)
    if outputs.labels is None and outputs.annotations is None:
        return Scores((same,))
    labels = expect.labels(outputs, "0 or 1 a frame")
    shown = labels.reshape(len(labels), -1)
    if shown.shape != decided.shape or not np.isin(shown, (-1, 0, 1)).all():
        raise RecipeError(
            f"frames expects 0 or 1 (or -1, not counted) for each of {decided.shape[1]} frames as labels, found "
            f"{labels.dtype} {labels.shape}"
        )
    right = _shares(decided == (shown == 1), shown >= 0)
    accuracy = mean_score("frame_accuracy", right, is_share=True)
    return Scores((accuracy, *_f1(decided, shown == 1, shown >= 0), *_auc(said, shown), same))


def _shares(right: np.ndarray, counted: np.ndarray) -> np.ndarray:
    import numpy as np

    frames = counted.sum(1)
    if not frames.all():
        raise RecipeError(f"sample {int(frames.argmin())} has no frame that counts; all are -1")
    shares = (right & counted).sum(1) / frames
    return shares.astype(bool) if bool((frames == 1).all()) else np.asarray(shares)


def _f1(decided: np.ndarray, truth: np.ndarray, counted: np.ndarray) -> tuple[Score, ...]:
    """F1 of yes: 2 TP / (2 TP + FP + FN) over all frames; nothing where no label is yes."""
    import numpy as np

    both = (decided & truth & counted).sum(1).astype(np.float64)
    either = ((decided | truth) & counted).sum(1).astype(np.float64)

    def weigh(weights: np.ndarray) -> float:
        found = float(weights @ both), float(weights @ either)
        return 2 * found[0] / (found[0] + found[1]) if found[1] else float("nan")

    if not (truth & counted).any():
        return ()
    return (Score("f1", weigh(np.ones(len(both))), len(both), is_share=True, weigh=weigh),)


def _auc(said: np.ndarray, shown: np.ndarray) -> tuple[Score, ...]:
    """AUC over all frames that count; nothing where they are all yes or all no, or a number is none."""
    import numpy as np

    sample, frame = np.nonzero(shown >= 0)
    values, truth = said[sample, frame].astype(np.float64), shown[sample, frame] == 1
    if truth.all() or not truth.any():
        return ()
    if not np.isfinite(values).all():
        return (Score("auc", float("nan"), len(said), is_share=True),)
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.concatenate(([True], np.diff(values[order]) > 0)))
    sample, truth = sample[order], truth[order]

    def weigh(weights: np.ndarray) -> float:
        often = weights[sample]
        yes, no = (np.add.reduceat(often * chosen, starts) for chosen in (truth, ~truth))
        pairs = float(yes.sum() * no.sum())
        return float(yes @ (np.cumsum(no) - no / 2)) / pairs if pairs else float("nan")

    return (Score("auc", weigh(np.ones(len(said))), len(said), is_share=True, weigh=weigh),)
