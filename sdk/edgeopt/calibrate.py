# SPDX-License-Identifier: Apache-2.0
"""Activation ranges from calibration samples, as a stream: one sample's tensors are in memory at a time.

Rules:
- Two passes over the samples: the exact minimum and maximum first, then histograms between them. So no bin is ever
  merged or guessed, and memory is `HISTOGRAM_BINS` counters a tensor however many samples there are.
- A range always holds zero, because padding and ReLU produce it and integers must say it exactly.
- A model's outputs keep their full range: a clipped logit changes the answer.

Why not the runtimes' own calibrators? ONNX Runtime's keep every activation of every sample (2.4 GB for 32 photos of
EfficientNet-Lite0), LiteRT's quantizer smooths the maximum over samples, which clips the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

HISTOGRAM_BINS = 4096
METHODS = ("minmax", "percentile")
_CHUNK = 1 << 20  # values binned at a time, so that scratch memory is bounded too

Observe = Callable[["Mapping[str, np.ndarray]"], "Iterable[tuple[str, np.ndarray]]"]
"""Run one sample and give every (tensor name, values) of interest."""


@dataclass(frozen=True)
class Calibration:
    """How ranges are chosen. `percentile` is the share of values, in percent, that is kept on both sides together."""

    method: str = "percentile"
    percentile: float = 99.999
    samples: int = 128

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(seam.unknown("calibration method", self.method, METHODS))
        if not 90 <= self.percentile <= 100:
            raise RecipeError(f"calibration percentile must be 90 to 100, found {self.percentile}")
        if self.samples < 1:
            raise RecipeError(f"calibration needs at least one sample, found {self.samples}")

    @property
    def walks(self) -> int:
        """How often the samples are walked over."""
        return 1 if self.method == "minmax" or self.percentile == 100 else 2


def find_ranges(
    observe: Observe,
    samples: Iterable[Mapping[str, np.ndarray]],
    calibration: Calibration,
    *,
    keep_full: frozenset[str] = frozenset(),
    on_sample: Callable[[], None] = lambda: None,
) -> dict[str, tuple[float, float]]:
    """Choose a (low, high) for every observed tensor; low <= 0 <= high.

    `samples` is walked twice for the percentile method. `keep_full` names tensors (the model's outputs) that take
    their full range with every method.

    Raises:
        RecipeError: There is no sample, or a tensor holds NaN or infinity for one.
    """
    extremes = _find_extremes(observe, samples, on_sample)
    if calibration.walks == 1:
        return extremes
    narrowed = {name: span for name, span in extremes.items() if name not in keep_full and span[0] < span[1]}
    counts = _count(observe, samples, narrowed, on_sample)
    chosen = dict(extremes)
    for name, histogram in counts.items():
        chosen[name] = _cut(histogram, narrowed[name], calibration.percentile)
    return chosen


def _find_extremes(
    observe: Observe, samples: Iterable[Mapping[str, np.ndarray]], on_sample: Callable[[], None]
) -> dict[str, tuple[float, float]]:
    import math

    extremes: dict[str, tuple[float, float]] = {}
    for number, sample in enumerate(samples):
        for name, values in observe(sample):
            low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise RecipeError(
                    f"calibration sample {number} gives NaN or infinity in tensor {name!r}; "
                    "check the preprocessing (mean, std, scale) and the data"
                )
            known = extremes.get(name, (0.0, 0.0))
            extremes[name] = (min(known[0], low), max(known[1], high))
        on_sample()
    if not extremes:
        raise RecipeError("calibration needs at least one sample, the data has none")
    return extremes


def _count(
    observe: Observe,
    samples: Iterable[Mapping[str, np.ndarray]],
    spans: Mapping[str, tuple[float, float]],
    on_sample: Callable[[], None],
) -> dict[str, np.ndarray]:
    import numpy as np

    counts = {name: np.zeros(HISTOGRAM_BINS, np.int64) for name in spans}
    for sample in samples:
        for name, values in observe(sample):
            if name in counts:
                low, high = spans[name]
                flat = values.reshape(-1)
                for start in range(0, flat.size, _CHUNK):
                    scaled = (flat[start : start + _CHUNK] - np.float32(low)) * np.float32(
                        HISTOGRAM_BINS / (high - low)
                    )
                    bins = np.clip(scaled.astype(np.int32), 0, HISTOGRAM_BINS - 1)
                    counts[name] += np.bincount(bins, minlength=HISTOGRAM_BINS)
        on_sample()
    return counts


def _cut(histogram: np.ndarray, span: tuple[float, float], percentile: float) -> tuple[float, float]:
    """Cut (100 - percentile) / 2 percent off both ends, in whole bins, never past zero."""
    import numpy as np

    low, high = span
    width = (high - low) / HISTOGRAM_BINS
    share = np.cumsum(histogram) / histogram.sum()
    tail = (100 - percentile) / 200
    first = int(np.searchsorted(share, tail, side="right"))
    last = int(np.searchsorted(share, 1 - tail, side="left"))
    return min(low + first * width, 0.0), max(low + (last + 1) * width, 0.0)
