# SPDX-License-Identifier: Apache-2.0
"""Top-1 and top-k by hand, and labels that are no classes."""

import numpy as np
import pytest

from edgeopt.evaluate.metrics import compare
from edgeopt.evaluate.outputs import Outputs
from edgeopt.evaluate.tasks import load_task
from edgeopt_wire.errors import RecipeError


def _score(scores: object, labels: object, **options: object) -> dict[str, float]:
    outputs = Outputs({"y": np.asarray(scores, np.float32)}, None if labels is None else np.asarray(labels))
    found = load_task("classification", options).score(outputs, outputs)
    return {score.name: score.value for score in found.scores}


def test_top1_and_top_k_by_hand() -> None:
    scores = [[0.1, 0.5, 0.3, 0.1], [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]]
    assert _score(scores, [1, 1, 1, 0], k=3) == {"top1": 0.25, "top3": 0.75}


def test_among_equal_scores_the_lower_index_wins_as_in_arg_max() -> None:
    scores = np.random.default_rng(0).integers(0, 3, (200, 6))
    labels = np.random.default_rng(1).integers(0, 6, 200)
    assert _score(scores, labels)["top1"] == pytest.approx((scores.argmax(1) == labels).mean())
    assert _score(np.zeros((6, 6)), np.arange(6), k=2) == {
        "top1": pytest.approx(1 / 6),
        "top2": pytest.approx(1 / 3),
    }


def test_a_score_that_is_no_number_is_last() -> None:
    assert _score([[np.nan, 0.0], [np.nan, 0.0]], [0, 1])["top1"] == 0.5


def test_few_classes_have_no_top5_and_maps_of_one_pixel_are_rows() -> None:
    assert set(_score(np.eye(5)[:, :, None, None], np.arange(5))) == {"top1"}


def test_a_background_class_shifts_the_labels() -> None:
    assert _score(np.eye(4)[[1, 2, 3]], [0, 1, 2], label_offset=1)["top1"] == 1
    with pytest.raises(RecipeError, match="labels run from 2 to 4"):
        _score(np.eye(4)[[1, 2, 3]], [1, 2, 3], label_offset=1)


def test_it_tells_the_same_top1_as_the_comparison_without_a_task() -> None:
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 9, 50)
    outputs = Outputs({"y": generator.normal(size=(50, 9)).astype(np.float32)}, labels)
    assert _score(outputs.arrays["y"], labels)["top1"] == compare(outputs, outputs).value


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((2, 3)), None, "class indexes as labels, the data has none"),
        (np.zeros((2, 3)), [0, 3], "labels run from 0 to 3, the model has the classes 0 to 2"),
        (np.zeros((2, 3)), [0.5, 1], r"one class index a sample as labels, found float64 \(2,\)"),
        (np.zeros((2, 3)), [[0, 1], [1, 0]], r"found int64 \(2, 2\)"),
        (np.zeros((2, 3, 7)), [0, 1], r"one row a sample, found an output of shape \(2, 3, 7\)"),
        (np.zeros((2, 1)), [0, 0], "at least 2 classes"),
    ],
)
def test_what_does_not_fit_is_refused(scores: np.ndarray, labels: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _score(scores, labels)


def test_unknown_tasks_options_and_outputs_name_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"unknown task 'clasification'; did you mean 'classification'"):
        load_task("clasification")
    with pytest.raises(RecipeError, match="unknown option 'kk'"):
        load_task("classification", {"kk": 3})
    with pytest.raises(RecipeError, match="k must be at least 2"):
        load_task("classification", {"k": 1})
    with pytest.raises(RecipeError, match="unknown output 'z'"):
        _score(np.zeros((2, 3)), [0, 1], output="z")
