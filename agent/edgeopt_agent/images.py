# SPDX-License-Identifier: Apache-2.0
"""A photo becomes a model's input, by the `preprocess` keys of a manifest; host and device share this code.

Order: upright (EXIF), RGB, resize the shorter side to `resize`, crop the centre to `crop`, multiply by `scale`,
subtract `mean`, divide by `std`, lay out as the input wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_wire.errors import RecipeError, UnsupportedError
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = ("bicubic", "bilinear", "nearest")
DEFAULTS: Mapping[str, Any] = {
    "resize": 256,
    "crop": 224,
    "resample": "bicubic",
    "scale": 1 / 255,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
"""What a key means where it is left out: the usual ImageNet preprocessing."""


def load_photo(path: Path, keys: Mapping[str, Any], spec: TensorSpec) -> np.ndarray:
    """Read one photo into the tensor `spec`, batch 1.

    Raises:
        RecipeError: It is no image that Pillow reads, or the result does not fit `spec`.
        UnsupportedError: Pillow is not installed.
    """
    try:
        import numpy as np
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise UnsupportedError("reading photos needs Pillow and numpy: pip install pillow numpy") from error
    wanted = {**DEFAULTS, **keys}
    crop = int(wanted["crop"])
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise RecipeError(f"cannot read the image {path}: {error}") from error
    factor = int(wanted["resize"]) / min(upright.size)
    width, height = (max(crop, round(side * factor)) for side in upright.size)
    resample = Image.Resampling[str(wanted["resample"]).upper()]
    resized = upright.resize((width, height), resample)
    left, top = (width - crop) // 2, (height - crop) // 2
    pixels = np.asarray(resized.crop((left, top, left + crop, top + crop)), np.float32)
    mean, std = np.asarray(wanted["mean"], np.float32), np.asarray(wanted["std"], np.float32)
    values = (pixels * np.float32(wanted["scale"]) - mean) / std
    laid_out = values[None] if spec.layout == "NHWC" else values.transpose(2, 0, 1)[None]
    if laid_out.shape != spec.shape:
        raise RecipeError(
            f"preprocess gives {laid_out.shape} for {path.name}, the input {spec.name!r} is {spec.shape} "
            f"({spec.layout or 'no layout'}); set crop (now {crop}) to the model's image size"
        )
    return np.ascontiguousarray(laid_out.astype(spec.dtype))
