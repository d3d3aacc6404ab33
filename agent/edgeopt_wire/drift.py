# SPDX-License-Identifier: Apache-2.0
"""Does what a model sees still look like what it was built for? Histograms of a few numbers a row, compared by PSI.

A row (one photo, one text) gives a few numbers: mean and deviation of each channel, roughness, how sure the model was.
A reference holds, for each of them, the deciles of the rows that it was taken from; a window counts its rows between
these deciles. Counts of windows, devices and days add up.

    PSI = sum over bins of (found - expected) * ln(found / expected)

With both samples from one distribution PSI is (1/n + 1/m) times chi-square with bins - 1 degrees of freedom, so that the
share of false alarms is chosen, not guessed: a number alarms where PSI is above both that quantile and `RELEVANT`, below
which practitioners call a shift slight.

Why rows, and not pixels? Pixels of a photo hang together: a window of 128 photos has 128 independent values, not millions.

Sources: Lewis 1994, "An Introduction to Credit Scoring" (PSI, its rule of thumb 0.1 and 0.25); Kullback & Leibler 1951
(the divergence J that it is); Yurdakul & Naranjo 2020, "Statistical properties of the population stability index",
Journal of Risk Model Validation 14(4) (its distribution); Wilson & Hilferty 1931 (quantiles of chi-square).
"""

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MANIFEST_KEY = "statistics"
"""Under which key a package's manifest carries its `Reference`."""

BINS = 10
RELEVANT = 0.25
FALSE_ALARMS = 0.001
"""Share of windows, all numbers together, that may alarm with nothing changed."""
STILL_ODD = 0.05
"""The same for the lower threshold, below which a window is quiet."""
SLIGHT = 0.1
_SMOOTH = 0.5  # a bin that nobody met is not impossible (Jeffreys' prior)
_DIGITS = 6


@dataclass(frozen=True)
class Feature:
    """One number's reference: ascending inner edges, how many rows lay between them, mean and deviation."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    mean: float
    std: float

    def __post_init__(self) -> None:
        if not 1 <= len(self.edges) < 64 or len(self.counts) != len(self.edges) + 1:
            raise ValueError("expected 1 to 63 edges and one count more")
        if list(self.edges) != sorted(set(self.edges)) or min(self.counts) < 0 or not sum(self.counts):
            raise ValueError("expected ascending edges and counts of at least one row")

    def bin(self, value: float) -> int:
        """The bin that a value lies in."""
        return bisect.bisect_left(self.edges, value)


@dataclass(frozen=True)
class Reference:
    """What rows looked like; `origin` says which: `calibration`, `evaluation`, or `service` (the first ones here)."""

    rows: int
    origin: str
    features: Mapping[str, Feature]

    def __post_init__(self) -> None:
        if self.rows < 1 or len(self.features) > 256:
            raise ValueError("expected at least one row and at most 256 numbers of each")


@dataclass(frozen=True)
class Verdict:
    """How far one number of a window is from its reference: PSI against its thresholds.

    `shift` is how many of the reference's standard deviations its mean moved.
    """

    rows: int
    feature: str
    psi: float
    limit: float
    low: float
    shift: float

    @property
    def is_drift(self) -> bool:
        """Whether this number alarms."""
        return self.psi > self.limit

    @property
    def is_quiet(self) -> bool:
        """Whether this number speaks for the end of an alarm."""
        return self.psi <= self.low


def make_reference(rows: Sequence[Mapping[str, float]], origin: str) -> Reference:
    """Take the reference from rows, each a mapping of name to number; names that not all rows have are left out.

    Raises:
        ValueError: There is no row.
    """
    names = sorted(set.intersection(*(set(row) for row in rows))) if rows else []
    return Reference(len(rows), origin, {name: _feature([row[name] for row in rows]) for name in names})


def population_stability(expected: Sequence[int], found: Sequence[int]) -> float:
    """PSI of two histograms over the same bins, each smoothed by half a row a bin."""
    before, now = _shares(expected), _shares(found)
    return sum((b - a) * math.log(b / a) for a, b in zip(before, now, strict=True))


def limit_of(expected: Sequence[int], rows: int, false_alarms: float, relevant: float) -> float:
    """The PSI above which a window of `rows` is not chance with probability 1 - `false_alarms`, and relevant."""
    spread = 1 / rows + 1 / max(1, sum(expected))
    return max(relevant, spread * chi_square(len(expected) - 1, 1 - false_alarms))


def judge(
    reference: Reference, counts: Mapping[str, Sequence[int]], means: Mapping[str, float]
) -> tuple[Verdict, ...]:
    """Compare a window with its reference: each number that both know, the one furthest above its limit first."""
    known = [name for name in reference.features if any(counts.get(name, ()))]
    found = []
    for name in known:
        feature, seen = reference.features[name], counts[name]
        rows = sum(seen)
        limit = limit_of(feature.counts, rows, FALSE_ALARMS / len(known), RELEVANT)
        low = limit_of(feature.counts, rows, STILL_ODD / len(known), SLIGHT)
        shift = (means.get(name, feature.mean) - feature.mean) / (feature.std or abs(feature.mean) or 1.0)
        found.append(Verdict(rows, name, population_stability(feature.counts, seen), limit, low, shift))
    return tuple(sorted(found, key=lambda verdict: -verdict.psi / verdict.limit))


def chi_square(freedom: int, share: float) -> float:
    """The value below which `share` of a chi-square distribution lies, within 2 % from 0.9 up (Wilson & Hilferty)."""
    part = 2 / (9 * max(1, freedom))
    return (
        max(1, freedom) * max(0.0, 1 - part + statistics.NormalDist().inv_cdf(share) * math.sqrt(part)) ** 3
    )


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) + _SMOOTH * len(counts)
    return [(count + _SMOOTH) / total for count in counts]


def _feature(values: Sequence[float]) -> Feature:
    ordered = sorted(float(f"{value:.{_DIGITS}g}") for value in values)
    mean = statistics.fmean(ordered)
    cuts = {ordered[min(len(ordered) - 1, len(ordered) * number // BINS)] for number in range(1, BINS)}
    if len(cuts) == 1:  # nearly a constant: what is below, at and above it
        only = cuts.pop()
        width = max(abs(only), 1.0) * 10.0**-_DIGITS
        cuts = {only - width, only + width}
    edges = tuple(sorted(cuts))
    counts = [0] * (len(edges) + 1)
    for value in ordered:
        counts[bisect.bisect_left(edges, value)] += 1
    std = statistics.pstdev(ordered, mean)
    return Feature(edges, tuple(counts), float(f"{mean:.{_DIGITS}g}"), float(f"{std:.{_DIGITS}g}"))
