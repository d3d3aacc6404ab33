# SPDX-License-Identifier: Apache-2.0
"""Detectors of every form give the same figure, and outputs or labels of another form are named."""

import numpy as np
import pytest

from edgeopt.evaluate.boxes import corners, overlap, suppress
from edgeopt.evaluate.outputs import Outputs
from edgeopt.evaluate.scores import Scores
from edgeopt.evaluate.statistics import interval, judge
from edgeopt.evaluate.tasks import load_task
from edgeopt_wire.errors import RecipeError

BOXES = np.array([[[10, 10, 30, 50], [40, 40, 60, 60]], [[5, 5, 25, 25], [0, 0, 0, 0]]], np.float32)
SCORES = np.array([[0.9, 0.6], [0.8, 0.0]], np.float32)
CLASSES = np.array([[0, 2], [1, 0]], np.float32)
ROWS = np.concatenate((BOXES, SCORES[..., None], CLASSES[..., None]), 2)
TRUTH = (
    {"boxes": BOXES[0], "classes": np.array([0, 2])},
    {"boxes": np.array([[5, 5, 25, 25], [0, 0, 0, 0]]), "classes": np.array([1, -1])},
)


def _score(arrays: dict[str, np.ndarray], truth: object = TRUTH, **options: object) -> Scores:
    outputs = Outputs(arrays, None, truth)  # type: ignore[arg-type]
    return load_task("detection", options).score(outputs, outputs)


def _yolo(objectness: bool = False) -> np.ndarray:
    """The rows as candidates of three classes, each twice a little apart, among twelve empty ones."""
    found = np.zeros((2, 16, 8 if objectness else 7), np.float32)
    centre, size = (BOXES[..., :2] + BOXES[..., 2:]) / 2, BOXES[..., 2:] - BOXES[..., :2]
    for copy, fade in ((0, 1.0), (2, 0.9)):
        found[:, copy : copy + 2, :4] = np.concatenate((centre, size), 2)
        for image, row in np.ndindex(2, 2):
            first = 5 if objectness else 4
            found[image, copy + row, first + int(CLASSES[image, row])] = fade * SCORES[image, row]
            if objectness:
                found[image, copy + row, 4] = 1
    return found


@pytest.mark.parametrize(
    ("arrays", "options"),
    [
        ({"y": ROWS}, {}),
        ({"y": ROWS[:, None]}, {}),
        ({"boxes": BOXES, "scores": SCORES, "classes": CLASSES}, {"form": "split", "classes": "classes"}),
        (
            {
                "b": BOXES[..., [1, 0, 3, 2]] / 100,
                "s": SCORES + 0.01,
                "c": CLASSES - 1,
                "n": np.array([[2.0], [1.0]], np.float32),
            },
            {
                "form": "split", "boxes": "b", "scores": "s", "classes": "c", "count": "n", "box": "yxyx",
                "scale": 100.0, "class_offset": 1,
            },
        ),
        ({"boxes": BOXES, "scores": SCORES[..., None] * np.eye(3, dtype=np.float32)[CLASSES.astype(int)]}, {"form": "split"}),
        ({"y": _yolo()}, {"form": "yolo"}),
        ({"y": _yolo().transpose(0, 2, 1)}, {"form": "yolo"}),
        ({"y": _yolo(objectness=True)}, {"form": "yolo", "objectness": True}),
    ],
)  # fmt: skip
def test_every_form_of_a_perfect_detector_has_a_perfect_figure(
    arrays: dict[str, np.ndarray], options: dict[str, object]
) -> None:
    found = _score(arrays, **options)
    assert [(score.name, score.value) for score in found.scores] == [
        ("map", pytest.approx(1)),
        ("map50", pytest.approx(1)),
    ]


def test_duplicates_cost_unless_they_are_suppressed() -> None:
    twice = np.concatenate((ROWS, ROWS + np.array([0, 0, 0, 0, -0.05, 0], np.float32)), 1)
    truth = tuple({"boxes": row["boxes"], "classes": np.where(row["classes"] >= 0, 0, -1)} for row in TRUTH)
    twice[..., 5] = 0
    assert _score({"y": twice}, truth).find().value < 0.95
    assert _score({"y": twice}, truth, suppress=0.5).find().value == pytest.approx(1)


