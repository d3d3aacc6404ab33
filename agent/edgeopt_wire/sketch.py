# SPDX-License-Identifier: Apache-2.0
"""A sketch of a distribution of positive numbers: any quantile within 1 %, mergeable, small however many there were.

A value x > 0 counts in bin ceil(log(x) / log(GAMMA)); a bin speaks for its middle. Sketches of devices, hours and
variants are added bin by bin, and the sum is the sketch of all values. Twelve orders of magnitude are 1,400 bins.

Source: Masson, Rim, Lee 2019, "DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees".

Why not PyPI's `ddsketch`? It fills the same bins at the same speed (docs/monitoring.md), and its portable form needs
protobuf on every device.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

ACCURACY = 0.01
GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
_SCALE = 1 / math.log(GAMMA)


@dataclass
class Sketch:
    """Counts by bin, and the exact number, sum, least and greatest of what was added."""

    bins: dict[int, int] = field(default_factory=dict)
    count: int = 0
    total: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, which must be above 0."""
        number = math.ceil(math.log(value) * _SCALE)
        self.bins[number] = self.bins.get(number, 0) + times
        self.count += times
        self.total += value * times
        self.least = min(self.least, value)
        self.greatest = max(self.greatest, value)

    def merge(self, other: "Sketch") -> None:
        """Count everything that another sketch counted."""
        for number, times in other.bins.items():
            self.bins[number] = self.bins.get(number, 0) + times
        self.count += other.count
        self.total += other.total
        self.least = min(self.least, other.least)
        self.greatest = max(self.greatest, other.greatest)

    def quantile(self, share: float) -> float | None:
        """The value below which `share` of the values lie, within 1 %; None of an empty sketch."""
        if not self.count:
            return None
        rank = max(1, math.ceil(share * self.count))
        seen = 0
        for number in sorted(self.bins):
            seen += self.bins[number]
            if seen >= rank:
                middle = 2 * GAMMA**number / (GAMMA + 1)
                return min(max(middle, self.least), self.greatest)
        return self.greatest

    def to_json(self) -> dict[str, object]:
        """As JSON-like data: runs of (first bin, counts)."""
        runs: list[tuple[int, list[int]]] = []
        for number in sorted(self.bins):
            if runs and runs[-1][0] + len(runs[-1][1]) == number:
                runs[-1][1].append(self.bins[number])
            else:
                runs.append((number, [self.bins[number]]))
        return {
            "accuracy": ACCURACY,
            "count": self.count,
            "sum": self.total,
            "min": self.least if self.count else None,
            "max": self.greatest if self.count else None,
            "bins": [[first, *counts] for first, counts in runs],
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> "Sketch":
        """Read what `to_json` wrote.

        Raises:
            ValueError: It is no sketch, or one of another accuracy.
        """
        try:
            bins = dict(_bins(raw["bins"]))
            count, total = int(raw["count"]), float(raw["sum"])  # type: ignore[call-overload, arg-type]
            least, greatest = (math.inf, -math.inf) if not count else (float(raw["min"]), float(raw["max"]))  # type: ignore[arg-type]
            if (
                raw["accuracy"] != ACCURACY
                or sum(bins.values()) != count
                or min(bins.values(), default=1) < 1
            ):
                raise ValueError("its counts do not add up, or its accuracy is another")
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"this is no sketch: {error}") from error
        return cls(bins, count, total, least, greatest)


def _bins(runs: object) -> Iterable[tuple[int, int]]:
    if not isinstance(runs, (list, tuple)):
        raise TypeError("bins must be a list")
    for first, *counts in runs:
        for offset, times in enumerate(counts):
            yield int(first) + offset, int(times)
