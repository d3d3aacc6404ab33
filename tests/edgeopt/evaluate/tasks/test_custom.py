# SPDX-License-Identifier: Apache-2.0
"""A user's own function: what it is given, what it may return, and every mistake with its message."""

from pathlib import Path

import numpy as np
import pytest

from edgeopt.evaluate.outputs import Outputs
from edgeopt.evaluate.scores import Scores
from edgeopt.evaluate.statistics import interval, judge
from edgeopt.evaluate.tasks import load_task
from edgeopt_wire.errors import RecipeError

FUNCTIONS = """
import numpy as np

def hinge(outputs, labels):
    return np.maximum(0, 1 - outputs["y"][:, 0] * labels)

def right(outputs, labels):
    return outputs["y"][:, 0] * labels > 0

def worst(outputs, labels):
    return float(np.abs(outputs["y"][:, 0] - labels).mean() ** 2)

def boxes(outputs, labels):
    return [len(row["boxes"]) for row in labels]

def table(outputs, labels):
    return outputs["y"]

def words(outputs, labels):
    return "good"

def fails(outputs, labels):
    return outputs["z"]

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own_metric.py"
    path.write_text(FUNCTIONS)
    return path


LABELS = np.where(np.arange(30) % 3 == 0, 1, -1)
OUTPUTS = Outputs({"y": np.linspace(-2, 2, 30, dtype=np.float32)[:, None]}, LABELS)


def _score(file: Path, function: str, outputs: Outputs = OUTPUTS, **options: object) -> Scores:
    return load_task(f"{file}:{function}", options).score(outputs, outputs)


def test_one_number_a_sample_is_a_mean(file: Path) -> None:
    found = _score(file, "hinge", higher_is_better=False).find("hinge")
    expected = np.maximum(0, 1 - OUTPUTS.arrays["y"][:, 0] * LABELS)
    assert found.value == pytest.approx(expected.mean())
    assert found.values is not None
    assert interval(found) is not None
    right = _score(file, "right").find()
    assert right.is_right_or_wrong
    assert judge(right, right, None).test == "McNemar exact"


def test_one_number_for_all_is_drawn_again_for_its_interval(file: Path) -> None:
    found = _score(file, "worst", name="squared", higher_is_better=False).find("squared")
    assert found.value == pytest.approx(np.abs(OUTPUTS.arrays["y"][:, 0] - LABELS).mean() ** 2)
    held = interval(found)
    assert held is not None
    assert held.low < found.value < held.high
    assert held.method == "percentile bootstrap"
    alone = _score(file, "worst", resamples=0).find()
    assert interval(alone) is None
    assert judge(alone, alone, 0.1).answer == "cannot be told"


def test_labels_with_parts_come_as_dictionaries(file: Path) -> None:
    parts = tuple({"boxes": np.zeros((number % 3, 4))} for number in range(6))
    outputs = Outputs({"y": np.zeros((6, 1), np.float32)}, None, parts)
    assert _score(file, "boxes", outputs).find().value == 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("table", r"one a sample, an array of shape \(30,\); found float32 \(30, 1\)"),
        ("words", "found <U4"),
        ("fails", r"fails\(outputs, labels\) failed: KeyError: 'z'"),
        ("number", "no function 'number'; it offers hinge, right, worst"),
        ("missing", "no function 'missing'"),
    ],
)
def test_mistakes_are_named(file: Path, name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _score(file, name)


def test_a_function_that_is_not_there_is_named() -> None:
    with pytest.raises(RecipeError, match=r"no such file; looked at .*nowhere\.py"):
        load_task("nowhere.py:hinge")
    with pytest.raises(RecipeError, match="give `function`"):
        load_task("custom")
    with pytest.raises(RecipeError, match="unknown option 'higher'"):
        load_task("a.b:c", {"higher": 1})
