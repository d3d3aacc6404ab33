# SPDX-License-Identifier: Apache-2.0
"""What a detector found, read from its outputs.

The form "rows" is one output (samples, n, 6): a box, its score and its class. "split" is outputs named by `boxes`
(samples, n, 4), `scores` (samples, n) or (samples, n, classes), and where there are any `classes` (samples, n) and
`count` (samples,). "yolo" is one output (samples, 4 + classes, n) or (samples, n, 4 + classes), with `objectness` 5 +
classes, whose duplicates are suppressed here. Rows whose score is not above `min_score` are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.evaluate import expect
from edgeopt.evaluate.average_precision import Detections
from edgeopt.evaluate.boxes import FORMS, corners, suppress
from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.outputs import Outputs

YOLO_SUPPRESS, YOLO_MIN_SCORE = 0.7, 0.001
"""What the YOLO authors validate with (the defaults of Ultralytics' `val`)."""
MOST_CANDIDATES, MOST_KEPT = 30_000, 300
"""Suppression looks at so many of an image's best and keeps so many, as there; a net of noise would take minutes."""


@dataclass(frozen=True)
class Layout:
    """How to read a detector's outputs.

    `box` is one of `boxes.FORMS` (default: "cxcywh" for "yolo", else "xyxy"). `suppress` is the overlap above which a
    worse box of the same class is dropped (default: 0.7 for "yolo", else nothing is). `min_score` is 0.001 for "yolo",
    else 0. `class_offset` is added to the model's class indexes.
    """

    form: str = "rows"
    output: str = ""
    boxes: str = "boxes"
    scores: str = "scores"
    classes: str = ""
    count: str = ""
    box: str = ""
    scale: float = 1.0
    class_offset: int = 0
    objectness: bool = False
    suppress: float | None = None
    min_score: float | None = None

    def __post_init__(self) -> None:
        if self.form not in READERS:
            raise RecipeError(seam.unknown("form", self.form, READERS))
        if self.box and self.box not in FORMS:
            raise RecipeError(seam.unknown("box", self.box, FORMS))
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, found {self.scale}")


def read(outputs: Outputs, form: Layout) -> list[Detections]:
    """Read every image's detections, in the labels' unit, as corners.

    Raises:
        RecipeError: The outputs have not the shapes of this form.
    """
    return [_finish(found, form) for found in READERS[form.form](outputs, form)]


def _least(form: Layout) -> float:
    if form.min_score is not None:
        return form.min_score
    return YOLO_MIN_SCORE if form.form == "yolo" else 0.0


def _finish(found: Detections, form: Layout) -> Detections:
    """Drop padding and what is no number, turn boxes into corners, suppress duplicates."""
    import numpy as np

    yolo = form.form == "yolo"
    limit = form.suppress if form.suppress is not None else YOLO_SUPPRESS if yolo else None
    finite = np.isfinite(found.boxes).all(1) & np.isfinite(found.classes)
    kept = np.flatnonzero((found.scores > _least(form)) & finite)
    boxes = corners(found.boxes[kept], form.box or ("cxcywh" if yolo else "xyxy")) * form.scale
    scores = found.scores[kept].astype(np.float64)
    classes = np.rint(found.classes[kept]).astype(np.int64) + form.class_offset
    if limit is not None:
        best = np.argsort(-scores, kind="stable")[:MOST_CANDIDATES]
        chosen = best[suppress(boxes[best], scores[best], classes[best], limit, most=MOST_KEPT)]
        boxes, scores, classes = boxes[chosen], scores[chosen], classes[chosen]
    return Detections(boxes, scores, classes)


def _rows(outputs: Outputs, form: Layout) -> Iterator[Detections]:
    rows = expect.output(outputs, form.output)
    if rows.ndim == 4 and rows.shape[1] == 1:
        rows = rows[:, 0]
    if rows.ndim != 3 or rows.shape[2] != 6:
        raise RecipeError(
            f"form 'rows' expects one output (samples, n, 6) of box, score and class, found {rows.shape}; "
            "other forms are split and yolo"
        )
    for image in rows:
        yield Detections(image[:, :4], image[:, 4], image[:, 5])


def _split(outputs: Outputs, form: Layout) -> Iterator[Detections]:
    import numpy as np

    boxes, scores = (expect.output(outputs, name) for name in (form.boxes, form.scores))
    classes = expect.output(outputs, form.classes) if form.classes else None
    shapes = {form.boxes: boxes.shape, form.scores: scores.shape}
    if classes is not None:
        shapes[form.classes] = classes.shape
    each = boxes.shape[:2]
    flat = scores.shape == each and (classes is None or classes.shape == each)
    deep = scores.ndim == 3 and scores.shape[:2] == each and classes is None
    if boxes.ndim != 3 or boxes.shape[2] != 4 or not (flat or deep):
        raise RecipeError(
            "form 'split' expects boxes (samples, n, 4) with scores (samples, n, classes), or scores and classes "
            f"(samples, n) each, found {', '.join(f'{name} {shape}' for name, shape in shapes.items())}"
        )
    counts = np.full(len(boxes), each[1])
    if form.count:
        counts = np.rint(expect.rows(outputs, form.count, "one count")[:, 0]).astype(np.int64)
    for number, count in enumerate(counts):
        if deep:
            yield _pairs(boxes[number, :count], scores[number, :count], _least(form))
        else:
            named = np.zeros(count) if classes is None else classes[number, :count]
            yield Detections(boxes[number, :count], scores[number, :count], named)


def _yolo(outputs: Outputs, form: Layout) -> Iterator[Detections]:
    import numpy as np

    found = expect.output(outputs, form.output)
    first = 5 if form.objectness else 4
    if found.ndim != 3 or min(found.shape[1:]) <= first:
        raise RecipeError(
            f"form 'yolo' expects one output (samples, {first} + classes, n) or (samples, n, {first} + classes), "
            f"found {found.shape}"
        )
    if found.shape[1] < found.shape[2]:  # there are always more candidates than numbers of one
        found = found.swapaxes(1, 2)
    for image in found:
        scores = image[:, first:] * (image[:, 4:5] if form.objectness else np.float32(1))
        yield _pairs(image[:, :4], scores, _least(form))


def _pairs(boxes: np.ndarray, scores: np.ndarray, least: float) -> Detections:
    """Every box once for every class whose score is above `least`."""
    import numpy as np

    rows, classes = np.nonzero(scores > least)
    return Detections(boxes[rows], scores[rows, classes], classes)


READERS: Mapping[str, Callable[[Outputs, Layout], Iterator[Detections]]] = {
    "rows": _rows,
    "split": _split,
    "yolo": _yolo,
}
