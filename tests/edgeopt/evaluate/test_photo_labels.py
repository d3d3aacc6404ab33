# SPDX-License-Identifier: Apache-2.0
"""Boxes and masks follow their photo through resizing and cropping, and files of another form are named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeopt.evaluate.outputs import collect
from edgeopt.evaluate.preprocess import Preprocess
from edgeopt.evaluate.samples import Sample, load_samples
from edgeopt.evaluate.tasks import load_task
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

PLAIN = Preprocess(resize=40, crop=32, resample="nearest", scale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
SPEC = (TensorSpec("image", (1, 3, 32, 32), "float32", "NCHW"),)


def _load(folder: Path, preprocess: Preprocess = PLAIN) -> list[Sample]:
    return list(load_samples(str(folder), SPEC, preprocess))


def _photo_and_mask(folder: Path, name: str, classes: np.ndarray) -> None:
    """A photo that shows its own mask, so that what happens to one can be compared with the other."""
    for part in ("images", "masks"):
        (folder / part).mkdir(exist_ok=True)
    Image.fromarray(classes.astype(np.uint8)).save(folder / "masks" / f"{name}.png")
    Image.fromarray(np.repeat(classes[..., None], 3, 2).astype(np.uint8)).save(
        folder / "images" / f"{name}.png"
    )


def _coco(folder: Path, **changes: Any) -> None:
    data = {
        "images": [{"id": 7, "file_name": "wide.png"}, {"id": 3, "file_name": "empty.png"}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 2, "name": "bicycle"}],
        "annotations": [
            {"image_id": 7, "category_id": 18, "bbox": [50, 20, 20, 40], "iscrowd": 0},
            {"image_id": 7, "category_id": 2, "bbox": [30, 20, 20, 10]},  # most of it left of the crop
            {"image_id": 7, "category_id": 2, "bbox": [60, 30, 10, 10], "iscrowd": 1},
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 20, 20]},  # all of it left of the crop
        ],
        **changes,
    }
    (folder / "annotations.json").write_text(json.dumps(data))
    Image.new("RGB", (160, 80)).save(folder / "wide.png")
    Image.new("RGB", (80, 80)).save(folder / "empty.png")


@pytest.mark.parametrize("shape", [(40, 40), (60, 100), (97, 33), (20, 20)])
def test_a_mask_is_resized_and_cropped_as_its_photo(tmp_path: Path, shape: tuple[int, int]) -> None:
    _photo_and_mask(tmp_path, "a", np.random.default_rng(0).integers(0, 20, shape))
    sample = _load(tmp_path)[0]
    assert isinstance(sample.label, np.ndarray)
    np.testing.assert_array_equal(sample.label, sample.inputs["image"][0, 0])


def test_masks_go_all_the_way_to_a_perfect_miou(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for name in "abc":
        _photo_and_mask(tmp_path, name, rng.integers(0, 4, (50, 40)))
    samples = load_samples(str(tmp_path), SPEC, PLAIN)
    outputs = collect(lambda inputs: {"y": np.eye(4)[inputs["image"][:, 0].astype(int)]}, samples)
    assert load_task("segmentation").score(outputs, outputs).find("miou").value == 1


def test_boxes_follow_the_crop_and_what_it_cuts_is_not_asked_for(tmp_path: Path) -> None:
    _coco(tmp_path)
    samples = _load(tmp_path)
    empty, label = samples[0].label, samples[1].label
    assert isinstance(label, dict)
    assert isinstance(empty, dict)
    # 160 x 80 becomes 80 x 40, of which columns 24 to 56 and rows 4 to 36 are kept.
    assert label["boxes"].tolist() == [[1, 6, 11, 26], [0, 6, 1, 11], [6, 11, 11, 16]]
    assert label["classes"].tolist() == [1, 0, 0]
    assert label["category_ids"].tolist() == [18, 2, 2]
    assert label["crowd"].tolist() == [False, True, True]
    assert empty["boxes"].shape == (0, 4)


def test_boxes_go_all_the_way_to_a_perfect_map(tmp_path: Path) -> None:
    _coco(tmp_path)
    samples = load_samples(str(tmp_path), SPEC, PLAIN)
    rows = {len(sample.label["boxes"]): sample.label for sample in samples if isinstance(sample.label, dict)}
    assert set(rows) == {0, 3}
    answers = iter([np.zeros((1, 1, 6)), np.array([[[1, 6, 11, 26, 0.9, 18]]])])
    outputs = collect(lambda _: {"y": next(answers)}, samples)
    score = load_task("detection", {"label": "category_ids"}).score(outputs, outputs)
    assert score.find("map").value == pytest.approx(1)


def test_a_photo_that_exif_turns_is_measured_upright(tmp_path: Path) -> None:
    _coco(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 160)).save(tmp_path / "wide.png", exif=exif)
    label = _load(tmp_path)[1].label
    assert isinstance(label, dict)
    assert label["boxes"][0].tolist() == [1, 6, 11, 26]


def test_the_digest_follows_masks_and_boxes(tmp_path: Path) -> None:
    _coco(tmp_path)
    first = load_samples(str(tmp_path), SPEC, PLAIN).digest
    assert load_samples(str(tmp_path), SPEC, PLAIN).digest == first
    _coco(tmp_path, annotations=[])
    assert load_samples(str(tmp_path), SPEC, PLAIN).digest != first
    folder = tmp_path / "masked"
    folder.mkdir()
    _photo_and_mask(folder, "a", np.zeros((40, 40)))
    before = load_samples(str(folder), SPEC, PLAIN).digest
    Image.new("L", (40, 40), 1).save(folder / "masks" / "a.png")
    assert load_samples(str(folder), SPEC, PLAIN).digest != before


def test_masks_of_another_size_or_with_colours_are_named(tmp_path: Path) -> None:
    _photo_and_mask(tmp_path, "a", np.zeros((40, 40)))
    Image.new("RGB", (40, 40)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(RecipeError, match=r"a\.png must have one channel .* found mode RGB"):
        _load(tmp_path)
    Image.new("L", (40, 20)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(RecipeError, match=r"size of its photo, \(40, 40\).*size \(40, 20\)"):
        _load(tmp_path)
    (tmp_path / "masks" / "a.png").rename(tmp_path / "masks" / "b.png")
    with pytest.raises(RecipeError, match=r"a\.png has no mask called a"):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"images": [{"id": 1}]}, "KeyError"),
        ({"annotations": [{"image_id": 99, "category_id": 2, "bbox": [0, 0, 1, 1]}]}, "KeyError: 99"),
        ({"annotations": [{"image_id": 7, "category_id": 5, "bbox": [0, 0, 1, 1]}]}, "5 is not in"),
        ({"annotations": [{"image_id": 7, "category_id": 2, "bbox": [0, 0, 1]}]}, "not enough values"),
    ],
)
def test_annotations_of_another_form_are_named(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    _coco(tmp_path, **changes)
    with pytest.raises(RecipeError, match=f"not in COCO's format.*{found}"):
        _load(tmp_path)
    (tmp_path / "annotations.json").write_text("{")
    with pytest.raises(RecipeError, match=r"cannot read .*annotations\.json"):
        _load(tmp_path)
