# SPDX-License-Identifier: Apache-2.0
"""What flows through a simulated QDQ model: floats, integers with their scale, and sums that are not rounded yet.

A value stays what it is until something asks for another form: integers move through a transpose as integers, a
convolution's sum is rounded once, by the QuantizeLinear behind it. So the simulation rounds where ONNX Runtime's
fused kernels round, without a table of its fusions.

Sources: ONNX operators QuantizeLinear and DequantizeLinear; ONNX Runtime `mlas/lib/requantize.cpp` (sum to float32,
one multiplication by `x_scale * w_scale / y_scale` in float32, clip, round half to even, add the zero point).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Grid:
    """The integers of a tensor: their type, and the scale and zero point (one, or one for each entry of `axis`)."""

    dtype: np.dtype[Any]
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int = 1

    def spread(self, values: np.ndarray, rank: int) -> np.ndarray:
        """Shape scales or zero points so that they broadcast along the axis of a tensor of this rank."""
        if values.size == 1:
            return values.reshape(())
        shape = [1] * rank
        shape[self.axis % rank] = values.size
        return values.reshape(shape)


@dataclass(frozen=True)
class Quantized:
    """Integers on a grid."""

    integers: np.ndarray
    grid: Grid

    def real(self) -> np.ndarray:
        """The float32 values that DequantizeLinear gives."""
        import numpy as np

        rank = self.integers.ndim
        centred = self.integers.astype(np.int32) - self.grid.spread(self.grid.zero_point, rank)
        return np.asarray(centred.astype(np.float32) * self.grid.spread(self.grid.scale, rank), np.float32)


@dataclass(frozen=True)
class Accumulated:
    """Exact sums of products before rounding; `scale` (float32) broadcasts over them."""

    sums: np.ndarray
    scale: np.ndarray

    def real(self) -> np.ndarray:
        """The float32 values that these sums stand for."""
        import numpy as np

        return np.asarray(self.sums.astype(np.float32) * self.scale, np.float32)


@dataclass(frozen=True)
class Shares:
    """A softmax of integers, which has an integer kernel of its own."""

    shares: np.ndarray

    def real(self) -> np.ndarray:
        """The shares themselves, float32."""
        return self.shares


@dataclass(frozen=True)
class Added:
    """The sum of two tensors of 8-bit integers with one scale each, which has an integer kernel of its own."""

    first: Quantized
    second: Quantized

    def real(self) -> np.ndarray:
        """The float32 values of the sum."""
        import numpy as np

        return np.asarray(self.first.real() + self.second.real(), np.float32)

    def scaled(self, grid: Grid) -> np.ndarray:
        """The sum in steps of `grid`, its zero point added, before rounding (`mlas/lib/qladd.cpp`).

        Both zero points are one float32 constant; products are added without rounding between (fused multiply-add).
        """
        import numpy as np

        ratios = [
            np.float32(part.grid.scale.reshape(()) / grid.scale.reshape(()))
            for part in (self.first, self.second)
        ]
        zeros = [np.float32(part.grid.zero_point.reshape(())) for part in (self.first, self.second)]
        shift = np.float32(ratios[0] * zeros[0]) + np.float32(ratios[1] * zeros[1])
        total: np.ndarray = np.asarray(
            np.float32(grid.zero_point.reshape(())) - np.float32(shift), np.float64
        )
        for part, ratio in ((self.second, ratios[1]), (self.first, ratios[0])):
            total = (
                (part.integers.astype(np.float64) * np.float64(ratio) + total)
                .astype(np.float32)
                .astype(np.float64)
            )
        return np.asarray(total)


Value = Any
"""A numpy array, a `Quantized`, an `Accumulated`, `Shares` or an `Added`."""


def real(value: Value) -> np.ndarray:
    """Give any value as an array: integers and sums as float32, plain arrays as they are."""
    import numpy as np

    return value.real() if isinstance(value, Quantized | Accumulated | Shares | Added) else np.asarray(value)


def quantize(value: Value, grid: Grid) -> np.ndarray:
    """Round a value onto a grid, as QuantizeLinear does or as the kernel does that ONNX Runtime fuses it into.

    A NaN, which has no integer, becomes the lowest one.
    """
    import numpy as np

    if isinstance(value, Added) and grid.scale.size == 1 and grid.dtype.itemsize == 1:
        ends = np.iinfo(grid.dtype)
        return np.asarray(np.rint(value.scaled(grid)).clip(ends.min, ends.max).astype(grid.dtype))
    if isinstance(value, Accumulated):
        rank = value.sums.ndim
        multiplier = np.asarray(value.scale / grid.spread(grid.scale, rank), np.float32)
        scaled = value.sums.astype(np.float32) * multiplier
    elif isinstance(value, Shares):
        # whole steps only: `contrib_ops/cpu/quantization/qlinear_softmax.cc` rounds 1 / scale down
        rank = value.shares.ndim
        scaled = value.shares * np.floor(np.float32(1) / grid.spread(grid.scale, rank))
    else:
        values = real(value)
        rank = values.ndim
        scaled = values.astype(np.float32) / grid.spread(grid.scale, rank)
    limits = np.iinfo(grid.dtype)
    zero_point = grid.spread(grid.zero_point, rank).astype(np.float32)
    scaled = np.nan_to_num(scaled, nan=-np.inf)
    shifted = np.rint(np.clip(scaled, limits.min - zero_point, limits.max - zero_point)) + zero_point
    return np.asarray(shifted.astype(grid.dtype))
