# SPDX-License-Identifier: Apache-2.0
"""How a photo or a text becomes a model's input: checked keys for what host and device share.

`edgeopt_agent.images` reads photos; texts are `edgeopt.evaluate.texts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent.images import RESAMPLES, load_photo
from edgeopt_wire import seam
from edgeopt_wire.document import from_json, to_json
from edgeopt_wire.errors import DocumentError, RecipeError
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.texts import TextPreprocess

KINDS = ("image", "text")


@dataclass(frozen=True)
class Place:
    """Where a resized photo is cropped: its size after resizing, and the left upper corner of the crop, in pixels."""

    width: int
    height: int
    left: int
    top: int


@dataclass(frozen=True)
class Preprocess:
    """`resize` is the shorter side and `crop` the square's side, in pixels; mean and std are per channel after scale."""

    resize: int = 256
    crop: int = 224
    resample: str = "bicubic"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.resample not in RESAMPLES:
            raise RecipeError(seam.unknown("resample", self.resample, RESAMPLES))
        if not 0 < self.crop <= self.resize:
            raise RecipeError(
                f"preprocess: expected 0 < crop <= resize, found crop {self.crop}, resize {self.resize}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or any(value <= 0 for value in self.std):
            raise RecipeError("preprocess: mean and std have three entries, std is positive")

    @classmethod
    def from_mapping(cls, keys: Mapping[str, Any]) -> Preprocess:
        """Read a recipe's `[preprocess]` or a manifest's.

        Raises:
            RecipeError: An unknown key or a wrong type.
        """
        known = {entry.name for entry in dataclasses.fields(cls)}
        if keys.get("kind", "image") != "image":
            raise RecipeError(f"preprocess is of kind {keys['kind']!r}, expected that of photos")
        keys = {key: value for key, value in keys.items() if key != "kind"}
        for key in keys:
            if key not in known:
                raise RecipeError(f"preprocess: {seam.unknown('key', key, known)}")
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in keys.items()}
        try:
            return from_json(cls, plain, "preprocess")
        except DocumentError as error:
            raise RecipeError(str(error)) from error

    def as_mapping(self) -> dict[str, Any]:
        """The keys of a recipe's `[preprocess]`."""
        found: dict[str, Any] = to_json(self)
        return found

    def place(self, width: int, height: int) -> Place:
        """What happens to a photo of this size, upright; labels that lie in it must follow."""
        factor = self.resize / min(width, height)
        wide, high = (max(self.crop, round(side * factor)) for side in (width, height))
        return Place(wide, high, (wide - self.crop) // 2, (high - self.crop) // 2)

    def photo(self, path: Path, spec: TensorSpec) -> np.ndarray:
        """Read one photo into the tensor `spec`, batch 1.

        Raises:
            RecipeError: It is no image that Pillow reads, or the result does not fit `spec`.
        """
        return load_photo(path, self.as_mapping(), spec)


def read_preprocess(
    keys: Mapping[str, Any], inputs: Sequence[TensorSpec]
) -> Preprocess | TextPreprocess | None:
    """What `[preprocess]` of a recipe or a manifest says for a model with these inputs; None where it says nothing.

    Raises:
        RecipeError: An unknown kind, key or value, or a tokenizer that cannot be read.
    """
    if not keys:
        return None
    kind = keys.get("kind", KINDS[0])
    if kind not in KINDS:
        raise RecipeError(f"preprocess: {seam.unknown('kind', str(kind), KINDS)}")
    if kind == "image":
        return Preprocess.from_mapping(keys)
    from edgeopt.evaluate.texts import TextPreprocess

    return TextPreprocess.from_mapping(keys).fitted(inputs)
