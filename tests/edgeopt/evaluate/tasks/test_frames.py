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
    assert [score.name for score in found.scores] == ["frame_accuracy", "f1", "auc", "frame_agreement"]
    assert found.find("frame_accuracy").value == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert found.find("f1").value == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))


def test_auc_by_hand_and_as_scikit_learn_has_it() -> None:
    # Yes 0.9, 0.4 and no 0.4, 0.1: of four pairs three are in order and one is a tie.
    assert _score([[0.9, 0.4, 0.4, 0.1]], [[0] * 4], [[1, 1, 0, 0]]).find("auc").value == 3.5 / 4
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (20, 30))
    said = np.round(truth * 0.3 + rng.random((20, 30)), 1).astype(np.float32)
    expected = metrics.roc_auc_score(truth.ravel(), said.ravel())
    found = _score(said, said, truth).find("auc")
    assert found.value == pytest.approx(expected)
    weights = rng.integers(0, 3, 20)
    often = np.repeat(np.arange(20), weights)
    assert found.weigh is not None
    assert found.weigh(weights.astype(float)) == pytest.approx(
        metrics.roc_auc_score(truth[often].ravel(), said[often].ravel())
    )


def test_frames_of_one_kind_have_no_auc_and_numbers_that_are_none_have_no_value() -> None:
    assert "auc" not in [score.name for score in _score(SAID, BASE, np.ones((2, 4), int)).scores]
    broken = [[np.nan, 0.2, 0.6, 0.1], SAID[1]]
    assert np.isnan(_score(broken, BASE, [[1, 0, 0, 1], [1, 0, 1, 1]]).find("auc").value)


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
