# SPDX-License-Identifier: Apache-2.0
"""mIoU by hand, in every layout, and masks that do not fit."""

import numpy as np
import pytest

from edgeopt.evaluate.outputs import Outputs
from edgeopt.evaluate.scores import Scores
from edgeopt.evaluate.tasks import load_task
from edgeopt_wire.errors import RecipeError

# Class 0: 3 right of 3 + 1 (one of class 2 called 0) -> 3/4; class 1: 2 of 3 -> 2/3; class 2: 1 of 3 -> 1/3.
MASKS = np.array([[[0, 0], [1, 2]], [[0, 1], [1, 2]]])
SAID = np.array([[[0, 0], [1, 0]], [[0, 1], [2, 2]]])
MIOU = (3 / 4 + 2 / 3 + 1 / 3) / 3


def _score(said: object, masks: object, **options: object) -> Scores:
    outputs = Outputs({"y": np.asarray(said, np.float32)}, np.asarray(masks))
    return load_task("segmentation", options).score(outputs, outputs)


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (np.eye(3)[SAID], {}),
        (np.eye(3)[SAID].transpose(0, 3, 1, 2), {}),
        (SAID, {"classes": 3}),
    ],
)
def test_miou_by_hand_in_every_layout(said: np.ndarray, options: dict[str, object]) -> None:
    found = _score(said, MASKS, **options)
    assert found.find("miou").value == pytest.approx(MIOU)
    assert found.find("pixel_accuracy").value == 0.75


def test_ignored_pixels_do_not_count_and_absent_classes_are_not_averaged() -> None:
    masks = np.where(MASKS == 2, 255, MASKS)
    found = _score(np.eye(5)[SAID], masks)
    # Of six pixels that count, class 0 is 3 of 3, class 1 is 2 of 3, class 2 was said once and never right.
    assert found.find("miou").value == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found.find("pixel_accuracy").value == pytest.approx((1 + 2 / 3) / 2)


def test_a_smaller_output_stands_for_squares_of_pixels() -> None:
    large = MASKS.repeat(4, 1).repeat(4, 2)
    assert _score(np.eye(3)[SAID], large).find("miou").value == pytest.approx(MIOU)


def test_one_score_a_pixel_needs_a_threshold() -> None:
    masks = np.array([[[0, 1], [1, 1]]])
    logits = np.array([[[[-1.0, 2.0], [0.5, -3.0]]]])
    # Class 0: 1 of 2; class 1: 2 of 3.
    assert _score(logits, masks, threshold=0.0).find("miou").value == pytest.approx((1 / 2 + 2 / 3) / 2)
    with pytest.raises(RecipeError, match="set `threshold`"):
        _score(logits, masks)


def test_weighing_a_sample_twice_is_having_it_twice() -> None:
    generator = np.random.default_rng(0)
    said, masks = generator.normal(size=(6, 4, 5, 5)), generator.integers(0, 4, (6, 5, 5))
    weights = np.array([0, 2, 1, 0, 3, 1])
    often = np.repeat(np.arange(6), weights)
    weigh = _score(said, masks).find("miou").weigh
    assert weigh is not None
    assert weigh(weights.astype(float)) == pytest.approx(_score(said[often], masks[often]).find("miou").value)


def test_miou_is_the_mean_jaccard_score_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(1)
    said, masks = generator.integers(0, 5, (3, 9, 9)), generator.integers(0, 5, (3, 9, 9))
    expected = metrics.jaccard_score(masks.ravel(), said.ravel(), average="macro")
    assert _score(np.eye(5)[said], masks).find("miou").value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "masks", "message"),
    [
        (np.zeros((2, 3, 2, 2)), np.zeros((2, 3, 3), int), r"the masks' 3 x 3, found \(2, 3, 2, 2\)"),
        (np.zeros((2, 3, 2, 2)), np.zeros(2, int), r"masks \(samples, height, width\).*found int64 \(2,\)"),
        (np.zeros((2, 3, 2, 2)), np.zeros((2, 2, 2)), "found float64"),
        (
            np.zeros((2, 3, 2, 2)),
            np.full((2, 2, 2), 3),
            "labels run from 3 to 3, the model has the classes 0 to 2",
        ),
        (np.zeros((2, 3, 2, 2)), np.full((2, 2, 2), 255), "sample 0 has no pixel that counts"),
        (np.zeros((2, 2, 2)), np.zeros((2, 2, 2), int), "set `classes`"),
        (np.zeros((2, 7)), np.zeros((2, 2, 2), int), r"found \(2, 7\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(said: np.ndarray, masks: np.ndarray, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _score(said, masks)


def test_class_indexes_beyond_the_classes_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"expected 0 to 1; set `classes`"):
        _score(np.full((1, 2, 2), 2.0), np.zeros((1, 2, 2), int), classes=2)
