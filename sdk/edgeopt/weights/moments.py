# SPDX-License-Identifier: Apache-2.0
"""First and second moments of the values that reach layers, summed sample by sample.

Rules:
- Memory is bounded: no more than `limit_bytes` of moments at a time; for the rest the samples are walked again.
- One matrix for each value, whatever number of layers read it.
- At most `positions` rows of a sample enter, evenly spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_graphs import observer
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

ENTRY_BYTES = 8


@dataclass(frozen=True)
class Moments:
    """Of `count` rows x of one value: the sums of x x^T, (width, width), and of x, (width,); float64."""

    squares: np.ndarray
    sums: np.ndarray
    count: int

    def __add__(self, other: Moments) -> Moments:
        """Both together."""
        return Moments(self.squares + other.squares, self.sums + other.sums, self.count + other.count)

    @property
    def mean(self) -> np.ndarray:
        """Of every channel."""
        return self.sums / max(self.count, 1)

    @property
    def centred(self) -> np.ndarray:
        """The second moments about the mean: what is left for a layer whose bias takes the mean error."""
        import numpy as np

        found: np.ndarray = self.squares - self.count * np.outer(self.mean, self.mean)
        return found


def batches(widths: Mapping[str, int], limit_bytes: int) -> list[tuple[str, ...]]:
    """Cut the values, in order, into batches whose moments fit in `limit_bytes`; a single one always fits."""
    result: list[list[str]] = [[]]
    used = 0
    for name, width in widths.items():
        size = width * width * ENTRY_BYTES
        if result[-1] and used + size > limit_bytes:
            result.append([])
            used = 0
        result[-1].append(name)
        used += size
    return [tuple(names) for names in result if names]


def second_moments(
    program: Any, names: Sequence[str], samples: Iterator[Mapping[str, np.ndarray]], positions: int
) -> dict[str, Moments]:
    """The moments of each named value over its last axis.

    Raises:
        RecipeError: There are no samples.
    """
    import numpy as np

    observe = observer(program, frozenset(names))
    found: dict[str, Moments] = {}
    for sample in samples:
        for name, values in observe(sample):
            rows = values.reshape(-1, values.shape[-1])
            rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), positions)).astype(np.int64))]
            wide = rows.astype(np.float32)
            seen = Moments((wide.T @ wide).astype(np.float64), wide.sum(0, dtype=np.float64), len(wide))
            found[name] = found[name] + seen if name in found else seen
    if not found:
        raise RecipeError(
            "weights rounded by what reaches them need calibration samples; give --calibration DATA"
        )
    return found


def watched(
    samples: Iterator[Mapping[str, np.ndarray]], count: int, on_sample: Callable[[], None]
) -> Iterator[Mapping[str, np.ndarray]]:
    """The first `count` samples; `on_sample` is called after each."""
    for sample in islice(samples, count):
        yield sample
        on_sample()
