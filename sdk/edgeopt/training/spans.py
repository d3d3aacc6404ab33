# SPDX-License-Identifier: Apache-2.0
"""Learned ranges that find their tensor again in whatever a model was lowered to.

Names do not survive lowering: PyTorch calls a tensor `hardswish`, ONNX `_inlfunc_HardSwish`, LiteRT a path of MLIR
locations; folding renames and layouts are permuted. What does survive is what flows through the tensor. So a range
is kept with a fingerprint of its tensor's values on one known sample (count, ends, mean, root mean square, skew: none
depends on the order of axes), taken on the float form of the trained model, and a lowered float model is asked
for the tensor with the same fingerprint. Two tensors with the same values want the same range.

Pure numpy: whoever lowers or quantizes needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from edgeopt.ranges import Range

if TYPE_CHECKING:
    import numpy as np

TOLERANCE = 1e-3
"""Of the tensor's root mean square: lowering reorders sums of float32, and folds constants into them."""


_SKEW_SHARE = 0.1  # one value of many that moves a little moves the mean of cubes by more than the others


@dataclass(frozen=True)
class Fingerprint:
    """What a tensor's values say, in any order of its axes."""

    count: int
    low: float
    high: float
    mean: float
    size: float
    skew: float

    @classmethod
    def of(cls, values: np.ndarray) -> Fingerprint:
        """Take the fingerprint of an array."""
        import numpy as np

        wide = values.astype(np.float64).reshape(-1)
        size = float(np.sqrt(np.square(wide).mean()))
        return cls(
            wide.size,
            float(wide.min()),
            float(wide.max()),
            float(wide.mean()),
            size,
            float((wide**3).mean() / max(size, 1e-12) ** 3),
        )

    def distance(self, other: Fingerprint) -> float:
        """Return the largest difference, as a share of the size; infinity where the counts differ."""
        if self.count != other.count:
            return float("inf")
        pairs = (
            (self.low, other.low),
            (self.high, other.high),
            (self.mean, other.mean),
            (self.size, other.size),
        )
        apart = max(abs(mine - its) for mine, its in pairs) / max(self.size, 1e-12)
        return max(apart, abs(self.skew - other.skew) * _SKEW_SHARE)


@dataclass(frozen=True)
class LearnedRange:
    """The ends of a tensor's integers, and how to know the tensor. `name` is its operator in PyTorch's graph."""

    name: str
    low: float
    high: float
    print: Fingerprint

    def __post_init__(self) -> None:
        if not self.low <= 0 <= self.high:
            raise ValueError(f"range of {self.name!r} must hold zero, found {self.low} to {self.high}")


@dataclass(frozen=True)
class Found:
    """Ranges by the lowered model's tensor names, and the learned ones whose tensor is not there any more."""

    ranges: Mapping[str, Range]
    lost: tuple[str, ...]

    def sentence(self) -> str:
        """Say it in one line, or nothing where nothing was learned."""
        if not self.ranges and not self.lost:
            return ""
        lost = f"; calibrated where no tensor was found for {', '.join(self.lost)}" if self.lost else ""
        return f"ranges of {len(self.ranges)} tensors as they were learned{lost}"


def find_learned(
    learned: Sequence[LearnedRange],
    observe: Callable[[Mapping[str, np.ndarray]], Iterable[tuple[str, np.ndarray]]],
    samples: Iterable[Mapping[str, np.ndarray]],
) -> Found:
    """Match learned ranges to the tensors of a lowered float model; `samples` begins with the one of the fingerprints."""
    if not learned:
        return Found({}, ())
    return find(learned, (entry for sample in islice(iter(samples), 1) for entry in observe(sample)))


def find(learned: Sequence[LearnedRange], tensors: Iterable[tuple[str, np.ndarray]]) -> Found:
    """Match learned ranges to the tensors of a lowered float model that ran the first calibration sample.

    A tensor gets the nearest range within `TOLERANCE`; one that has none keeps what calibration says.
    """
    ranges: dict[str, Range] = {}
    used: set[str] = set()
    for name, values in tensors:
        if values.size == 0 or values.dtype.kind != "f":
            continue
        seen = Fingerprint.of(values)
        distances = [(span.print.distance(seen), number) for number, span in enumerate(learned)]
        if distances and min(distances)[0] <= TOLERANCE:
            nearest = learned[min(distances)[1]]
            ranges[name] = Range(nearest.low, nearest.high, "learned")
            used.add(nearest.name)
    return Found(ranges, tuple(span.name for span in learned if span.name not in used))
