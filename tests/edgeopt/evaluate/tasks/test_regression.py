# SPDX-License-Identifier: Apache-2.0
"""Errors of a regression by hand and beside a library, and their weighed forms."""

import math

import numpy as np
import pytest

from edgeopt.evaluate.outputs import Outputs
from edgeopt.evaluate.scores import Scores
from edgeopt.evaluate.tasks import load_task
from edgeopt_wire.errors import RecipeError


def _score(said: object, labels: object) -> Scores:
    outputs = Outputs({"y": np.asarray(said, np.float32)}, np.asarray(labels))
    return load_task("regression").score(outputs, outputs)


def test_errors_by_hand() -> None:
    found = _score([[1.0], [2.0], [5.0]], [1.0, 4.0, 4.0])
    assert found.find("mae").value == 1.0
    assert found.find("rmse").value == pytest.approx(math.sqrt(5 / 3))
    assert found.find("r2").value == pytest.approx(1 - 5 / 6)  # around the mean 3: 4 + 1 + 1
    assert [score.higher_is_better for score in found.scores] == [False, False, True]


def test_r2_of_several_numbers_is_the_one_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    labels = generator.normal(size=(40, 3))
    said = (labels + generator.normal(scale=0.3, size=(40, 3))).astype(np.float32)
    assert _score(said, labels).find("r2").value == pytest.approx(metrics.r2_score(labels, said))


def test_weighing_a_sample_twice_is_having_it_twice() -> None:
    generator = np.random.default_rng(1)
    labels, noise = generator.normal(size=(12, 2)), generator.normal(size=(12, 2))
    weights = generator.integers(0, 4, 12)
    often = np.repeat(np.arange(12), weights)
    whole, drawn = _score(labels + noise, labels), _score((labels + noise)[often], labels[often])
    for name in ("rmse", "r2"):
        weigh = whole.find(name).weigh
        assert weigh is not None
        assert weigh(weights.astype(float)) == pytest.approx(drawn.find(name).value, rel=1e-5)


def test_labels_that_never_change_have_no_r2() -> None:
    assert [score.name for score in _score(np.ones((4, 1)), np.full(4, 0.1)).scores] == ["mae", "rmse"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((3, 4)), r"labels are float64 \(3, 4\), the output is \(3, 2\)"),
        (np.full((3, 2), np.nan), "finite labels"),
        (np.array(["a", "b", "c"]), "labels are <U1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: np.ndarray, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _score(np.zeros((3, 2)), labels)
