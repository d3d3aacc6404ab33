# SPDX-License-Identifier: Apache-2.0
"""A measurement: what one variant took on one device, with the conditions that make the figure mean something.

Rules:
- Times are whole nanoseconds of a monotonic clock around the runtime's call alone; load and first run stand apart.
- Percentiles are by nearest rank on the raw samples. p99 needs 100 samples; below that it is None, never a guess.
- Conditions are taken before and after; what a board cannot tell is None or empty, never a default.

Sources: MLPerf Inference rules (percentiles, early stopping), LiteRT's benchmark_model (warm-up), trtexec.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

MINIMUM_FOR_P99 = 100
"""A p99 of fewer samples is the maximum under another name."""

MINIMUM_FOR_P90 = 64
"""MLPerf loadgen's early stopping needs 64 queries for a p90; below that it is reported with a warning."""

HISTOGRAM_BINS_PER_OCTAVE = 8


@dataclass(frozen=True)
class Timing:
    """A distribution of latencies in nanoseconds. `histogram` is ((lower edge, count), ...), 8 bins an octave."""

    n: int
    warmup: int
    load_ns: int
    first_inference_ns: int
    min_ns: int
    mean_ns: int
    p50_ns: int
    p90_ns: int
    p99_ns: int | None
    max_ns: int
    histogram: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if self.p99_ns is not None and self.n < MINIMUM_FOR_P99:
            raise ValueError(f"p99 needs {MINIMUM_FOR_P99} samples, found {self.n}")
        if not 0 < self.min_ns <= self.p50_ns <= self.p90_ns <= self.max_ns:
            raise ValueError("expected 0 < min <= p50 <= p90 <= max")
        if sum(count for _, count in self.histogram) != self.n:
            raise ValueError("the histogram does not count n samples")

    @classmethod
    def of(cls, samples_ns: Sequence[int], *, warmup: int, load_ns: int, first_inference_ns: int) -> "Timing":
        """Summarize raw samples in nanoseconds; at least one is needed.

        Raises:
            ValueError: There is no sample.
        """
        if not samples_ns:
            raise ValueError("a timing needs at least one sample")
        ordered = sorted(samples_ns)
        return cls(
            n=len(ordered),
            warmup=warmup,
            load_ns=load_ns,
            first_inference_ns=first_inference_ns,
            min_ns=ordered[0],
            mean_ns=round(sum(ordered) / len(ordered)),
            p50_ns=nearest_rank(ordered, 50),
            p90_ns=nearest_rank(ordered, 90),
            p99_ns=nearest_rank(ordered, 99) if len(ordered) >= MINIMUM_FOR_P99 else None,
            max_ns=ordered[-1],
            histogram=_histogram(ordered),
        )


@dataclass(frozen=True)
class Thermal:
    """One reading of the board: hottest zone in degrees Celsius, throttled or not, CPU frequency in kHz."""

    temperature_c: float | None = None
    throttled: bool | None = None
    frequency_khz: int | None = None
    load_average: float | None = None


@dataclass(frozen=True)
class Conditions:
    """Where and how the figure was taken. `stand_in_for` names the device that this machine only stands in for."""

    runtime: str
    runtime_version: str
    threads: int
    batch: int
    accelerator: str
    architecture: str
    cpu: str
    os: str
    power_mode: str = ""
    governor: str = ""
    before: Thermal = field(default_factory=Thermal)
    after: Thermal = field(default_factory=Thermal)
    stand_in_for: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One variant measured on one device.

    `golden_sqnr_db` compares the device's outputs with the variant's golden outputs; it is None where they were
    not compared, or are bit-identical (`golden_exact`) so that the ratio would be infinite. `error` is set, and
    `timing` is None, where the variant could not run.
    """

    SCHEMA = "edgeopt.measurement/1"

    package_sha256: str
    model: str
    version: str
    variant: str
    precision: str
    device_id: str
    device_class: str
    agent_version: str
    measured_at: datetime
    conditions: Conditions
    timing: Timing | None
    golden_ok: bool
    golden_exact: bool = False
    golden_sqnr_db: float | None = None
    peak_memory_bytes: int | None = None
    stable: bool = False
    warnings: tuple[str, ...] = ()
    error: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.timing is None and not self.error:
            raise ValueError("a measurement has a timing or an error")


def nearest_rank(ordered: Sequence[int], percent: float) -> int:
    """Return the nearest-rank percentile of an ascending sequence (Hyndman and Fan 1996, definition 1)."""
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def _histogram(ordered: Sequence[int]) -> tuple[tuple[int, int], ...]:
    counts: dict[int, int] = {}
    for sample in ordered:
        index = math.floor(HISTOGRAM_BINS_PER_OCTAVE * math.log2(sample)) if sample > 0 else 0
        counts[index] = counts.get(index, 0) + 1
    return tuple((math.floor(2 ** (i / HISTOGRAM_BINS_PER_OCTAVE)), counts[i]) for i in sorted(counts))