def test_labels_may_be_one_array_with_padding() -> None:
    labels = np.full((2, 3, 5), -1.0)
    labels[0, :2] = np.concatenate((BOXES[0], [[0], [2]]), 1)
    labels[1, 2] = [5, 5, 25, 25, 1]
    outputs = Outputs({"y": ROWS}, labels)
    assert load_task("detection").score(outputs, outputs).find().value == pytest.approx(1)


def test_a_lost_object_is_a_drop_with_an_interval() -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 50, (40, 1, 2))
    boxes = np.concatenate((corner, corner + 20), 2).astype(np.float32)
    truth = tuple({"boxes": row, "classes": np.array([0])} for row in boxes)
    rows = np.concatenate((boxes, np.full((40, 1, 1), 0.9), np.zeros((40, 1, 1))), 2).astype(np.float32)
    lost = rows.copy()
    lost[:10, 0, 4] = 0
    was, now = _score({"y": rows}, truth).find("map50"), _score({"y": lost}, truth).find("map50")
    assert (was.value, now.value) == (pytest.approx(1), pytest.approx(76 / 101))
    told = interval(now)
    assert told is not None
    assert told.low < now.value < told.high
    assert judge(was, now, 0.02).answer == "not met"
    assert judge(was, now, 0.02).sentence().startswith("map50 worse by 24.75 points, 95 % interval ")


def test_box_forms_say_the_same_box() -> None:
    wanted = np.array([[10.0, 20.0, 40.0, 80.0]])
    said = {
        "xyxy": [10, 20, 40, 80],
        "yxyx": [20, 10, 80, 40],
        "xywh": [10, 20, 30, 60],
        "cxcywh": [25, 50, 30, 60],
    }
    for form, box in said.items():
        np.testing.assert_array_equal(corners(np.array([box], np.float32), form), wanted)


def test_overlap_and_suppression_by_hand() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30], [3, 3, 3, 9]])
    np.testing.assert_allclose(overlap(boxes[:1], boxes)[0], [1, 0.5, 0, 0])
    np.testing.assert_allclose(overlap(boxes[1:2], boxes[:1], np.array([True])), [[1.0]])
    scores, one = np.array([0.5, 0.9, 0.1, 0.2]), np.zeros(4)
    assert suppress(boxes, scores, one, 0.4).tolist() == [1, 3, 2]
    assert suppress(boxes, scores, np.array([0, 1, 0, 0]), 0.4).tolist() == [1, 0, 3, 2]
    assert suppress(boxes, scores, one, 0.4, most=2).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("arrays", "truth", "options", "message"),
    [
        ({"y": ROWS[..., :5]}, TRUTH, {}, r"expects one output \(samples, n, 6\).*found \(2, 2, 5\)"),
        ({"boxes": BOXES, "scores": SCORES[:, :1]}, TRUTH, {"form": "split"}, r"scores \(2, 1\)"),
        ({"y": ROWS}, TRUTH, {"form": "split"}, "unknown output 'boxes'"),
        ({"y": np.zeros((2, 4, 4), np.float32)}, TRUTH, {"form": "yolo"}, r"found \(2, 4, 4\)"),
        ({"y": ROWS}, None, {}, "with the parts boxes, classes .*y.boxes, y.classes.*found none"),
        ({"y": ROWS}, ({"boxes": BOXES[0]},) * 2, {}, "found boxes"),
        ({"y": ROWS}, ({"boxes": BOXES[0], "classes": np.zeros(3)},) * 2, {}, "found boxes .*, 3 classes"),
        (
            {"y": ROWS},
            ({"boxes": np.array([[9, 9, 5, 5]]), "classes": np.zeros(1)},) * 2,
            {},
            "added up first",
        ),
        (
            {"y": ROWS},
            ({"boxes": np.zeros((1, 4)), "classes": np.array([-1])},) * 2,
            {},
            "at least one object",
        ),
        ({"y": ROWS}, TRUTH, {"form": "ssd"}, "unknown form 'ssd'"),
        ({"y": ROWS}, TRUTH, {"box": "xyhw"}, "unknown box 'xyhw'"),
        ({"y": ROWS}, TRUTH, {"scale": 0.0}, "scale must be positive"),
        ({"y": ROWS}, TRUTH, {"max_detections": 0}, "max_detections must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(
    arrays: dict[str, np.ndarray], truth: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        _score(arrays, truth, **options)
