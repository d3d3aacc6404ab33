# SPDX-License-Identifier: Apache-2.0
"""Decisions a frame, against the baseline and against labels."""

import numpy as np
import pytest

from edgeopt.evaluate.outputs import Outputs
from edgeopt.evaluate.scores import Scores
from edgeopt.evaluate.tasks import load_task
from edgeopt_wire.errors import RecipeError

SAID = [[0.9, 0.2, 0.6, 0.1], [0.4, 0.4, 0.7, 0.9]]
BASE = [[0.8, 0.3, 0.4, 0.1], [0.4, 0.4, 0.7, 0.9]]


def _score(said: object, base: object, labels: object = None, **options: object) -> Scores:
    known = None if labels is None else np.asarray(labels)
    outputs, baseline = (Outputs({"y": np.asarray(array, np.float32)}, known) for array in (said, base))
    return load_task("frames", options).score(outputs, baseline)


def test_agreement_with_the_baseline_by_hand() -> None:
    found = _score(SAID, BASE)
    assert [score.name for score in found.scores] == ["frame_agreement"]
    assert found.find().value == pytest.approx((3 / 4 + 1) / 2)
    assert _score(SAID, BASE, threshold=0.65).find().value == 1


def test_labels_come_first_and_padding_does_not_count() -> None:
    found = _score(SAID, BASE, [[1, 0, 0, -1], [1, 0, 1, 1]])
    assert [score.name for score in found.scores] == ["frame_accuracy", "f1", "frame_agreement"]
    assert found.find("frame_accuracy").value == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert found.find("f1").value == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))


def test_one_frame_a_sample_is_right_or_wrong() -> None:
    found = _score([[0.9], [0.1], [0.7]], [[0.8], [0.2], [0.1]], [1, 0, 0])
    assert found.find("frame_accuracy").is_right_or_wrong
    assert found.find("frame_accuracy").value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1, 0], [0, 1]], r"each of 4 frames as labels, found int64 \(2, 2\)"),
        ([[1, 0, 2, 0], [0, 1, 0, 0]], "expects 0 or 1"),
        ([[1, 0, 1, 0], [-1, -1, -1, -1]], "sample 1 has no frame that counts"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _score(SAID, BASE, labels)
