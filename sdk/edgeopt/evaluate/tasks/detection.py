# SPDX-License-Identifier: Apache-2.0
"""Detection: COCO's mean average precision over overlaps of 0.5 to 0.95, and at 0.5.

Rules:
- How the outputs are read, and the forms that there are, stands in `edgeopt.evaluate.detectors`.
- Labels have the parts boxes (left, top, right, bottom), classes and, where there are any, crowd; or are one array
  (samples, n, 5) of box and class. A row with class -1 is padding.
- Boxes of outputs and labels are in the same unit after `scale`: where a model says 0 to 1, `scale` is the side of its
  input in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.evaluate import expect
from edgeopt.evaluate.average_precision import Objects, match, mean_average_precision
from edgeopt.evaluate.detectors import Layout, read
from edgeopt.evaluate.scores import Score, Scores
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    from edgeopt.evaluate.outputs import Outputs

RESAMPLES = 300
"""A draw costs milliseconds a class, so there are fewer than elsewhere."""


@dataclass(frozen=True)
class Options(Layout):
    """How to read the outputs, see `detectors.Layout`; how many detections of a class count in an image.

    `label` is the part of the labels that holds the classes: "category_ids" for a model that says COCO's own numbers.
    """

    max_detections: int = 100
    label: str = "classes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_detections < 1:
            raise ValueError(f"max_detections must be positive, found {self.max_detections}")


def score(outputs: Outputs, baseline: Outputs, options: Options) -> Scores:
    """Tell mAP@[.5:.95] and mAP@.5.

    Raises:
        RecipeError: Outputs or labels are not such as the options say, or there is no object at all.
    """
    import numpy as np

    del baseline
    truth = _objects(outputs, options.label)
    if not any((~objects.crowd).any() for objects in truth):
        raise RecipeError("detection expects at least one object in the labels, found none")
    found = read(outputs, options)
    matches = match(found, truth, max_detections=options.max_detections)
    every = np.ones(len(truth))

    def tell(name: str, first: int | None) -> Score:
        return Score(
            name,
            mean_average_precision(matches, every, first),
            len(truth),
            is_share=True,
            weigh=lambda weights: mean_average_precision(matches, weights, first),
            resamples=RESAMPLES,
        )

    return Scores((tell("map", None), tell("map50", 1)))


def _objects(outputs: Outputs, label: str) -> tuple[Objects, ...]:
    import numpy as np

    labels = outputs.labels
    if labels is not None and labels.ndim == 3 and labels.shape[2] == 5 and labels.dtype.kind in "fiu":
        rows = [{"boxes": row[:, :4], "classes": row[:, 4]} for row in labels]
    else:
        parts = expect.parts(outputs, ("boxes", label), "boxes")
        rows = [{**row, "classes": row[label]} for row in parts]
    found = []
    for number, row in enumerate(rows):
        boxes = np.asarray(row["boxes"], np.float64)
        classes = np.ravel(row["classes"])
        crowd = np.ravel(row.get("crowd", np.zeros(len(classes)))).astype(bool)
        if boxes.size == 0:
            boxes = boxes.reshape(0, 4)
        if boxes.shape != (len(classes), 4) or crowd.shape != classes.shape:
            raise RecipeError(
                f"labels of sample {number}: expected boxes (n, 4) and n classes, found boxes {boxes.shape}, "
                f"{len(classes)} classes and {len(crowd)} crowd"
            )
        real = classes >= 0
        if (boxes[real, 2:] < boxes[real, :2]).any() or not np.isfinite(boxes[real]).all():
            raise RecipeError(
                f"labels of sample {number}: expected boxes as left, top, right, bottom, found one whose right or bottom "
                "lies before its left or top; COCO's x, y, width, height must be added up first"
            )
        found.append(Objects(boxes[real], classes[real].astype(np.int64), crowd[real]))
    return tuple(found)
