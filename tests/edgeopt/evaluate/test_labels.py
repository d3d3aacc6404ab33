# SPDX-License-Identifier: Apache-2.0
"""Labels of every kind survive the way from a user's file to the outputs, and what cannot be a label is named."""

from pathlib import Path

import numpy as np
import pytest

from edgeopt.evaluate import labels as labelling
from edgeopt.evaluate.outputs import Outputs, collect
from edgeopt.evaluate.samples import load_samples
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

VECTOR = (TensorSpec("x", (1, 4), "float32"),)
X = np.arange(12, dtype=np.float32).reshape(3, 4)


def _outputs(tmp_path: Path, **arrays: np.ndarray) -> Outputs:
    """Save, load, run, save and load again: the whole way of a label."""
    np.savez(tmp_path / "data.npz", x=X, **arrays)
    found = collect(lambda inputs: {"out": inputs["x"]}, load_samples(str(tmp_path / "data.npz"), VECTOR))
    found.save(tmp_path / "outputs.npz")
    return Outputs.load(tmp_path / "outputs.npz")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (np.array([2, 0, 1], np.uint8), np.array([2, 0, 1], np.int64)),
        (np.array([2.0, 0.0, 1.0]), np.array([2, 0, 1], np.int64)),
        (np.array([0.5, 1.0, -2.25]), np.array([0.5, 1.0, -2.25])),
        (np.arange(18).reshape(3, 2, 3) / 4, np.arange(18).reshape(3, 2, 3) / 4),
        (np.array(["one", "two", "three"]), np.array(["one", "two", "three"])),
    ],
)
def test_an_array_of_labels_keeps_its_values(tmp_path: Path, given: np.ndarray, kept: np.ndarray) -> None:
    found = _outputs(tmp_path, y=given)
    assert found.labels is not None
    np.testing.assert_array_equal(found.labels, kept)
    assert found.labels.dtype.kind == kept.dtype.kind
    assert found.annotations is None


def test_parts_of_a_mapping_stay_together(tmp_path: Path) -> None:
    boxes = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    found = _outputs(tmp_path, **{"y.boxes": boxes, "y.classes": np.array([[0, 1], [2, -1], [-1, -1]])})
    assert found.labels is None
    assert found.annotations is not None
    np.testing.assert_array_equal(found.annotations[1]["boxes"], boxes[1])
    assert found.annotations[2]["classes"].tolist() == [-1, -1]


def test_a_factory_may_give_boxes_of_different_number_and_transcripts_of_different_length(
    tmp_path: Path,
) -> None:
    (tmp_path / "made.py").write_text(
        "import numpy as np\n"
        "X = [np.full(4, i, np.float32) for i in range(3)]\n"
        "def boxes():\n"
        "    return [(x, {'boxes': np.ones((i, 4)) if i else [], 'classes': [7] * i}) for i, x in enumerate(X)]\n"
        "def words():\n    return list(zip(X, ['a', 'b c', '']))\n"
        "def ids():\n    return list(zip(X, [[1], [2, 3], [4, 5, 6]]))\n"
        "def mixed():\n    return list(zip(X, [1, 'b', 2]))\n"
        "def uneven():\n    return list(zip(X, [np.ones(2), np.ones(3), np.ones(2)]))\n"
        "def strange():\n    return list(zip(X, [object()] * 3))\n"
        "def ragged():\n    return {'x': X, 'y': [[1], [2, 3], [4]]}\n"
        "def parts():\n    return list(zip(X, [{'a': 1}, {'a': 1}, {'b': 1}]))\n"
    )

    def outputs(name: str) -> Outputs:
        found = collect(
            lambda inputs: {"out": inputs["x"]}, load_samples(f"{tmp_path}/made.py:{name}", VECTOR)
        )
        found.save(tmp_path / "outputs.npz")
        return Outputs.load(tmp_path / "outputs.npz")

    boxes = outputs("boxes").annotations
    assert boxes is not None
    assert [row["boxes"].shape for row in boxes] == [(0, 4), (1, 4), (2, 4)]
    assert [row["classes"].tolist() for row in boxes] == [[], [7], [7, 7]]
    words, ids = outputs("words").labels, outputs("ids").labels
    assert words is not None
    assert ids is not None
    assert words.tolist() == ["a", "b c", ""]
    assert ids.tolist() == [[1, -1, -1], [2, 3, -1], [4, 5, 6]]
    with pytest.raises(RecipeError, match="one kind, found int, str"):
        outputs("mixed")
    with pytest.raises(RecipeError, match=r"one shape, found \(2,\) and \(3,\)"):
        outputs("uneven")
    with pytest.raises(RecipeError, match="expected numbers, found object"):
        outputs("strange")
    with pytest.raises(RecipeError, match="a mapping with rows of different lengths"):
        outputs("ragged")
    with pytest.raises(RecipeError, match="found a in sample 0 and b in sample 2"):
        outputs("parts")


def test_parts_with_different_numbers_of_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"in every part of the labels, found \{'boxes': 3, 'classes': 2\}"):
        _outputs(tmp_path, **{"y.boxes": np.zeros((3, 1, 4)), "y.classes": np.zeros((2, 1))})


def test_another_label_is_another_digest(tmp_path: Path) -> None:
    def digest(y: np.ndarray) -> str:
        np.savez(tmp_path / "data.npz", x=X, y=y)
        return load_samples(str(tmp_path / "data.npz"), VECTOR).digest

    mask = np.zeros((3, 2, 2), np.int64)
    other = mask.copy()
    other[2, 1, 1] = 1
    assert (
        len({digest(mask), digest(other), digest(np.array([1, 2, 3])), digest(np.array(["1", "2", "3"]))})
        == 4
    )
    assert digest(mask) == digest(mask.copy())


def test_whole_numbers_are_ints_and_infinity_is_not_one() -> None:
    assert labelling.split(np.array([1.0, 3.0])) == [1, 3]
    assert all(isinstance(label, np.ndarray) for label in labelling.split(np.array([1.0, np.inf])))
