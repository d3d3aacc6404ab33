# SPDX-License-Identifier: Apache-2.0
"""Segmentation: mean intersection over union of the classes (mIoU), and the share of right pixels.

Rules:
- The output is class scores (samples, classes, height, width) or (samples, height, width, classes), or class indexes
  (samples, height, width). One score a pixel is two classes and needs `threshold`.
- Labels are class indexes (samples, height, width), the whole multiple of the output's size that the masks have: each
  score then stands for a square of pixels. `ignore` marks pixels that do not count.
- IoU of a class is over the pixels of the whole data set: TP / (TP + FP + FN) (Everingham et al. 2010, section 4.1.3:
  the Pascal VOC measure). The mean is over the classes that the labels or the answers hold.
"""

from __future__ import annotations

import math
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
    """`output` names the output (default: the first); `classes` is needed where the output holds class indexes."""

    output: str = ""
    classes: int = 0
    ignore: int = 255
    threshold: float | None = None


def score(outputs: Outputs, baseline: Outputs, options: Options) -> Scores:
    """Tell mIoU and the mean over samples of the share of right pixels.

    Raises:
        RecipeError: The labels are no masks of the output's size, or hold classes that the model does not have.
    """
    import numpy as np

    del baseline
    labels = expect.labels(outputs, "masks of class indexes")
    if labels.ndim != 3 or labels.dtype.kind not in "iu":
        raise RecipeError(
            f"segmentation expects masks (samples, height, width) of class indexes as labels, found {labels.dtype} "
            f"{labels.shape}"
        )
    said = expect.output(outputs, options.output)
    axis, factor, classes = _layout(said, labels.shape[1:], options)
    tables = np.zeros((len(labels), classes, classes), np.int64)
    for number, (answer, mask) in enumerate(zip(said, labels, strict=True)):
        counted = mask != options.ignore
        expect.check_classes(mask[counted], classes)
        picked = _classes(answer, axis, options)
        picked = picked.repeat(factor, 0).repeat(factor, 1)[counted]
        if picked.size and (picked.min() < 0 or picked.max() >= classes):
            raise RecipeError(
                f"the output holds class {picked.min()} to {picked.max()}, expected 0 to {classes - 1}; set `classes`"
            )
        pairs = mask[counted].astype(np.int64) * classes + picked
        tables[number] = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    pixels = tables.sum((1, 2))
    if not pixels.all():
        raise RecipeError(f"sample {int(pixels.argmin())} has no pixel that counts; all are {options.ignore}")
    right = np.trace(tables, axis1=1, axis2=2) / pixels
    flat = tables.reshape(len(tables), -1).astype(np.float64)

    def weigh(weights: np.ndarray) -> float:
        return mean_iou((weights @ flat).reshape(classes, classes))

    miou = Score("miou", mean_iou(tables.sum(0)), len(tables), is_share=True, weigh=weigh)
    return Scores((miou, mean_score("pixel_accuracy", right, is_share=True)))


def mean_iou(table: np.ndarray) -> float:
    """The mean IoU of a confusion table, (true class, said class), over the classes that are in it at all."""
    import numpy as np

    both = np.diag(table)
    either = table.sum(0) + table.sum(1) - both
    present = either > 0
    return float((both[present] / either[present]).mean())


def _layout(said: np.ndarray, size: tuple[int, ...], options: Options) -> tuple[int | None, int, int]:
    """The axis of classes in one answer (None: indexes), pixels of a mask per score, and the number of classes."""
    shape = said.shape[1:]
    places: list[tuple[int | None, tuple[int, ...]]] = []
    if len(shape) == 2:
        places = [(None, shape)]
    elif len(shape) == 3:
        places = [(0, shape[1:]), (2, shape[:2])]
    for axis, (height, width) in places:
        factor = size[0] // height
        if factor >= 1 and (height * factor, width * factor) == size:
            return axis, factor, _count(1 if axis is None else shape[axis], axis, options)
    raise RecipeError(
        f"segmentation expects an output (samples, classes, height, width) whose size goes a whole number of times "
        f"into the masks' {size[0]} x {size[1]}, found {said.shape}"
    )


def _count(found: int, axis: int | None, options: Options) -> int:
    if axis is not None and found > 1:
        return found
    if options.threshold is not None:
        return 2
    if axis is not None:
        raise RecipeError(
            "the output has one score a pixel; set `threshold` (0 for logits, 0.5 for probabilities) in "
            "[evaluate.options], above which a pixel is class 1"
        )
    if options.classes < 2:
        raise RecipeError(
            "the output holds class indexes; set `classes`, their number, in [evaluate.options]"
        )
    return options.classes


def _classes(answer: np.ndarray, axis: int | None, options: Options) -> np.ndarray:
    """The class of every score of one sample, (height, width)."""
    import numpy as np

    found: np.ndarray
    if axis is not None and answer.shape[axis] > 1:
        found = answer.argmax(axis)
    else:
        flat = answer if axis is None else answer.take(0, axis)
        if options.threshold is not None:
            found = (flat > options.threshold).astype(np.int64)
        else:
            whole = np.where(np.isfinite(flat), flat, math.inf)
            found = np.where(np.isfinite(whole), whole, -1).astype(np.int64)
    return found
