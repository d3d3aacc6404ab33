# SPDX-License-Identifier: Apache-2.0
"""What every simulated LiteRT operator needs: its call, and how its result is rounded to the grid of its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.simulate.values import Grid, Quantized, Value, quantize, real
from edgeopt_wire.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Call:
    """One operator of a file; `shapes` and `grids` are its outputs', None for floats."""

    name: str
    type: str
    options: Any
    shapes: tuple[tuple[int, ...], ...]
    grids: tuple[Grid | None, ...]


Operator = Callable[[Call, Sequence[Value]], tuple[Value, ...]]

_ENDS: Mapping[int, tuple[float | None, float | None]] = {
    0: (None, None),
    1: (0.0, None),  # RELU
    2: (-1.0, 1.0),  # RELU_N1_TO_1
    3: (0.0, 6.0),  # RELU6
}
"""Fused activations of the schema, by number."""


def round_to(call: Call, value: Value, number: int = 0) -> Value:
    """Apply the operator's fused activation and round to its output's grid, if it has one."""
    import numpy as np

    kind = int(getattr(call.options, "fusedActivationFunction", 0) or 0)
    if kind not in _ENDS:
        raise UnsupportedError(f"simulation: {call.type} {call.name!r} has fused activation {kind}")
    low, high = _ENDS[kind]
    grid = call.grids[number]
    is_there = grid is not None and isinstance(value, Quantized) and is_same(value.grid, grid)
    found: np.ndarray = value.integers if is_there else real(value) if grid is None else quantize(value, grid)
    if low is not None:
        found = np.maximum(found, _end(low, grid).astype(found.dtype))
    if high is not None:
        found = np.minimum(found, _end(high, grid).astype(found.dtype))
    return found if grid is None else Quantized(found, grid)


def _end(value: float, grid: Grid | None) -> np.ndarray:
    """An end of a fused activation, on the grid if there is one."""
    import numpy as np

    return np.asarray(value, np.float32) if grid is None else quantize(np.asarray(value, np.float32), grid)


def clamped(call: Call, found: np.ndarray, grid: Grid) -> Value:
    """Integers of any size on a grid, clamped to its type and to the operator's fused activation."""
    import numpy as np

    limits = np.iinfo(grid.dtype)
    return round_to(call, Quantized(np.clip(found, limits.min, limits.max).astype(grid.dtype), grid))


def is_plain(value: Value) -> bool:
    """Whether a value is 8-bit integers with one scale."""
    return isinstance(value, Quantized) and value.grid.scale.size == 1


def centred(value: Quantized) -> np.ndarray:
    """Integers less their zero points, int32."""
    import numpy as np

    zero_point = value.grid.spread(value.grid.zero_point, value.integers.ndim)
    return np.asarray(value.integers.astype(np.int32) - zero_point)


def is_same(first: Grid, second: Grid) -> bool:
    """Whether two grids have the same scales and zero points."""
    import numpy as np

    return bool(
        np.array_equal(first.scale, second.scale) and np.array_equal(first.zero_point, second.zero_point)
    )
