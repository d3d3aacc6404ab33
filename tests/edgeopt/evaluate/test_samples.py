# SPDX-License-Identifier: Apache-2.0
"""Data sets as users have them, and every mistake with its message."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeopt.evaluate.preprocess import Preprocess
from edgeopt.evaluate.samples import load_samples
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

PHOTO = (TensorSpec("image", (1, 3, 8, 8), "float32", "NCHW"),)
VECTOR = (TensorSpec("x", (1, 4), "float32"),)
PLAIN = Preprocess(resize=8, crop=8, mean=(0.0,) * 3, std=(1.0,) * 3)


def _photo(path: Path, colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (16, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_class_folders_are_labelled_in_the_order_of_their_names(tmp_path: Path) -> None:
    _photo(tmp_path / "zebra" / "a.png", (0, 0, 255))
    _photo(tmp_path / "ape" / "b.png")
    _photo(tmp_path / "ape" / ".hidden.png")
    found = list(load_samples(str(tmp_path), PHOTO, PLAIN))
    assert [sample.label for sample in found] == [0, 1]
    np.testing.assert_allclose(found[0].inputs["image"][0, :, 0, 0], [1, 0, 0], atol=1e-6)


def test_labels_csv_names_files_and_classes(tmp_path: Path) -> None:
    _photo(tmp_path / "b.png")
    _photo(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,class_index,name\nb.png,7,seven\na.png,3,three\n")
    assert [sample.label for sample in load_samples(str(tmp_path), PHOTO, PLAIN)] == [3, 7]


def test_a_channels_last_input_is_laid_out_as_such(tmp_path: Path) -> None:
    _photo(tmp_path / "a.png", (0, 255, 0))
    spec = (TensorSpec("image", (1, 8, 8, 3), "float32", "NHWC"),)
    sample = next(iter(load_samples(str(tmp_path), spec, PLAIN)))
    np.testing.assert_allclose(sample.inputs["image"][0, 0, 0], [0, 1, 0], atol=1e-6)
    assert sample.label is None


def test_grey_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 51).save(tmp_path / "grey.png")
    Image.new("RGBA", (8, 8), (51, 51, 51, 9)).save(tmp_path / "pale.png")
    for sample in load_samples(str(tmp_path), PHOTO, PLAIN):
        np.testing.assert_allclose(sample.inputs["image"], 0.2, atol=1e-6)


def test_a_limit_draws_the_same_subset_every_time(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.arange(80, dtype=np.float32).reshape(20, 4), y=np.arange(20))
    first = load_samples(str(tmp_path / "d.npz"), VECTOR, limit=5, seed=3)
    again = load_samples(str(tmp_path / "d.npz"), VECTOR, limit=5, seed=3)
    other = load_samples(str(tmp_path / "d.npz"), VECTOR, limit=5, seed=4)
    assert len(first) == 5
    assert [s.label for s in first] == [s.label for s in again] != [s.label for s in other]
    assert first.digest == again.digest != other.digest


def test_the_digest_is_of_content_and_preprocessing(tmp_path: Path) -> None:
    _photo(tmp_path / "a.png")
    before = load_samples(str(tmp_path), PHOTO, PLAIN).digest
    assert load_samples(str(tmp_path), PHOTO, Preprocess(resize=8, crop=8)).digest != before
    _photo(tmp_path / "a.png", (1, 2, 3))
    assert load_samples(str(tmp_path), PHOTO, PLAIN).digest != before


def test_a_factory_may_give_pairs_or_arrays(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(
        "import numpy as np\n"
        "def pairs():\n    return [(np.full(4, i, np.float32), i) for i in range(3)]\n"
        "def arrays():\n    return {'x': np.zeros((2, 4), np.float32)}\n"
        "def nothing():\n    return []\n"
        "def wrong():\n    return 3\n"
    )
    pairs = list(load_samples(f"{tmp_path}/made.py:pairs", VECTOR))
    assert [sample.label for sample in pairs] == [0, 1, 2]
    assert pairs[2].inputs["x"].tolist() == [[2.0] * 4]
    assert len(load_samples(f"{tmp_path}/made.py:arrays", VECTOR)) == 2
    with pytest.raises(RecipeError, match="no sample"):
        load_samples(f"{tmp_path}/made.py:nothing", VECTOR)
    with pytest.raises(RecipeError, match="found int"):
        load_samples(f"{tmp_path}/made.py:wrong", VECTOR)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 5), np.float32)}, r"expected samples of shape \(4,\).*found \(3, 5\)"),
        ({"z": np.zeros((3, 4), np.float32)}, "has the arrays z; the model's inputs are x"),
        ({"x": np.zeros((3, 4), np.complex64)}, "expected float32 .*found complex64"),
        ({"x": np.zeros((3, 4), np.float32), "y": np.zeros(2)}, "as many samples in every array"),
        ({"x": np.zeros((0, 4), np.float32)}, "at least one"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(RecipeError, match=message):
        load_samples(str(tmp_path / "d.npz"), VECTOR)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(RecipeError, match="plain arrays"):
        load_samples(str(tmp_path / "d.npz"), VECTOR)


def test_a_folder_without_preprocessing_is_refused_with_the_key_to_add(tmp_path: Path) -> None:
    _photo(tmp_path / "a.png")
    with pytest.raises(RecipeError, match=r"\[preprocess\].*crop = 8"):
        load_samples(str(tmp_path), PHOTO)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("not a picture")
    with pytest.raises(RecipeError, match=r"cannot read the image .*a\.jpg"):
        load_samples(str(tmp_path), PHOTO, PLAIN)


def test_an_empty_folder_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds no image .*\.png"):
        load_samples(str(tmp_path), PHOTO, PLAIN)


def test_a_crop_that_is_not_the_models_says_both(tmp_path: Path) -> None:
    _photo(tmp_path / "a.png")
    with pytest.raises(RecipeError, match=r"gives \(1, 3, 6, 6\).*crop \(now 6\)"):
        load_samples(str(tmp_path), PHOTO, Preprocess(resize=8, crop=6))


def test_a_label_that_is_no_number_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\na.png,cat\n")
    with pytest.raises(RecipeError, match="line 2: 'cat'"):
        load_samples(str(tmp_path), PHOTO, PLAIN)


def test_a_table_may_give_numbers_or_texts(tmp_path: Path) -> None:
    _photo(tmp_path / "b.png")
    _photo(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,target\nb.png,7.5\na.png,3\n")
    before = load_samples(str(tmp_path), PHOTO, PLAIN)
    assert [np.asarray(sample.label).item() for sample in before] == [3.0, 7.5]
    (tmp_path / "labels.csv").write_text('image,text\nb.png,"one, two"\na.png,\n')
    after = load_samples(str(tmp_path), PHOTO, PLAIN)
    assert [sample.label for sample in after] == ["", "one, two"]
    assert before.digest != after.digest
    (tmp_path / "labels.csv").write_text("file,value\nb.png,7.5\na.png,much\n")
    with pytest.raises(RecipeError, match="line 3: 'much' is no number"):
        load_samples(str(tmp_path), PHOTO, PLAIN)


def test_unknown_columns_list_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RecipeError, match="found a, b"):
        load_samples(str(tmp_path), PHOTO, PLAIN)
