# SPDX-License-Identifier: Apache-2.0
"""How a photo becomes a model's input; written into the package, so that a device does the same.

Order: upright (EXIF), RGB, resize the shorter side, crop the centre, scale, subtract mean, divide by std, lay out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_wire import seam
from edgeopt_wire.document import from_json, to_json
from edgeopt_wire.errors import DocumentError, RecipeError
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = ("bicubic", "bilinear", "nearest")


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

    def photo(self, path: Path, spec: TensorSpec) -> np.ndarray:
        """Read one photo into the tensor `spec`, batch 1.

        Raises:
            RecipeError: It is no image that Pillow reads, or the result does not fit `spec`.
        """
        import numpy as np
        from PIL import Image, ImageOps, UnidentifiedImageError

        filters = {
            "bicubic": Image.Resampling.BICUBIC,
            "bilinear": Image.Resampling.BILINEAR,
            "nearest": Image.Resampling.NEAREST,
        }
        try:
            with Image.open(path) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGB")
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise RecipeError(f"cannot read the image {path}: {error}") from error
        factor = self.resize / min(upright.size)
        size = tuple(max(self.crop, round(side * factor)) for side in upright.size)
        resized = upright.resize((size[0], size[1]), filters[self.resample])
        left, top = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        pixels = np.asarray(resized.crop((left, top, left + self.crop, top + self.crop)), np.float32)
        values = (pixels * np.float32(self.scale) - np.asarray(self.mean, np.float32)) / np.asarray(
            self.std, np.float32
        )
        laid_out = values[None] if spec.layout == "NHWC" else values.transpose(2, 0, 1)[None]
        if laid_out.shape != spec.shape:
            raise RecipeError(
                f"preprocess gives {laid_out.shape} for {path.name}, the input {spec.name!r} is {spec.shape} "
                f"({spec.layout or 'no layout'}); set crop (now {self.crop}) to the model's image size"
            )
        return np.ascontiguousarray(laid_out.astype(spec.dtype))
