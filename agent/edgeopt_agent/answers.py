# SPDX-License-Identifier: Apache-2.0
"""A model's outputs become what a person asks for: the best classes, boxes, a vector. By `postprocess` of a manifest.

| kind | keys (and what they are where left out) | gives |
|---|---|---|
| classify | `output` (the first), `top` (5), `softmax` (false) | top_index, top_score, top_label, best first, each (rows, top) |
| detect | `boxes`, `scores` (output names), `format` (xyxy or cxcywh; xyxy), `score_threshold` (0.25), `iou_threshold` (0.45), `most` (100) | boxes (n, 4) as x1 y1 x2 y2, scores, classes, labels, best first |
| embed | `output` (the first), `pool` ("" or mean), `mask` (attention_mask), `normalize` (true) | embedding (rows, size) |

Scores of a detector are (1, boxes, classes), boxes (1, boxes, 4). Suppression is greedy, within a class: a box goes
when its intersection over union with a better one of its class is above the threshold (Neubeck & Van Gool 2006).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray]

OUTPUTS: Mapping[str, tuple[tuple[str, str, tuple[int, ...]], ...]] = {
    "classify": (
        ("top_index", "INT32", (-1, -1)),
        ("top_score", "FP32", (-1, -1)),
        ("top_label", "BYTES", (-1, -1)),
    ),
    "detect": (
        ("boxes", "FP32", (-1, 4)),
        ("scores", "FP32", (-1,)),
        ("classes", "INT32", (-1,)),
        ("labels", "BYTES", (-1,)),
    ),
    "embed": (("embedding", "FP32", (-1, -1)),),
}
_KEYS = {
    "classify": ("kind", "output", "top", "softmax"),
    "detect": ("kind", "boxes", "scores", "format", "score_threshold", "iou_threshold", "most"),
    "embed": ("kind", "output", "pool", "mask", "normalize"),
}
MAX_CANDIDATES = 5000
"""Boxes above the score threshold that suppression looks at; the best of them, where there are more."""


def finish(
    kind: str,
    keys: Mapping[str, Any],
    outputs: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    labels: Sequence[str] = (),
) -> Arrays:
    """Turn outputs (batch axis included) into those of the kind.

    Raises:
        RecipeError: Unknown kind or key, or an output that is not there or has another rank.
    """
    if kind not in OUTPUTS:
        raise RecipeError(f"postprocess: {seam.unknown('kind', kind, OUTPUTS)}")
    for key in keys:
        if key not in _KEYS[kind]:
            raise RecipeError(f"postprocess {kind}: {seam.unknown('key', key, _KEYS[kind])}")
    if kind == "detect":
        return _detect(keys, outputs, labels)
    array = _output(outputs, str(keys.get("output", next(iter(outputs)))))
    if kind == "classify":
        return classify(array, int(keys.get("top", 5)), labels, is_softmax=bool(keys.get("softmax", False)))
    mask = inputs.get(str(keys.get("mask", "attention_mask"))) if keys.get("pool") == "mean" else None
    return {"embedding": _embed(array, mask, keys)}


def classify(scores: np.ndarray, top: int, labels: Sequence[str], *, is_softmax: bool = False) -> Arrays:
    """The `top` highest of every row; scores are (rows, ...), flattened by row."""
    import numpy as np

    rows = scores.reshape(len(scores), -1).astype(np.float32)
    if is_softmax:
        powers = np.exp(rows - rows.max(axis=1, keepdims=True))
        rows = powers / powers.sum(axis=1, keepdims=True)
    best = np.argsort(-rows, axis=1, kind="stable")[:, : max(1, top)]
    return {
        "top_index": best.astype(np.int32),
        "top_score": np.take_along_axis(rows, best, axis=1),
        "top_label": _named(best, labels),
    }


def suppress(boxes: np.ndarray, scores: np.ndarray, iou_threshold: float) -> np.ndarray:
    """The rows of `boxes` (n, 4; x1 y1 x2 y2) that stay, best score first."""
    import numpy as np

    order = np.argsort(-scores, kind="stable")
    areas = np.clip(boxes[:, 2] - boxes[:, 0], 0, None) * np.clip(boxes[:, 3] - boxes[:, 1], 0, None)
    kept = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(best)
        corner = np.maximum(boxes[best, :2], boxes[rest, :2])
        sides = np.clip(np.minimum(boxes[best, 2:], boxes[rest, 2:]) - corner, 0, None)
        shared = sides[:, 0] * sides[:, 1]
        union = areas[best] + areas[rest] - shared
        order = rest[shared <= iou_threshold * np.maximum(union, np.float32(1e-12))]
    return np.asarray(kept, np.int64)


def _detect(keys: Mapping[str, Any], outputs: Mapping[str, np.ndarray], labels: Sequence[str]) -> Arrays:
    import numpy as np

    boxes = _output(outputs, str(keys.get("boxes", "boxes"))).astype(np.float32)
    scores = _output(outputs, str(keys.get("scores", "scores"))).astype(np.float32)
    if (
        boxes.ndim != 3
        or boxes.shape[::2] != (1, 4)
        or scores.ndim != 3
        or scores.shape[:2] != boxes.shape[:2]
    ):
        raise RecipeError(
            f"postprocess detect needs boxes (1, n, 4) and scores (1, n, classes), found {boxes.shape} and {scores.shape}"
        )
    corners = _corners(boxes[0], str(keys.get("format", "xyxy")))
    row, kind = np.nonzero(scores[0] > float(keys.get("score_threshold", 0.25)))
    found = scores[0][row, kind]
    best = np.argsort(-found, kind="stable")[:MAX_CANDIDATES]
    row, kind, found = row[best], kind[best], found[best]
    iou = float(keys.get("iou_threshold", 0.45))
    kept = [
        at[suppress(corners[row[at]], found[at], iou)]
        for at in (np.nonzero(kind == c)[0] for c in np.unique(kind))
    ]
    chosen = np.concatenate(kept) if kept else np.zeros(0, np.int64)
    chosen = chosen[np.argsort(-found[chosen], kind="stable")][: int(keys.get("most", 100))]
    return {
        "boxes": corners[row[chosen]],
        "scores": found[chosen],
        "classes": kind[chosen].astype(np.int32),
        "labels": _named(kind[chosen], labels),
    }


def _corners(boxes: np.ndarray, form: str) -> np.ndarray:
    import numpy as np

    if form == "xyxy":
        return boxes
    if form != "cxcywh":
        raise RecipeError(f"postprocess detect: {seam.unknown('format', form, ('xyxy', 'cxcywh'))}")
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)


def _embed(array: np.ndarray, mask: np.ndarray | None, keys: Mapping[str, Any]) -> np.ndarray:
    import numpy as np

    if keys.get("pool", "") not in ("", "mean"):
        raise RecipeError(f"postprocess embed: pool is mean or empty, found {keys['pool']!r}")
    vectors = array.astype(np.float32)
    if keys.get("pool") == "mean":
        if vectors.ndim != 3:
            raise RecipeError(
                f"postprocess embed: mean pooling needs (rows, tokens, size), found {vectors.shape}"
            )
        weights = np.ones(vectors.shape[:2], np.float32) if mask is None else mask.astype(np.float32)
        vectors = (vectors * weights[..., None]).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)[:, None]
    vectors = vectors.reshape(len(vectors), -1)
    if keys.get("normalize", True):
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def _named(classes: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    import numpy as np

    names = [labels[c].encode() if c < len(labels) else b"" for c in classes.reshape(-1).tolist()]
    found = np.empty(len(names), object)
    found[:] = names
    return found.reshape(classes.shape)


def _output(outputs: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in outputs:
        raise RecipeError(f"postprocess: {seam.unknown('output', name, outputs)}")
    return outputs[name]
