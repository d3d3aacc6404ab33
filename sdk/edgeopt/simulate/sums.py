# SPDX-License-Identifier: Apache-2.0
"""Exact sums of integer products: convolution and matrix product in numpy, fast because BLAS does them.

Products of 8-bit integers are whole numbers; float32 adds them exactly below 2**24, float64 below 2**53 (IEEE 754).
So each sum runs in the narrowest float type that cannot round it.

Order of the summed index K, which decides what is added to what in saturating arithmetic: for a convolution the
kernel's positions row by row, and at each position the input channels of the group, as ONNX Runtime packs it
(`ReorderFilter` and the NHWC `Im2col` in `providers/cpu/quantization/qlinearconv.cc`; `MlasConvSymPackW` in
`mlas/lib/convsym.cpp`, which takes 4 channels at a time, keeps the same neighbours).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

FLOAT32_EXACT = 1 << 24
"""Whole numbers up to this size are exact in float32 (24 bits of significand)."""


@dataclass(frozen=True)
class Window:
    """How a kernel moves over an image; all have one entry a spatial axis, `pads` has those at the end last."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]

    def output(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The spatial size of the output for an input's spatial size."""
        axes = len(self.kernel)
        return tuple(
            (size[axis] + self.pads[axis] + self.pads[axes + axis] - self.reach(axis)) // self.strides[axis]
            + 1
            for axis in range(axes)
        )

    def reach(self, axis: int) -> int:
        """How many entries of the input the kernel spans along an axis."""
        return self.dilations[axis] * (self.kernel[axis] - 1) + 1

    def pad(self, values: np.ndarray, fill: int | float) -> np.ndarray:
        """Pad (batch, channels, *spatial) with one value."""
        import numpy as np

        if not any(self.pads):
            return values
        axes = len(self.kernel)
        spatial = [(self.pads[axis], self.pads[axes + axis]) for axis in range(axes)]
        return np.pad(values, [(0, 0), (0, 0), *spatial], constant_values=fill)

    def views(self, padded: np.ndarray) -> list[np.ndarray]:
        """For each position of the kernel, row by row, what it sees: (batch, channels, *output)."""
        import numpy as np

        bare = Window(self.kernel, self.strides, self.dilations, (0,) * (2 * len(self.kernel)))
        size = bare.output(padded.shape[2:])
        found = []
        for position in np.ndindex(*self.kernel):
            cut = tuple(
                slice(start, start + (count - 1) * stride + 1, stride)
                for start, count, stride in zip(
                    (p * d for p, d in zip(position, self.dilations, strict=True)),
                    size,
                    self.strides,
                    strict=True,
                )
            )
            found.append(padded[(slice(None), slice(None), *cut)])
        return found


def window_of(attributes: Mapping[str, Any], kernel: tuple[int, ...], size: tuple[int, ...]) -> Window:
    """Read strides, dilations and pads of a Conv or a pool; `size` is the input's spatial size.

    `auto_pad` and `ceil_mode` become pads.
    """
    axes = len(kernel)
    strides = _numbers(attributes, "strides", (1,) * axes)
    dilations = _numbers(attributes, "dilations", (1,) * axes)
    auto = attributes.get("auto_pad", b"NOTSET").decode()
    pads = _numbers(attributes, "pads", (0,) * (2 * axes))
    window = Window(kernel, strides, dilations, pads if auto == "NOTSET" else (0,) * (2 * axes))
    if auto.startswith("SAME"):
        totals = [
            max(
                0,
                (math.ceil(size[axis] / strides[axis]) - 1) * strides[axis] + window.reach(axis) - size[axis],
            )
            for axis in range(axes)
        ]
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        pads = (*small, *large) if auto == "SAME_UPPER" else (*large, *small)
        window = Window(kernel, strides, dilations, pads)
    return _with_last_window(window, size) if attributes.get("ceil_mode", 0) else window


def columns(padded: np.ndarray, window: Window, groups: int) -> np.ndarray:
    """Lay out what each output position sees: (groups, batch * positions, K), K as the module says."""
    import numpy as np

    views = window.views(padded)
    batch, channels = padded.shape[:2]
    stacked = np.stack(views, axis=-1).reshape(batch, groups, channels // groups, -1, len(views))
    ordered = stacked.transpose(1, 0, 3, 4, 2)  # groups, batch, positions, kernel, channels of the group
    return np.ascontiguousarray(ordered).reshape(groups, ordered.shape[1] * ordered.shape[2], -1)


def exact_type(largest_sum: float) -> str:
    """The narrowest float type in which whole numbers up to this size add up without rounding."""
    return "float32" if largest_sum < FLOAT32_EXACT else "float64"


def wrapped(total: np.ndarray) -> np.ndarray:
    """Whole numbers as a sum in 32 bits keeps them: modulo 2**32, from -2**31 on."""
    import numpy as np

    if np.abs(total).max(initial=0) < 1 << 31:
        return total
    return np.asarray(np.mod(total + (1 << 31), 1 << 32) - (1 << 31))


def depthwise(views: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Sum, for each channel, what the kernel's positions see times the weights (channels, positions)."""
    spatial = (1,) * (views[0].ndim - 2)
    total: np.ndarray = views[0] * weights[:, 0].reshape(1, -1, *spatial)
    for position, view in enumerate(views[1:], start=1):
        total += view * weights[:, position].reshape(1, -1, *spatial)
    return total


def _numbers(attributes: Mapping[str, Any], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    values = attributes.get(name)
    return tuple(int(value) for value in values) if isinstance(values, list | tuple) else default


def _with_last_window(window: Window, size: tuple[int, ...]) -> Window:
    """Pad the end so that a last, partly filled window is seen, unless it would begin in the padding."""
    axes = len(size)
    pads = list(window.pads)
    for axis, outputs in enumerate(window.output(size)):
        spanned = (outputs - 1) * window.strides[axis] + window.reach(axis)
        has_rest = spanned < size[axis] + pads[axis] + pads[axes + axis]
        if has_rest and outputs * window.strides[axis] < size[axis] + pads[axis]:
            pads[axes + axis] = outputs * window.strides[axis] + window.reach(axis) - size[axis] - pads[axis]
    return Window(window.kernel, window.strides, window.dilations, tuple(pads))
