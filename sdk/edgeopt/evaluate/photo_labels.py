# SPDX-License-Identifier: Apache-2.0
"""Boxes and masks that lie beside photos, brought into the model's input as the photo is.

Rules:
- `annotations.json` in the folder is COCO's format: boxes as x, y, width, height in pixels of the upright photo. Files
  are looked for in the folder and in its `images`.
- Folders `images` and `masks` hold a photo and a mask of the same name and size; a mask's pixels are class indexes.
- A label is resized and cropped as its photo is, a mask without blending. An object that the crop leaves less than half
  of counts neither as right nor as wrong (it becomes a crowd); one that it leaves nothing of is left out.
- `classes` are the places of the categories, sorted by id, from 0; `category_ids` are COCO's own numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from edgeopt.evaluate.preprocess import Preprocess
from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    from edgeopt.evaluate.labels import Label

COCO_FILE, IMAGES, MASKS = "annotations.json", "images", "masks"
MASK_MODES = ("L", "P", "1", "I", "I;16")
VISIBLE_SHARE = 0.5
"""An object of which the crop leaves less is not asked for, as a detector cannot be blamed for either answer."""


@runtime_checkable
class Pending(Protocol):
    """A label that is read when its photo is."""

    def digest(self) -> bytes:
        """Bytes that stand for the label's content."""
        ...

    def read(self, photo: Path, preprocess: Preprocess) -> Label:
        """The label in the coordinates of the model's input."""
        ...


@dataclass(frozen=True)
class Mask:
    """A file whose pixels are class indexes."""

    path: Path

    def digest(self) -> bytes:
        """SHA-256 of the file."""
        try:
            return hashlib.sha256(self.path.read_bytes()).digest()
        except OSError as error:
            raise RecipeError(f"cannot read the mask {self.path}: {error.strerror}") from error

    def read(self, photo: Path, preprocess: Preprocess) -> Label:
        """Class indexes (crop, crop), uint8 or int32.

        Raises:
            RecipeError: It is no picture of one channel, or not of the photo's size.
        """
        import numpy as np
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.path) as opened:
                mask = opened.copy()
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise RecipeError(f"cannot read the mask {self.path}: {error}") from error
        size = _upright_size(photo)
        if mask.mode not in MASK_MODES or mask.size != size:
            raise RecipeError(
                f"the mask {self.path} must have one channel ({', '.join(MASK_MODES)}) and the size of its photo, "
                f"{size}; found mode {mask.mode}, size {mask.size}"
            )
        if mask.mode == "I;16":
            mask = mask.convert("I")
        place = preprocess.place(*size)
        resized = mask.resize((place.width, place.height), Image.Resampling.NEAREST)
        box = (place.left, place.top, place.left + preprocess.crop, place.top + preprocess.crop)
        pixels = np.asarray(resized.crop(box))
        return pixels.astype(np.uint8) if pixels.dtype.kind == "b" else pixels


@dataclass(frozen=True)
class Boxes:
    """Objects of one photo: (x, y, width, height), the category's place and id, and whether it is a crowd."""

    boxes: tuple[tuple[float, float, float, float], ...]
    classes: tuple[int, ...]
    category_ids: tuple[int, ...]
    crowd: tuple[bool, ...]

    def digest(self) -> bytes:
        """The values themselves."""
        return canonical_bytes([self.boxes, self.classes, self.category_ids, self.crowd])

    def read(self, photo: Path, preprocess: Preprocess) -> Label:
        """The parts boxes (n, 4) as left, top, right, bottom in pixels of the input, classes, category_ids, crowd."""
        import numpy as np

        width, height = _upright_size(photo)
        place = preprocess.place(width, height)
        given = np.asarray(self.boxes, np.float64).reshape(-1, 4)
        factor = np.asarray([place.width / width, place.height / height])
        low = given[:, :2] * factor - (place.left, place.top)
        high = low + given[:, 2:] * factor
        whole = (high - low).prod(1)
        low, high = (np.clip(ends, 0, preprocess.crop) for ends in (low, high))
        left = (high - low).prod(1)
        kept = left > 0
        cut = left < VISIBLE_SHARE * whole
        return {
            "boxes": np.concatenate((low, high), 1)[kept],
            "classes": np.asarray(self.classes, np.int64)[kept],
            "category_ids": np.asarray(self.category_ids, np.int64)[kept],
            "crowd": (np.asarray(self.crowd, bool) | cut)[kept],
        }


def find(folder: Path) -> list[tuple[Path, Pending]] | None:
    """The photos of a folder with their boxes or masks; None where there are neither.

    Raises:
        RecipeError: A photo has no mask, or the annotations are not COCO's.
    """
    if (folder / COCO_FILE).is_file():
        return list(_coco(folder, folder / COCO_FILE))
    if (folder / IMAGES).is_dir() and (folder / MASKS).is_dir():
        masks = {path.stem: path for path in sorted((folder / MASKS).iterdir()) if path.suffix}
        photos = sorted(path for path in (folder / IMAGES).iterdir() if not path.name.startswith("."))
        for path in photos:
            if path.stem not in masks:
                raise RecipeError(f"the photo {path} has no mask called {path.stem} in {folder / MASKS}")
        return [(path, Mask(masks[path.stem])) for path in photos]
    return None


def _coco(folder: Path, file: Path) -> list[tuple[Path, Pending]]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        ids = sorted(int(entry["id"]) for entry in data["categories"])
        rows: dict[Any, list[Mapping[str, Any]]] = {entry["id"]: [] for entry in data["images"]}
        for entry in data["annotations"]:
            rows[entry["image_id"]].append(entry)
        return sorted(
            (
                (_file(folder, str(entry["file_name"])), _boxes(rows[entry["id"]], ids))
                for entry in data["images"]
            ),
            key=lambda pair: pair[0],
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecipeError(f"cannot read {file}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"{file} is not in COCO's format: expected images (id, file_name), categories (id) and annotations "
            f"(image_id, category_id, bbox of four numbers); found {type(error).__name__}: {error}"
        ) from error


def _boxes(entries: list[Mapping[str, Any]], ids: list[int]) -> Boxes:
    boxes = []
    for entry in entries:
        x, y, width, height = (float(number) for number in entry["bbox"])
        boxes.append((x, y, width, height))
    categories = tuple(int(entry["category_id"]) for entry in entries)
    return Boxes(
        tuple(boxes),
        tuple(ids.index(number) for number in categories),
        categories,
        tuple(bool(entry.get("iscrowd", 0)) for entry in entries),
    )


def _file(folder: Path, name: str) -> Path:
    places = (folder / name, folder / IMAGES / name)
    return next((path for path in places if path.is_file()), places[0])


def _upright_size(photo: Path) -> tuple[int, int]:
    """Width and height after the turn that EXIF asks for, without decoding."""
    from PIL import Image, UnidentifiedImageError
    from PIL.ExifTags import Base

    try:
        with Image.open(photo) as opened:
            turned = opened.getexif().get(Base.Orientation, 1) in (5, 6, 7, 8)
            width, height = opened.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise RecipeError(f"cannot read the image {photo}: {error}") from error
    return (height, width) if turned else (width, height)
