# SPDX-License-Identifier: Apache-2.0
"""A photo becomes a model's input, by the `preprocess` keys of a manifest; host and device share this code.

Order: upright (EXIF), RGB, resize the shorter side to `resize`, crop the centre to `crop`, multiply by `scale`,
subtract `mean`, divide by `std`, lay out as the input wants.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_wire.errors import RecipeError, UnsupportedError
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

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


MAX_PIXELS = 50_000_000
"""A photo of more is refused before it is decoded: 150 MB of memory for one request is enough."""

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
"""What is decoded of bytes that came over the socket; a file of the user's own may be anything that Pillow reads."""


def load_photo(path: Path, keys: Mapping[str, Any], spec: TensorSpec) -> np.ndarray:
    """Read one photo into the tensor `spec`, batch 1.

    Raises:
        RecipeError: It is no image that Pillow reads, or the result does not fit `spec`.
        UnsupportedError: Pillow is not installed.
    """
    return photo_tensor(path, keys, spec)


def photo_tensor(photo: Path | bytes | np.ndarray, keys: Mapping[str, Any], spec: TensorSpec) -> np.ndarray:
    """Turn a photo (a file, its bytes, or pixels as uint8 of (height, width, 3)) into the tensor `spec`, batch 1.

    Raises:
        RecipeError: It is no image that Pillow reads, or the result does not fit `spec`.
        UnsupportedError: Pillow is not installed.
    """
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError("reading photos needs Pillow and numpy: pip install pillow numpy") from error
    wanted = {**DEFAULTS, **keys}
    crop = int(wanted["crop"])
    upright = _decode(photo)
    factor = int(wanted["resize"]) / min(upright.size)
    width, height = (max(crop, round(side * factor)) for side in upright.size)
    if width * height > MAX_PIXELS:
        raise RecipeError(
            f"an image of {upright.width} x {upright.height} pixels is {width} x {height} when resized"
        )
    resample = Image.Resampling[str(wanted["resample"]).upper()]
    resized = upright.resize((width, height), resample)
    left, top = (width - crop) // 2, (height - crop) // 2
    pixels = np.asarray(resized.crop((left, top, left + crop, top + crop)), np.float32)
    mean, std = np.asarray(wanted["mean"], np.float32), np.asarray(wanted["std"], np.float32)
    values = (pixels * np.float32(wanted["scale"]) - mean) / std
    laid_out = values[None] if spec.layout == "NHWC" else values.transpose(2, 0, 1)[None]
    if laid_out.shape != spec.shape:
        name = photo.name if isinstance(photo, Path) else "a photo"
        raise RecipeError(
            f"preprocess gives {laid_out.shape} for {name}, the input {spec.name!r} is {spec.shape} "
            f"({spec.layout or 'no layout'}); set crop (now {crop}) to the model's image size"
        )
    return np.ascontiguousarray(laid_out.astype(spec.dtype))


def _decode(photo: Path | bytes | np.ndarray) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not isinstance(photo, (Path, bytes)):
        return Image.fromarray(photo)
    try:
        source, formats = (io.BytesIO(photo), FORMATS) if isinstance(photo, bytes) else (photo, None)
        with Image.open(source, formats=formats) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise RecipeError(
                    f"an image of {opened.width} x {opened.height} pixels; at most {MAX_PIXELS} are read"
                )
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        name = photo if isinstance(photo, Path) else f"({len(photo)} bytes)"
        raise RecipeError(f"cannot read the image {name}: {error}") from error
