# SPDX-License-Identifier: Apache-2.0
"""Classification: is the labelled class the first of the scores (top-1), or among the k highest (top-k)?

The output is (samples, classes), or (samples, classes, 1, 1); the labels are class indexes. Among equal scores the lower
index wins, as in numpy's arg-max, so that the figure does not depend on the order of a sort.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.evaluate import expect
from edgeopt.evaluate.scores import Scores, mean_score
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.outputs import Outputs


@dataclass(frozen=True)
class Options:
    """`output` names the output to look at (default: the first); `k` is the larger of the two ranks.

    `label_offset` is added to the labels: 1 for a model whose class 0 is the background, as in many of TensorFlow's.
    """

    output: str = ""
    k: int = 5
    label_offset: int = 0

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(f"k must be at least 2 (top-1 is always told), found {self.k}")


def score(outputs: Outputs, baseline: Outputs, options: Options) -> Scores:
    """Tell top-1, and top-k where the model has more than k classes.

    Raises:
        RecipeError: The output is no row of scores a sample, or the labels are no classes of it.
    """
    del baseline
    scores = expect.rows(outputs, options.output, "class scores")
    classes = scores.shape[1]
    if classes < 2:
        raise RecipeError(f"classification expects at least 2 classes, the output has {scores.shape}")
    labels = expect.classes(outputs, classes, offset=options.label_offset)
    ranks = rank(scores, labels)
    found = [mean_score("top1", ranks == 0)]
    if classes > options.k:
        found.append(mean_score(f"top{options.k}", ranks < options.k))
    return Scores(tuple(found))


def rank(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes stand before the labelled one, per sample; a score that is NaN stands last."""
    import numpy as np

    clean = np.where(np.isnan(scores), -np.inf, scores)
    mine = clean[np.arange(len(labels)), labels][:, None]
    before = np.arange(scores.shape[1])[None, :] < labels[:, None]
    found: np.ndarray = ((clean > mine) | ((clean == mine) & before)).sum(1)
    return found
