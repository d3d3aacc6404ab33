# SPDX-License-Identifier: Apache-2.0
"""The operators of a LiteRT file in int8 by their names, each a function of a call and its values; images are NHWC.

Rules:
- What adds up is in `litert_products`; sums of two tensors and hard-swish are in fixed point (`litert_fixed`).
- What only moves entries moves integers; where the output has another grid, they are rounded to it.
- Everything else is float32 arithmetic on dequantized values, rounded once.
- With float inputs the same functions compute in floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgeopt.simulate import litert_fixed as fixed
from edgeopt.simulate import litert_images as images
from edgeopt.simulate import litert_products as products
from edgeopt.simulate.litert_values import Call, Operator, centred, clamped, is_plain, is_same, round_to
from edgeopt.simulate.values import Accumulated, Quantized, Value, quantize, real
from edgeopt_wire.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np


def added(sign: int) -> Operator:
    """ADD and SUB: in fixed point where both are integers."""

    def run(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
        import numpy as np

        first, second = values
        grid = call.grids[0]
        if grid is None or not (is_plain(first) and is_plain(second)):
            return (round_to(call, np.asarray(real(first) + sign * real(second), np.float32)),)
        return (clamped(call, fixed.add(first, second, grid, sign=sign), grid),)

    return run


def multiplied(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """MUL: an exact product, rounded once."""
    import numpy as np

    first, second = values
    if not (is_plain(first) and is_plain(second)):
        return (round_to(call, np.asarray(real(first) * real(second), np.float32)),)
    scale = np.asarray(first.grid.scale.reshape(()) * second.grid.scale.reshape(()), np.float32)
    return (round_to(call, Accumulated(centred(first) * centred(second), scale)),)


def hard_swish(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """HARD_SWISH: in fixed point on integers."""
    import numpy as np

    x, grid = values[0], call.grids[0]
    if grid is None or not is_plain(x):
        reals = real(x)
        return (round_to(call, np.asarray(reals * np.clip(reals + 3, 0, 6) / 6, np.float32)),)
    return (clamped(call, fixed.hard_swish(x, grid), grid),)


def pointwise(compute: Callable[..., Any]) -> Operator:
    """An operator that computes each entry from the entries at its place, in float32."""

    def run(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
        import numpy as np

        reals = [np.asarray(real(value), np.float32) for value in values if value is not None]
        return (round_to(call, np.asarray(compute(call.options, *reals), np.float32)),)

    return run


def moved(move: Callable[..., Any]) -> Operator:
    """An operator that only moves the entries of its first value; `move` gives one array, or one for each output."""

    def run(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
        import numpy as np

        first = values[0]
        rest = [None if value is None else real(value) for value in values[1:]]
        given = first.integers if isinstance(first, Quantized) else real(first)
        found = move(call, given, *rest)
        parts = found if isinstance(found, list) else [found]
        return tuple(_on_grid(call, np.asarray(part), first, number) for number, part in enumerate(parts))

    return run


def _on_grid(call: Call, part: np.ndarray, first: Value, number: int) -> Value:
    grid = call.grids[number]
    if not isinstance(first, Quantized) or grid is None:
        return part
    return (
        Quantized(part, grid)
        if is_same(first.grid, grid)
        else Quantized(quantize(Quantized(part, first.grid), grid), grid)
    )


def pad(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """PAD and PADV2: zeros, or a given value."""
    import numpy as np

    x, widths = values[0], [tuple(int(n) for n in row) for row in real(values[1])]
    filler: Any = 0.0 if len(values) < 3 else (real(values[2]).item())
    if not isinstance(x, Quantized):
        return (np.pad(real(x), widths, constant_values=filler),)
    fill = int(quantize(np.float32(filler), x.grid).reshape(()))
    return (_on_grid(call, np.pad(x.integers, widths, constant_values=fill), x, 0),)


def concatenate(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """CONCATENATION; entries on other grids than the output's are rounded to it."""
    import numpy as np

    axis, grid = int(call.options.axis), call.grids[0]
    if grid is None:
        return (np.concatenate([real(value) for value in values], axis),)
    parts = [
        value.integers
        if isinstance(value, Quantized) and is_same(value.grid, grid)
        else quantize(value, grid)
        for value in values
    ]
    return (Quantized(np.concatenate(parts, axis), grid),)


