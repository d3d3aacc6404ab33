# SPDX-License-Identifier: Apache-2.0
"""Boxes: from the forms that detectors give to corners, overlap, and suppression of duplicates.

A box is (left, top, right, bottom), a continuous rectangle: no pixel is added to a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

FORMS: Mapping[str, str] = {
    "xyxy": "left, top, right, bottom",
    "yxyx": "top, left, bottom, right (TensorFlow)",
    "xywh": "left, top, width, height (COCO)",
    "cxcywh": "centre x, centre y, width, height (YOLO)",
}


def corners(boxes: np.ndarray, form: str) -> np.ndarray:
    """Turn (..., 4) of one of `FORMS` into left, top, right, bottom, float64."""
    import numpy as np

    exact = boxes.astype(np.float64)
    one, two = exact[..., :2], exact[..., 2:]
    if form == "yxyx":
        return exact[..., [1, 0, 3, 2]]
    if form == "xywh":
        return np.concatenate((one, one + two), -1)
    if form == "cxcywh":
        return np.concatenate((one - two / 2, one + two / 2), -1)
    return exact


def overlap(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """Intersection over union of every box with every other, (boxes, others); over the box itself for crowds."""
    import numpy as np

    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = np.maximum(high - low, 0).prod(-1)
    own, theirs = (np.maximum(found[:, 2:] - found[:, :2], 0).prod(-1) for found in (boxes, others))
    either = own[:, None] + theirs[None, :] - both
    if crowd is not None:
        either = np.where(crowd[None, :], own[:, None], either)
    return np.asarray(np.divide(both, either, out=np.zeros_like(both), where=either > 0))


def suppress(
    boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, limit: float, *, most: int | None = None
) -> np.ndarray:
    """Greedy non-maximum suppression within each class: indexes of what stays, the best first, `most` at most."""
    import numpy as np

    left = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while left.size and len(kept) != most:
        best = left[0]
        kept.append(int(best))
        rest = left[1:]
        covered = overlap(boxes[best : best + 1], boxes[rest])[0] > limit
        left = rest[~(covered & (classes[rest] == classes[best]))]
    return np.asarray(kept, np.int64)
