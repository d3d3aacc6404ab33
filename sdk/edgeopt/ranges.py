# SPDX-License-Identifier: Apache-2.0
"""From the distribution of a tensor's values to the range that its integers cover. Pure; no model, no samples.

Methods:
- `minmax`: every value that was seen.
- `percentile`: all but a share of the values, cut from both ends alike.
- `mse`: the range with the least expected squared error of rounding and clipping together (Banner et al. 2019,
  "Post training 4-bit quantization of convolutional networks", section 4; here over the histogram, both ends free).
- `entropy`: the range whose integers lose least information by Kullback-Leibler divergence (Migacz 2017, "8-bit
  inference with TensorRT"; here both ends move together).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

HALF = 8192
"""Bins on each side of zero. The range grows by doubling, so that at least half of one side's are in use."""

_FRACTIONS = 41
_SMALLEST_FRACTION = 0.2
_LEVELS = 256


class Noise(NamedTuple):
    """Expected squared error summed over all values: of rounding within a range, of clipping beyond it."""

    rounding: float
    clipping: float


class Range(NamedTuple):
    """What a tensor's integers cover; low <= 0 <= high. `clipped` is the share of values beyond it."""

    low: float
    high: float
    method: str = "minmax"
    clipped: float = 0.0
    is_clipping_dominant: bool = False


@dataclass(frozen=True)
class Distribution:
    """Values seen: exact ends, and counts in bins of `width` from -HALF * width up; `zeros` are exact ones."""

    low: float
    high: float
    width: float
    counts: np.ndarray
    zeros: int

    def noise(self, low: float, high: float, *, symmetric: bool = False) -> Noise:
        """What 8 bits over this range cost. Exact zeros cost nothing: a grid always holds zero."""
        import numpy as np

        centres = (np.arange(2 * HALF) - HALF + 0.5) * self.width
        step = 2 * max(-low, high) / (_LEVELS - 2) if symmetric else (high - low) / (_LEVELS - 1)
        below, above = centres < low, centres > high
        inside = float(self.counts[~(below | above)].sum()) - self.zeros
        lost = (self.counts[below] * (centres[below] - low) ** 2).sum()
        lost += (self.counts[above] * (centres[above] - high) ** 2).sum()
        return Noise(max(inside, 0.0) * step**2 / 12, float(lost))

    def clipped(self, low: float, high: float) -> float:
        """The share of values beyond a range, in whole bins."""
        import numpy as np

        centres = (np.arange(2 * HALF) - HALF + 0.5) * self.width
        total = int(self.counts.sum())
        return float(self.counts[(centres < low) | (centres > high)].sum()) / total if total else 0.0


def choose(found: Distribution, method: str, *, percentile: float = 99.999, symmetric: bool = False) -> Range:
    """Choose the range of one tensor by one of the methods above."""
    low, high = found.low, found.high
    if low < high:
        if method == "percentile":
            low, high = _by_percentile(found, percentile)
        elif method == "mse":
            low, high = _by_mse(found, symmetric=symmetric)
        elif method == "entropy":
            low, high = _by_entropy(found)
    if (low, high) == (found.low, found.high):
        return Range(low, high, method)
    noise = found.noise(low, high, symmetric=symmetric)
    return Range(low, high, method, found.clipped(low, high), noise.clipping > noise.rounding)


def _by_percentile(found: Distribution, percentile: float) -> tuple[float, float]:
    import numpy as np

    share = np.cumsum(found.counts) / found.counts.sum()
    tail = (100 - percentile) / 200
    first = int(np.searchsorted(share, tail, side="right"))
    last = int(np.searchsorted(share, 1 - tail, side="left"))
    low = min((first - HALF) * found.width, 0.0)
    high = max((last + 1 - HALF) * found.width, 0.0)
    return max(low, found.low), min(high, found.high)


def _by_mse(found: Distribution, *, symmetric: bool) -> tuple[float, float]:
    """Try every pair of fractions of both ends; clipping is summed once an end, rounding follows from the step."""
    import numpy as np

    fractions = np.linspace(1.0, _SMALLEST_FRACTION, _FRACTIONS)
    lows = np.unique(found.low * fractions) if found.low < 0 else np.zeros(1)
    highs = np.unique(found.high * fractions) if found.high > 0 else np.zeros(1)
    centres = (np.arange(2 * HALF) - HALF + 0.5) * found.width
    used = np.nonzero(found.counts)[0]
    values, counts = centres[used], found.counts[used].astype(np.float64)
    cut_low = np.array([(counts * np.clip(low - values, 0, None) ** 2).sum() for low in lows])
    cut_high = np.array([(counts * np.clip(values - high, 0, None) ** 2).sum() for high in highs])
    if symmetric:
        step = 2 * np.maximum(-lows[:, None], highs[None, :]) / (_LEVELS - 2)
    else:
        step = (highs[None, :] - lows[:, None]) / (_LEVELS - 1)
    moving = counts.sum() - found.zeros
    total = cut_low[:, None] + cut_high[None, :] + moving * step**2 / 12
    best = np.unravel_index(int(total.argmin()), total.shape)
    return float(lows[best[0]]), float(highs[best[1]])


def _by_entropy(found: Distribution) -> tuple[float, float]:
    import numpy as np

    counts = found.counts.copy()
    counts[HALF] -= found.zeros  # exact zeros are exact in every range, and would drown the rest
    best, chosen = np.inf, (found.low, found.high)
    for fraction in np.linspace(1.0, _SMALLEST_FRACTION, _FRACTIONS):
        low, high = found.low * fraction, found.high * fraction
        first = HALF + int(np.floor(low / found.width))
        last = min(HALF + int(np.ceil(high / found.width)), 2 * HALF)
        window = counts[first:last].astype(np.float64)
        if len(window) <= _LEVELS:
            break  # as many bins as integers: nothing is lost any more, and nothing can be told
        kept = window.copy()
        kept[0] += counts[:first].sum()
        kept[-1] += counts[last:].sum()
        divergence = _divergence(kept, window)
        if divergence < best:
            best, chosen = divergence, (float(low), float(high))
    return chosen


def _divergence(kept: np.ndarray, window: np.ndarray) -> float:
    """KL(kept || the same values told apart by `_LEVELS` integers only), in nats."""
    import numpy as np

    level = np.arange(len(window)) * _LEVELS // len(window)
    total = np.bincount(level, weights=window, minlength=_LEVELS)
    occupied = np.bincount(level, weights=window > 0, minlength=_LEVELS)
    spread = np.where(window > 0, (total / np.maximum(occupied, 1))[level], 0.0)
    p, q = kept / kept.sum(), spread / max(spread.sum(), 1.0)
    both = (p > 0) & (q > 0)
    missed = float(p[(p > 0) & (q == 0)].sum())
    return float((p[both] * np.log(p[both] / q[both])).sum()) + missed * 20.0
