# SPDX-License-Identifier: Apache-2.0
"""Embeddings: does the candidate place the samples as the baseline does, and does it find what belongs together?

Rules:
- Similarity is the cosine. A sample is never its own neighbour; among equally similar ones the earlier wins.
- `neighbours_at_k` is the share of the baseline's k nearest that are among the candidate's k nearest, a mean of samples.
- With labels `recall_at_k` is the share of samples with at least one of the k nearest of the same label (Jegou et al.
  2011, section V; Musgrave et al. 2020 call recall at 1 precision at 1). Samples whose label stands alone are left out.
- `pooling` makes one vector of (samples, tokens, width): "first" token, or "mean" over the tokens that the label part
  `mask` marks (all where there is none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.evaluate import expect
from edgeopt.evaluate.scores import Score, Scores, mean_score
from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.outputs import Outputs

POOLINGS = ("none", "first", "mean")
_CHUNK = 256
"""Samples whose similarities to all others are held at once."""


@dataclass(frozen=True)
class Options:
    """`output` names the output (default: the first), `k` is the number of neighbours."""

    output: str = ""
    k: int = 10
    pooling: str = "none"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, found {self.k}")
        if self.pooling not in POOLINGS:
            raise RecipeError(seam.unknown("pooling", self.pooling, POOLINGS))


def score(outputs: Outputs, baseline: Outputs, options: Options) -> Scores:
    """Tell the mean cosine with the baseline, its neighbours kept, and retrieval recall first where there are labels.

    Raises:
        RecipeError: The output is no vector a sample, or the samples are too few for k neighbours.
    """
    import numpy as np

    if len(outputs) <= options.k:
        raise RecipeError(
            f"{options.k} neighbours need more than {options.k} samples, found {len(outputs)}; lower `k` in "
            "[evaluate.options], or give more data"
        )
    ours, theirs = _unit(outputs, options), _unit(baseline, options)
    near, expected = nearest(ours, options.k), nearest(theirs, options.k)
    kept = np.asarray([np.isin(a, b).mean() for a, b in zip(expected, near, strict=True)])
    found = [
        mean_score("cosine", (ours * theirs).sum(1)),
        mean_score(f"neighbours_at_{options.k}", kept, is_share=True),
    ]
    labels = _groups(outputs)
    if labels is not None:
        found.insert(0, _recall(near, labels, options.k))
    return Scores(tuple(found))


def nearest(vectors: np.ndarray, k: int) -> np.ndarray:
    """The k most similar others of every unit vector, (samples, k), the nearest first."""
    import numpy as np

    found = []
    for start in range(0, len(vectors), _CHUNK):
        similar = vectors[start : start + _CHUNK] @ vectors.T
        rows = np.arange(len(similar))
        similar[rows, rows + start] = -np.inf
        found.append(np.argsort(-similar, axis=1, kind="stable")[:, :k])
    return np.concatenate(found)


def _recall(near: np.ndarray, labels: np.ndarray, k: int) -> Score:
    import numpy as np

    _, group, counts = np.unique(labels, return_inverse=True, return_counts=True)
    findable = counts[group] > 1
    if not findable.any():
        raise RecipeError(
            "embeddings expects at least two samples with the same label; all labels stand alone"
        )
    hits = (labels[near] == labels[:, None]).any(1)
    return mean_score(f"recall_at_{k}", hits[findable])


def _groups(outputs: Outputs) -> np.ndarray | None:
    labels = outputs.labels
    if outputs.annotations is not None and "group" in outputs.annotations[0]:
        import numpy as np

        labels = np.asarray([int(np.ravel(row["group"])[0]) for row in outputs.annotations])
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iuU"):
        raise RecipeError(
            f"embeddings expects one class or text a sample as labels (samples of the same label belong together), "
            f"found {labels.dtype} {labels.shape}"
        )
    return labels


def _unit(outputs: Outputs, options: Options) -> np.ndarray:
    """The outputs as vectors of length 1, (samples, width), float64; a vector of zeros stays."""
    import numpy as np

    if options.pooling == "none":
        vectors = expect.rows(outputs, options.output, "one vector").astype(np.float64)
    else:
        vectors = _pooled(outputs, options)
    length = np.sqrt((vectors**2).sum(1, keepdims=True))
    return np.asarray(vectors / np.where(length > 0, length, 1))


def _pooled(outputs: Outputs, options: Options) -> np.ndarray:
    import numpy as np

    tokens = expect.output(outputs, options.output).astype(np.float64)
    if tokens.ndim != 3:
        raise RecipeError(
            f"pooling {options.pooling!r} expects an output (samples, tokens, width), found {tokens.shape}"
        )
    if options.pooling == "first":
        return np.asarray(tokens[:, 0])
    mask = np.ones(tokens.shape[:2])
    if outputs.annotations is not None and "mask" in outputs.annotations[0]:
        mask = np.stack([np.asarray(row["mask"], np.float64).reshape(-1) for row in outputs.annotations])
    if mask.shape != tokens.shape[:2] or not mask.sum(1).all():
        raise RecipeError(
            f"expected y.mask with 1 for at least one of {tokens.shape[1]} tokens a sample, found {mask.shape}"
        )
    return np.asarray((tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True))