def split(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """SPLIT into equal parts: the axis comes first."""
    import numpy as np

    axis, x = int(real(values[0]).reshape(())), values[1]
    given = x.integers if isinstance(x, Quantized) else real(x)
    parts = np.split(given, len(call.shapes), axis)
    return tuple(_on_grid(call, part, x, number) for number, part in enumerate(parts))


def _quantized(call: Call, values: Sequence[Value]) -> tuple[Value, ...]:
    """QUANTIZE: floats, or integers of another grid; multiplied by one over the scale, as XNNPACK's kernels do."""
    import numpy as np

    grid = call.grids[0]
    if grid is None:
        raise UnsupportedError(f"simulation: QUANTIZE {call.name!r} makes something other than 8 bits")
    if is_plain(values[0]):
        return (clamped(call, fixed.convert(values[0], grid), grid),)
    return (Quantized(quantize(Accumulated(real(values[0]), np.asarray(1, np.float32)), grid), grid),)


def _softmax(options: Any, x: np.ndarray) -> np.ndarray:
    import numpy as np

    powers = np.exp((x - x.max(-1, keepdims=True)) * np.float32(options.beta))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def _gelu(options: Any, x: np.ndarray) -> np.ndarray:
    import numpy as np

    if options is not None and options.approximate:
        return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
    from math import erf

    return np.asarray(0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2.0))))


def table() -> dict[str, Operator]:
    """All operators by the schema's name."""
    import numpy as np

    computed: dict[str, Callable[..., Any]] = {
        "DIV": lambda _, a, b: a / b,
        "SQUARED_DIFFERENCE": lambda _, a, b: (a - b) * (a - b),
        "MAXIMUM": lambda _, a, b: np.maximum(a, b),
        "MINIMUM": lambda _, a, b: np.minimum(a, b),
        "RELU": lambda _, x: np.maximum(x, 0),
        "RELU6": lambda _, x: np.clip(x, 0, 6),
        "LEAKY_RELU": lambda options, x: np.where(x < 0, x * np.float32(options.alpha), x),
        "LOGISTIC": lambda _, x: 1 / (1 + np.exp(-x)),
        "TANH": lambda _, x: np.tanh(x),
        "SQRT": lambda _, x: np.sqrt(x),
        "RSQRT": lambda _, x: 1 / np.sqrt(x),
        "ABS": lambda _, x: np.abs(x),
        "NEG": lambda _, x: -x,
        "SOFTMAX": _softmax,
        "GELU": _gelu,
    }
    moves: dict[str, Callable[..., Any]] = {
        "RESHAPE": lambda call, x, *_: x.reshape(call.shapes[0]),
        "SQUEEZE": lambda call, x, *_: x.reshape(call.shapes[0]),
        "EXPAND_DIMS": lambda call, x, *_: x.reshape(call.shapes[0]),
        "TRANSPOSE": lambda _, x, order: x.transpose([int(axis) for axis in order]),
        "SLICE": lambda call, x, begin, _: x[
            tuple(slice(int(b), int(b) + n) for b, n in zip(begin, call.shapes[0], strict=True))
        ],
        "RESIZE_NEAREST_NEIGHBOR": lambda call, x, _: images.repeat(x, call.shapes[0], call.options),
    }
    return {
        "QUANTIZE": _quantized,
        "DEQUANTIZE": lambda _, values: (real(values[0]),),
        "CONV_2D": products.convolution,
        "DEPTHWISE_CONV_2D": products.depthwise,
        "FULLY_CONNECTED": products.fully_connected,
        "BATCH_MATMUL": products.batch_matmul,
        "ADD": added(1),
        "SUB": added(-1),
        "MUL": multiplied,
        "HARD_SWISH": hard_swish,
        "MEAN": products.mean,
        "SUM": products.total,
        "AVERAGE_POOL_2D": products.average_pool,
        "MAX_POOL_2D": products.max_pool,
        "PAD": pad,
        "PADV2": pad,
        "CONCATENATION": concatenate,
        "SPLIT": split,
        **{name: pointwise(compute) for name, compute in computed.items()},
        **{name: moved(move) for name, move in moves.items()},
    }
