# SPDX-License-Identifier: Apache-2.0
"""The demo's photos: calibration and evaluation, never the same ones.

With `EDGEOPT_DATA` set to a folder that holds `imagenet1k-sample` (photos and labels.csv), every fourth photo
calibrates and the others evaluate. Without it: photos that scikit-image ships calibrate, and foolbox's 20 labelled
ImageNet photos evaluate. Twenty photos show that the thing works; they prove no accuracy.
"""

from __future__ import annotations

import csv
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from edgeopt_wire.errors import UnsupportedError

SAMPLE = "imagenet1k-sample"
CALIBRATE_EVERY = 4
CALIBRATION_PHOTOS = (
    "astronaut",
    "chelsea",
    "coffee",
    "motorcycle_left",
    "motorcycle_right",
    "rocket",
    "retina",
)


@dataclass(frozen=True)
class Photos:
    """Two folders, and a sentence that says what is in them."""

    calibration: Path
    evaluation: Path
    description: str


def prepare(folder: Path) -> Photos:
    """Lay out both folders below `folder`.

    Raises:
        UnsupportedError: There is no data folder and the packages that ship photos are not installed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    calibration, evaluation = folder / "calibration", folder / "evaluation"
    calibration.mkdir(parents=True)
    evaluation.mkdir()
    data = os.environ.get("EDGEOPT_DATA", "")
    sample = Path(data) / SAMPLE if data else None
    if sample and (sample / "labels.csv").is_file():
        return _split(sample, calibration, evaluation)
    return _from_packages(calibration, evaluation)


def _split(sample: Path, calibration: Path, evaluation: Path) -> Photos:
    with (sample / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["file"], row["class_index"]) for row in csv.DictReader(file)]
    parts = {
        calibration: rows[::CALIBRATE_EVERY],
        evaluation: [r for i, r in enumerate(rows) if i % CALIBRATE_EVERY],
    }
    for folder, part in parts.items():
        _write(folder, [(sample / name, label) for name, label in part])
    n, m = len(parts[calibration]), len(parts[evaluation])
    return Photos(calibration, evaluation, f"{n} photos calibrate, {m} other labelled photos evaluate")


def _from_packages(calibration: Path, evaluation: Path) -> Photos:
    try:
        import foolbox
        import skimage
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError(
            "the demo needs photos: pip install 'edgeopt[demo]', or set EDGEOPT_DATA"
        ) from error
    shipped = Path(skimage.__file__).parent / "data"
    for path in sorted(shipped.iterdir()):
        if path.stem in CALIBRATION_PHOTOS:
            with Image.open(path) as photo:
                _cut(photo.convert("RGB"), calibration, path.stem)
    labelled = sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*_*.jpg"))
    _write(evaluation, [(path, path.stem.rpartition("_")[2]) for path in labelled])
    n = len(list(calibration.iterdir()))
    return Photos(
        calibration, evaluation, f"{n} crops of shipped photos calibrate, {len(labelled)} labelled evaluate"
    )


def _cut(photo: object, folder: Path, name: str) -> None:
    """Save a photo whole and in four quarters: few photos, more textures."""
    from PIL import Image

    assert isinstance(photo, Image.Image)
    w, h = photo.size
    boxes = [(0, 0, w, h), *((x, y, x + w // 2, y + h // 2) for x in (0, w // 2) for y in (0, h // 2))]
    for number, box in enumerate(boxes):
        photo.crop(box).save(folder / f"{name}_{number}.png")


def _write(folder: Path, photos: list[tuple[Path, str]]) -> None:
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label"))
        for path, label in photos:
            shutil.copyfile(path, folder / path.name)
            writer.writerow((path.name, label))
