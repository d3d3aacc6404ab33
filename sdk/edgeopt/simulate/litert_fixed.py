# SPDX-License-Identifier: Apache-2.0
"""Where LiteRT rounds in ways of its own: sums of two tensors, hard-swish, averages, and ranges found as data comes.

Sources, none of their code: XNNPACK `src/microparams-init.c` (`qs8_add_minmax`: both scales over the output's as 21-bit
multipliers with one shift, half rounds up; `qs8_cvt`) and `src/xnnpack/quantization.h` (`qd8`); TensorFlow Lite
`kernels/internal/reference/hard_swish.h` with
`kernels/internal/common.h` (multipliers of 16 and 31 bits; Jacob et al. 2018, appendix B) and
`reference/integer_ops/pooling.h` (whole division, half rounds away from zero).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgeopt.simulate.values import Grid, Quantized

if TYPE_CHECKING:
    import numpy as np

_ADD_BITS = 20
_HIGH = 15
"""Bits of fraction of a 16-bit fixed-point number."""


def add(first: Quantized, second: Quantized, grid: Grid, *, sign: int = 1) -> np.ndarray:
    """Add two tensors, or subtract the second with `sign` -1: integers on `grid`, of any size, before clamping."""
    import numpy as np

    ratios = [np.float32(_one(value.grid.scale) / _one(grid.scale)) for value in (first, second)]
    shift = _ADD_BITS - (math.frexp(float(max(ratios)))[1] - 1)
    total: np.ndarray = np.asarray(1 << (shift - 1), np.int64)
    for value, ratio, factor in zip((first, second), ratios, (1, sign), strict=True):
        multiplier = factor * int(np.rint(np.ldexp(np.float64(ratio), shift)))
        total = total + multiplier * (value.integers.astype(np.int64) - int(_one(value.grid.zero_point)))
    return np.asarray((total >> shift) + int(_one(grid.zero_point)))


def convert(value: Quantized, grid: Grid) -> np.ndarray:
    """Bring integers to another grid by a multiplier with 8 bits of fraction, half rounds up: before clamping."""
    import numpy as np

    multiplier = int(np.rint(np.float32(256) * np.float32(_one(value.grid.scale) / _one(grid.scale))))
    centred = value.integers.astype(np.int64) - int(_one(value.grid.zero_point))
    return np.asarray(((centred * multiplier + 128) >> 8) + int(_one(grid.zero_point)))


def scaled(sums: np.ndarray, ratio: float) -> np.ndarray:
    """Multiply whole numbers by a positive ratio of 31 bits, which rounds twice, each time half away from zero."""
    import numpy as np

    fraction, exponent = math.frexp(ratio)
    multiplier = round(fraction * (1 << 31))
    if multiplier == 1 << 31:
        multiplier, exponent = multiplier // 2, exponent + 1
    product = (sums << max(exponent, 0)) * multiplier
    nudge = np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    return _divided(_towards_zero(product + nudge, 31), max(-exponent, 0))


def hard_swish(value: Quantized, grid: Grid) -> np.ndarray:
    """Hard-swish, x * relu6(x + 3) / 6 in 16-bit fixed point: integers on `grid`, before clamping."""
    import numpy as np

    fine = np.float32(1 / 128) * np.float32(_one(value.grid.scale))
    output, output_shift = _multiplier(float(np.float32(fine / np.float32(_one(grid.scale)))))
    gate, gate_shift = _multiplier(float(np.float32(fine / np.float32(3.0 / 32768.0))))
    x = (value.integers.astype(np.int64) - int(_one(value.grid.zero_point))) << 7
    scaled = _high_product(x, output)
    opened = x
    if gate_shift > 0:
        opened = _saturated(opened << (gate_shift - 1))
    opened = _high_product(opened, gate)
    opened = _saturated(opened << 1) if gate_shift > 0 else _divided(opened, -gate_shift)
    opened = (opened + (1 << _HIGH)) >> 1
    product = _towards_zero(opened * scaled, _HIGH)
    return np.asarray(_divided(product, -output_shift) + int(_one(grid.zero_point)))


def average(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Divide whole sums by counts; half rounds away from zero."""
    import numpy as np

    half = counts // 2
    return np.asarray(np.where(sums > 0, (sums + half) // counts, -((-sums + half) // counts)))


def rows_to_integers(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round each entry of the first axis to 8 bits of its own range, as XNNPACK does before it multiplies (`qd8`).

    Returns:
        Whole numbers less their zero points, float64, and the size of a step for each entry.
    """
    import numpy as np

    one = np.float32(1)
    flat = rows.reshape(len(rows), -1).astype(np.float32)
    low, high = (np.asarray(end, np.float32) for end in (flat.min(1).clip(max=0), flat.max(1).clip(min=0)))
    steps = np.where(low == high, one, np.float32(255) / np.where(low == high, one, high - low))
    from_low, from_high = np.float32(-128) - low * steps, np.float32(127) - high * steps
    is_nearer_low = (np.float32(-128) + low * steps) + (np.float32(127) + high * steps) > 0
    zero = np.rint(np.clip(np.where(is_nearer_low, from_low, from_high), -128, 127))[:, None]
    found = np.clip(np.rint(flat * steps[:, None]) + zero, -128, 127) - zero
    return found.astype(np.float64).reshape(rows.shape), np.asarray(one / steps, np.float32)


def _multiplier(ratio: float) -> tuple[int, int]:
    """A positive number as 16-bit fraction and power of two."""
    fraction, exponent = math.frexp(float(ratio))
    wide = round(fraction * (1 << 31))
    if wide == 1 << 31:
        wide, exponent = wide // 2, exponent + 1
    return min((wide + (1 << 15)) >> 16, (1 << _HIGH) - 1), exponent


def _high_product(values: np.ndarray, factor: int) -> np.ndarray:
    """The upper half of twice the product of 16-bit numbers, rounded; half goes up."""
    import numpy as np

    product = values * factor
    nudge = np.where(product >= 0, 1 << (_HIGH - 1), 1 - (1 << (_HIGH - 1)))
    return _saturated(_towards_zero(product + nudge, _HIGH))


def _towards_zero(values: np.ndarray, bits: int) -> np.ndarray:
    import numpy as np

    return np.asarray(np.sign(values) * (np.abs(values) >> bits))


def _divided(values: np.ndarray, bits: int) -> np.ndarray:
    """Divide by a power of two; half rounds away from zero."""
    if bits <= 0:
        return values
    mask = (1 << bits) - 1
    threshold = (mask >> 1) + (values < 0)
    return (values >> bits) + ((values & mask) > threshold)


def _saturated(values: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.asarray(np.clip(values, -(1 << _HIGH), (1 << _HIGH) - 1))


def _one(values: np.ndarray) -> np.ndarray:
    return values.reshape(())
