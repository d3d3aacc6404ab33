# SPDX-License-Identifier: Apache-2.0
"""The group-wise grid that all methods round to, and a weight that lies on it.

Rules:
- Integers are unsigned and `zero` is the one that means 0.0, as the runtimes keep them: value = (integer - zero) * scale.
- A symmetric grid has its zero in the middle and no zero points in the file. It reaches one step further down than up,
  so a scale may be negative: the largest weight of a group takes the longer side.
- A last group that the inputs do not fill is filled up with zeros, which every grid holds exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BITS = (4, 8)
GROUPS = (16, 32, 64, 128, 256)  # the block sizes of ONNX Runtime's MatMulNBits
SMALLEST_SCALE = 1e-12


@dataclass(frozen=True)
class Grid:
    """Which integers there are, and how many neighbouring weights share a scale."""

    bits: int = 4
    group: int = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.group not in GROUPS:
            raise ValueError(
                f"bits must be one of {BITS} and group one of {GROUPS}, found {self.bits} and {self.group}"
            )

    @property
    def highest(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The integer that means 0.0 on a symmetric grid."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Grouped:
    """A weight on a grid: integers (outputs, groups, group) uint8; scale and zero (outputs, groups)."""

    grid: Grid
    integers: np.ndarray
    scale: np.ndarray
    zero: np.ndarray

    def floats(self, inputs: int) -> np.ndarray:
        """The weight that the runtime computes with, (outputs, inputs) float32."""
        import numpy as np

        values = (self.integers.astype(np.float32) - self.zero[..., None]) * self.scale[..., None]
        result: np.ndarray = values.reshape(len(values), -1)[:, :inputs].astype(np.float32)
        return result


def grouped(weight: np.ndarray, group: int) -> np.ndarray:
    """Cut (outputs, inputs) into (outputs, groups, group), float32, filled up with zeros."""
    import numpy as np

    missing = -weight.shape[1] % group
    filled = np.pad(weight.astype(np.float32), ((0, 0), (0, missing)))
    return filled.reshape(len(weight), -1, group)


def rounded(blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray, grid: Grid) -> np.ndarray:
    """The nearest integers of (outputs, groups, group) weights, still as floats."""
    import numpy as np

    nearest: np.ndarray = np.rint(blocks / scale[..., None])
    clipped: np.ndarray = np.clip(nearest + zero[..., None], 0, grid.highest)
    return clipped


def full_range(blocks: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The scale and zero point with which no weight is clipped, (outputs, groups) each."""
    import numpy as np

    if grid.symmetric:
        at = np.abs(blocks).argmax(-1)[..., None]
        largest = np.take_along_axis(blocks, at, -1)[..., 0]
        return safe(-largest / grid.middle), np.full(largest.shape, np.float32(grid.middle))
    low, high = np.minimum(blocks.min(-1), 0.0), np.maximum(blocks.max(-1), 0.0)
    return span(low, high, grid)


def span(low: np.ndarray, high: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The scale and zero point of an asymmetric grid from `low` to `high`."""
    import numpy as np

    scale = safe((high - low) / grid.highest)
    return scale, np.clip(np.rint(-low / scale), 0, grid.highest)


def safe(scale: np.ndarray) -> np.ndarray:
    """Keep scales of dead groups from being zero, in float32, in which they are stored."""
    import numpy as np

    single = scale.astype(np.float32)
    return np.where(np.abs(single) < SMALLEST_SCALE, np.float32(SMALLEST_SCALE), single)


def packed(integers: np.ndarray, scale: np.ndarray, zero: np.ndarray, grid: Grid) -> Grouped:
    """The result of a method, in the types in which it is stored."""
    import numpy as np

    return Grouped(grid, integers.astype(np.uint8), scale.astype(np.float32), zero.astype(np.uint8))
