# SPDX-License-Identifier: Apache-2.0
"""Mean average precision as COCO measures it (Lin et al. 2014; the rules of its evaluation code).

Rules:
- Per image and class the best `max_detections` are matched, best first: each takes the free object that it overlaps
  most, if by at least the threshold. A crowd can be taken again and again, only when no other object fits, and what
  took it counts neither as right nor as wrong.
- Per class and threshold the detections of all images are sorted by score; precision at a recall is the highest at that
  recall or beyond; the average is over 101 recalls. The mean is over thresholds and the classes that have objects.
- Matches do not depend on other images, so they are found once; drawing images again only changes weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.evaluate.boxes import overlap

if TYPE_CHECKING:
    import numpy as np

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
RECALLS = 101
_ALMOST_ONE = 1 - 1e-10
_EPSILON = 2.220446049250313e-16
"""What COCO's code adds to the number of detections, so that none divides by zero."""


@dataclass(frozen=True)
class Detections:
    """What a model found in one image: corners (n, 4), scores (n,), classes (n,)."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


@dataclass(frozen=True)
class Objects:
    """What is in one image: corners (n, 4), classes (n,), and which are crowds (n,)."""

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray


@dataclass(frozen=True)
class ClassMatches:
    """All detections of one class, best first: their image, and per threshold right and wrong (thresholds, n).

    `objects` counts those of every image, crowds left out.
    """

    image: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    objects: np.ndarray


def match(
    found: Sequence[Detections],
    truth: Sequence[Objects],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    max_detections: int = 100,
) -> tuple[ClassMatches, ...]:
    """Match the detections of all images with the objects, for every class that has objects."""
    import numpy as np

    limits = np.minimum(np.asarray(thresholds), _ALMOST_ONE)
    wanted = np.unique(np.concatenate([objects.classes[~objects.crowd] for objects in truth]))
    rows: dict[int, list[_Row]] = {int(number): [] for number in wanted}
    objects = {number: np.zeros(len(truth)) for number in rows}
    for image, (seen, shown) in enumerate(zip(found, truth, strict=True)):
        for number in np.intersect1d(wanted, np.concatenate((seen.classes, shown.classes))):
            mine = shown.classes == number
            objects[int(number)][image] = (mine & ~shown.crowd).sum()
            best = _best(seen, int(number), max_detections)
            overlaps = overlap(seen.boxes[best], shown.boxes[mine], shown.crowd[mine])
            fate = _fate(overlaps, shown.crowd[mine], limits)
            rows[int(number)].append(_Row(image, seen.scores[best], fate))
    return tuple(_join(rows[number], objects[number]) for number in rows)


def mean_average_precision(
    matches: Sequence[ClassMatches], weights: np.ndarray, first: int | None = None
) -> float:
    """The mean over classes and the `first` thresholds (default: all); image i stands `weights[i]` times.

    NaN where no object is left.
    """
    import numpy as np

    found = [_average_precision(one, weights, first) for one in matches if float(weights @ one.objects) > 0]
    return float(np.mean(found)) if found else float("nan")


_WRONG, _RIGHT, _IGNORED = 0, 1, 2


@dataclass(frozen=True)
class _Row:
    """One class in one image: scores, best first, and what became of each at every threshold."""

    image: int
    scores: np.ndarray
    fate: np.ndarray


def _join(rows: Sequence[_Row], objects: np.ndarray) -> ClassMatches:
    import numpy as np

    order = np.argsort(-np.concatenate([row.scores for row in rows]), kind="stable")
    images = np.concatenate([np.full(len(row.scores), row.image) for row in rows])
    fate = np.concatenate([row.fate for row in rows], 1)[:, order]
    return ClassMatches(images[order], fate == _RIGHT, fate == _WRONG, objects)


def _best(seen: Detections, number: int, most: int) -> np.ndarray:
    import numpy as np

    places = np.flatnonzero(seen.classes == number)
    return places[np.argsort(-seen.scores[places], kind="stable")[:most]]


def _fate(overlaps: np.ndarray, crowd: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """What becomes of every detection at every threshold, (thresholds, detections), from (detections, objects)."""
    import numpy as np

    detections, objects = overlaps.shape
    found = np.full((len(limits), detections), _WRONG)
    if objects == 0:
        return found
    free = np.ones((len(limits), objects), bool)
    every = np.arange(len(limits))
    for place, row in enumerate(overlaps):
        fits = (row[None, :] >= limits[:, None]) & (free | crowd[None, :])
        # An object of the wanted overlap goes before any crowd; among equals the last wins, as in COCO's code.
        worth = np.where(fits, row[None, :] + 2.0 * ~crowd[None, :], -1.0)
        picked = objects - 1 - worth[:, ::-1].argmax(1)
        took = fits[every, picked]
        free[every[took], picked[took]] = False
        found[took, place] = np.where(crowd[picked[took]], _IGNORED, _RIGHT)
    return found


def _average_precision(one: ClassMatches, weights: np.ndarray, first: int | None) -> float:
    import numpy as np

    often = weights[one.image]
    right = np.cumsum(one.right[:first] * often, axis=1)
    wrong = np.cumsum(one.wrong[:first] * often, axis=1)
    recall = right / float(weights @ one.objects)
    precision = right / (right + wrong + _EPSILON)
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    padded = np.concatenate((highest, np.zeros((len(highest), 1))), axis=1)
    wanted = np.linspace(0, 1, RECALLS)
    places = [np.searchsorted(row, wanted, side="left") for row in recall]
    return float(np.mean([row[place] for row, place in zip(padded, places, strict=True)]))
