# SPDX-License-Identifier: Apache-2.0
"""LiteRT operators that add up: convolutions, matrix products, means and pools; images are NHWC.

Rules:
- Sums of integer products stay exact until the output's grid rounds them, once.
- Sums are kept in 32 bits, and wrap: a bias that does not fit (a channel whose weights are nearly zero has a tiny scale)
  gives nonsense in the runtime too.
- Floats times integer weights: each row is rounded to 8 bits of its own range first, as the runtime does.
- With floats alone the same functions compute in floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgeopt.simulate import litert_fixed as fixed
from edgeopt.simulate import litert_images as images
from edgeopt.simulate import sums
from edgeopt.simulate.litert_values import Call, centred, clamped, is_plain, round_to
from edgeopt.simulate.values import Accumulated, Quantized, Value, real

if TYPE_CHECKING:
    import numpy as np


def convolution(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """CONV_2D: weights (out, height, width, in of a group), per channel along the first axis."""
    return (round_to(call, _summed(values, images.convolve, call, axis=0)),)


def depthwise(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """DEPTHWISE_CONV_2D: weights (1, height, width, out), per channel along the last axis."""
    return (round_to(call, _summed(values, images.convolve_each, call, axis=3)),)


def fully_connected(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """FULLY_CONNECTED: weights (out, in); leading axes of the input are rows."""

    def multiply(x: np.ndarray, w: np.ndarray, _options: Any) -> np.ndarray:
        import numpy as np

        rows = np.matmul(x.reshape(-1, w.shape[1]), w.T)
        return np.asarray(rows.reshape(call.shapes[0]))

    return (round_to(call, _summed(values, multiply, call, axis=0)),)


def batch_matmul(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """BATCH_MATMUL of two activations, or of one and weights of one scale."""
    import numpy as np

    first, second = values[0], values[1]
    turned = (bool(call.options.adjX), bool(call.options.adjY))

    def sides(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.swapaxes(left, -1, -2) if turned[0] else left,
            np.swapaxes(right, -1, -2) if turned[1] else right,
        )

    if not (is_plain(first) and is_plain(second)):
        return (round_to(call, np.matmul(*sides(real(first), real(second)))),)
    kind = sums.exact_type(255.0 * 255.0 * first.integers.shape[-2 if turned[0] else -1])
    total = np.matmul(*sides(*(centred(value).astype(kind) for value in (first, second))))
    factor = np.float64(first.grid.scale.reshape(())) * np.float64(second.grid.scale.reshape(()))
    grid = call.grids[0]
    if grid is None:
        return (np.asarray(total * factor, np.float32),)
    rounded = fixed.scaled(total.astype(np.int64), float(factor / np.float64(grid.scale.reshape(()))))
    return (clamped(call, rounded + int(grid.zero_point.reshape(())), grid),)


def _summed(values: Sequence[Value], multiply: Callable[..., np.ndarray], call: Call, *, axis: int) -> Value:
    """Products of an activation and weights with a bias: exact sums on integers, floats otherwise."""
    import numpy as np

    x, w = values[0], values[1]
    bias = values[2] if len(values) > 2 else None
    if isinstance(w, Quantized) and w.integers.dtype.itemsize == 1 and not isinstance(x, Quantized):
        found = _summed_rows(real(x), w, multiply, call)
        return np.asarray(found if bias is None else found + real(bias), np.float32)
    if not (isinstance(x, Quantized) and isinstance(w, Quantized)):
        total = multiply(np.asarray(real(x), np.float32), real(w), call.options)
        return np.asarray(total if bias is None else total + real(bias), np.float32)
    weights = centred(w)
    entries = np.abs(weights.astype(np.float64)).sum(axis=tuple(set(range(weights.ndim)) - {axis}))
    added = None if bias is None else np.asarray(bias.integers if isinstance(bias, Quantized) else bias)
    peak = 0.0 if added is None else float(np.abs(added.astype(np.float64)).max(initial=0.0))
    kind = sums.exact_type(255.0 * float(entries.max(initial=0.0)) + peak)
    total = multiply(centred(x).astype(kind), weights.astype(kind), call.options)
    if added is not None:
        total = sums.wrapped(total + added.astype(kind))
    scale = np.asarray(x.grid.scale.reshape(()) * w.grid.scale, np.float32)
    return Accumulated(total, scale.reshape(()) if scale.size == 1 else scale)


def _summed_rows(x: np.ndarray, w: Quantized, multiply: Callable[..., np.ndarray], call: Call) -> np.ndarray:
    """Products of floats and integer weights: each row (of a batch, for images) is rounded to 8 bits as it comes."""
    import numpy as np

    rows = (
        x.reshape(-1, w.integers.shape[1]) if w.integers.ndim == 2 else x
    )  # a convolution's row is an image
    integers, scales = fixed.rows_to_integers(rows)
    found = multiply(integers.reshape(x.shape), centred(w).astype(np.float64), call.options)
    scale = np.asarray(w.grid.scale, np.float32)
    if w.integers.ndim == 2:
        spread = np.repeat(scales, 1).reshape(*call.shapes[0][:-1], 1)
    else:
        spread = scales.reshape(-1, 1, 1, 1)
    return np.asarray(found.astype(np.float32) * spread * scale, np.float32)


def mean(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """MEAN over constant axes: an exact sum, rounded once."""
    import numpy as np

    axes = tuple(int(axis) for axis in np.atleast_1d(real(values[1])))
    return (
        round_to(
            call, _pooled(values[0], lambda x: x.sum(axes).reshape(call.shapes[0]), _count(values[0], axes))
        ),
    )


def total(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """SUM over constant axes."""
    import numpy as np

    axes = tuple(int(axis) for axis in np.atleast_1d(real(values[1])))
    return (round_to(call, _pooled(values[0], lambda x: x.sum(axes).reshape(call.shapes[0]), 1)),)


def average_pool(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """AVERAGE_POOL_2D; padding is not counted."""
    import numpy as np

    x, grid = values[0], call.grids[0]
    if not is_plain(x) or grid is None:
        totals, counts = images.window_sums(real(x).astype(np.float64), call.options)
        return (round_to(call, np.asarray(totals / counts, np.float32)),)
    totals, counts = images.window_sums(x.integers.astype(np.int64), call.options)
    return (clamped(call, fixed.average(totals, counts), x.grid),)


def max_pool(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """MAX_POOL_2D of integers, or of floats."""
    x = values[0]
    found = images.largest(x.integers if isinstance(x, Quantized) else real(x), call.options)
    return (round_to(call, Quantized(found, x.grid) if isinstance(x, Quantized) else found),)


def _pooled(x: Value, add: Callable[[np.ndarray], np.ndarray], count: int) -> Value:
    import numpy as np

    if not is_plain(x):
        return np.asarray(add(real(x).astype(np.float64)) / count, np.float32)
    scale = np.asarray(x.grid.scale.reshape(()) / np.float32(count), np.float32)
    return Accumulated(add(centred(x).astype(np.int64)), scale)


def _count(x: Value, axes: Sequence[int]) -> int:
    shape = x.integers.shape if isinstance(x, Quantized) else real(x).shape
    count = 1
    for axis in axes:
        count *= shape[axis]
    return count
