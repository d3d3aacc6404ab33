# SPDX-License-Identifier: Apache-2.0
"""Convolutions and pools of LiteRT over (batch, height, width, channels) arrays of any number type, exact on whole numbers.

Padding is the schema's: SAME puts the odd entry at the end, VALID pads nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeopt.simulate.sums import Window, columns, window_of
from edgeopt.simulate.sums import depthwise as each_position

if TYPE_CHECKING:
    import numpy as np

_SAME = 0


def convolve(x: np.ndarray, weights: np.ndarray, options: Any) -> np.ndarray:
    """Convolve with weights (out, height, width, in of a group); padding is 0."""
    import numpy as np

    outputs, height, width, inner = weights.shape
    image = _first(x)
    window = _window(options, (height, width), image)
    groups = image.shape[1] // inner
    rows = columns(window.pad(image, 0), window, groups)
    matrix = weights.reshape(groups, outputs // groups, height * width * inner).transpose(0, 2, 1)
    found = np.matmul(rows, matrix)  # groups, batch * positions, outputs of a group
    size = window.output(image.shape[2:])
    return np.asarray(found.transpose(1, 0, 2).reshape(image.shape[0], *size, outputs))


def convolve_each(x: np.ndarray, weights: np.ndarray, options: Any) -> np.ndarray:
    """Convolve every channel by itself, with weights (1, height, width, channels times multiplier)."""
    import numpy as np

    _, height, width, outputs = weights.shape
    image = np.repeat(_first(x), outputs // x.shape[3], axis=1)
    window = _window(options, (height, width), image)
    flat = weights.reshape(height * width, outputs).T
    return _last(each_position(window.views(window.pad(image, 0)), flat))


def window_sums(x: np.ndarray, options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Add what each window sees of the image, and count it; padding is not counted."""
    import numpy as np

    image = _first(x)
    window = _window(options, (options.filterHeight, options.filterWidth), image)
    ones = np.ones((1, 1, *image.shape[2:]), x.dtype)
    sums, counts = (np.asarray(sum(window.views(window.pad(part, 0)))) for part in (image, ones))
    return _last(sums), _last(counts)


def largest(x: np.ndarray, options: Any) -> np.ndarray:
    """Take the largest that each window sees."""
    import numpy as np

    image = _first(x)
    window = _window(options, (options.filterHeight, options.filterWidth), image)
    lowest = np.iinfo(image.dtype).min if image.dtype.kind in "iu" else -np.inf
    return _last(np.max(window.views(window.pad(image, lowest)), axis=0))


def repeat(x: np.ndarray, shape: tuple[int, ...], options: Any) -> np.ndarray:
    """Take the nearest entry for each of a larger or smaller image, by LiteRT's rule (`resize_nearest_neighbor.h`)."""
    import numpy as np

    found = x
    for axis in (1, 2):
        before, after = x.shape[axis], shape[axis]
        is_aligned = bool(options.alignCorners) and after > 1
        scale = (
            np.float32(before - 1) / np.float32(after - 1)
            if is_aligned
            else np.float32(before) / np.float32(after)
        )
        offset = np.float32(0.5) if options.halfPixelCenters else np.float32(0)
        places = (np.arange(after, dtype=np.float32) + offset) * scale
        places = np.rint(places) if is_aligned else np.floor(places)
        found = np.take(found, np.clip(places.astype(np.int64), 0, before - 1), axis)
    return np.asarray(found)


def _window(options: Any, kernel: tuple[int, int], image: np.ndarray) -> Window:
    attributes = {
        "strides": [options.strideH, options.strideW],
        "dilations": [
            getattr(options, "dilationHFactor", 1) or 1,
            getattr(options, "dilationWFactor", 1) or 1,
        ],
        "auto_pad": b"SAME_UPPER" if options.padding == _SAME else b"VALID",
    }
    return window_of(attributes, kernel, image.shape[2:])


def _first(x: np.ndarray) -> np.ndarray:
    """Channels first."""
    return x.transpose(0, 3, 1, 2)


def _last(x: np.ndarray) -> np.ndarray:
    """Channels last."""
    return x.transpose(0, 2, 3, 1)
