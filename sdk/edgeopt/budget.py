# SPDX-License-Identifier: Apache-2.0
"""A budget is a contract: met, or exit code 3 with the nearest candidates.

Rules:
- `max_drop` is in the unit of the judged figure (0.01 = one point of top-1, or of agreement with the baseline where
  there is nothing to score), or with `relative` a part of the baseline's; it is checked on the evaluation data as
  given, and what a sample cannot tell is a warning, not a pass mark.
- `max_latency` is checked against p90, because that is what can be promised, where it was measured on the device itself:
  a figure of another machine proves nothing. Elsewhere an estimate decides, and only with its whole interval: below the
  limit it is kept, above it is broken, and between the two it cannot be told, which is not kept.
- `max_size` is the model file's; `max_memory` the peak of the process that ran it here.
- `min_coverage` is the share of multiply-accumulates that the runtime computes in integers, for integer candidates; what
  finds its ranges at run time counts only in a candidate that was made so (int8-dynamic), and is told apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeopt.predict import Estimate
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.manifest import Quality
from edgeopt_wire.measurement import Measurement

_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
P90_OVER_P50 = 1.06
"""Estimates are of p50, promises of p90: the median of both in 4,979 published logs (MLPerf edge, single stream)."""

_TIMES = {"NS": 1, "US": 10**3, "MS": 10**6, "S": 10**9}


@dataclass(frozen=True)
class Facts:
    """What is known of a candidate when it is judged; None where it is not known."""

    size_bytes: int
    quality: Quality | None = None
    drop: float | None = None
    is_share: bool = True
    measurement: Measurement | None = None
    coverage: float | None = None
    at_run_time: float = 0.0
    """The share of multiply-accumulates in integers with ranges found at run time, where `coverage` leaves it out."""
    on_device: bool = False
    estimate: Estimate | None = None
    no_estimate: str = ""


@dataclass(frozen=True)
class Budget:
    """What a candidate must keep to; None where the user set no limit."""

    max_drop: float | None = None
    max_latency_ns: int | None = None
    max_size_bytes: int | None = None
    max_memory_bytes: int | None = None
    min_coverage: float | None = None
    relative: bool = False

    def __bool__(self) -> bool:
        limits = (
            self.max_drop,
            self.max_latency_ns,
            self.max_size_bytes,
            self.max_memory_bytes,
            self.min_coverage,
        )
        return any(limit is not None for limit in limits)

    def broken_by(self, facts: Facts) -> list[str]:
        """Say which limits a candidate breaks, one sentence each; empty if it keeps all."""
        found: list[str] = []
        if self.max_size_bytes is not None and facts.size_bytes > self.max_size_bytes:
            found.append(
                f"{facts.size_bytes} bytes, {facts.size_bytes - self.max_size_bytes} above --max-size"
            )
        if self.max_drop is not None:
            found.extend(self._drop_broken(facts))
        if self.max_latency_ns is not None:
            found.extend(self._latency_broken(facts))
        if self.max_memory_bytes is not None:
            found.extend(self._memory_broken(facts.measurement))
        if (
            self.min_coverage is not None
            and facts.coverage is not None
            and facts.coverage < self.min_coverage
        ):
            apart = (
                f" (another {100 * facts.at_run_time:.1f} % with ranges found at run time)"
                if facts.at_run_time
                else ""
            )
            found.append(
                f"{100 * facts.coverage:.1f} % of the multiply-accumulates run in integers{apart}, --min-coverage asks "
                f"for {100 * self.min_coverage:.1f} %"
            )
        return found

    def _drop_broken(self, facts: Facts) -> list[str]:
        lost = facts.drop if facts.drop is not None else drop(facts.quality) if facts.quality else None
        if lost is None:
            return ["--max-drop cannot be checked: there is no evaluation data"]
        limit = self.max_drop or 0.0
        if self.relative and facts.quality is not None and facts.quality.baseline_value is not None:
            limit *= abs(facts.quality.baseline_value)
        if not lost <= limit + 1e-9:  # what is no number keeps no limit
            unit, factor = (
                ("points", 100) if facts.is_share else (facts.quality.metric if facts.quality else "", 1)
            )
            return [f"drops {factor * lost:.4g} {unit}, --max-drop allows {factor * limit:.4g}"]
        return []

    def _latency_broken(self, facts: Facts) -> list[str]:
        limit, measurement = self.max_latency_ns or 0, facts.measurement
        if not facts.on_device:
            return self._estimate_broken(facts, limit)
        if measurement is None or measurement.timing is None:
            return ["--max-latency cannot be checked: it could not be measured here"]
        if measurement.timing.p90_ns > limit:
            return [
                f"p90 {measurement.timing.p90_ns / 1e6:.2f} ms, --max-latency allows {limit / 1e6:.2f} ms"
            ]
        return []

    def _estimate_broken(self, facts: Facts, limit: int) -> list[str]:
        """What an estimate says of a limit: nothing where its whole interval is below."""
        allowed, estimate = f"--max-latency allows {limit / 1e6:.2f} ms", facts.estimate
        if estimate is None:
            reason = facts.no_estimate or "there is no estimate"
            instead = "leave it out and let a rollout measure, or build for `host` on the device"
            return [
                f"--max-latency cannot be checked: this machine is not the device, and {reason}; {instead}"
            ]
        if P90_OVER_P50 * estimate.high_ns <= limit:
            return []
        if P90_OVER_P50 * estimate.low_ns > limit:
            return [f"{estimate.short()}, {allowed}"]
        instead = "leave it out and let a rollout measure on the device"
        return [f"--max-latency cannot be told from here: {estimate.short()}, {allowed}; {instead}"]

    def _memory_broken(self, measurement: Measurement | None) -> list[str]:
        if measurement is None or measurement.peak_memory_bytes is None:
            return ["--mem cannot be checked: it could not be measured here"]
        limit = self.max_memory_bytes or 0
        if measurement.peak_memory_bytes > limit:
            return [
                f"takes {measurement.peak_memory_bytes / 1e6:.1f} MB at its peak, --mem allows {limit / 1e6:.1f} MB"
            ]
        return []


def drop(quality: Quality) -> float | None:
    """How much a candidate lost, as a share: of the metric where there are labels, else of agreement."""
    if quality.value is not None and quality.baseline_value is not None:
        return quality.baseline_value - quality.value
    return None if quality.agreement is None else 1 - quality.agreement


def parse_drop(text: str) -> tuple[float, bool]:
    """Read `1%` (points) or `1%rel` (a part of the baseline's figure); True where it is relative.

    Raises:
        RecipeError: Something else, or not between 0 and 1.
    """
    stripped = text.strip()
    is_relative = stripped.endswith("rel")
    return parse_share(stripped.removesuffix("rel")), is_relative


def parse_share(text: str) -> float:
    """Read `1%` or `0.01` as 0.01.

    Raises:
        RecipeError: Something else, or not between 0 and 1.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*(%?)\s*", text)
    try:
        share = float(found[1]) / (100 if found[2] else 1) if found else -1.0
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise RecipeError(f"expected a share such as 1% or 0.01, found {text!r}")
    return share


def parse_duration_ns(text: str) -> int:
    """Read `10ms`, `500us`, `0.01s` as nanoseconds.

    Raises:
        RecipeError: Something else; a bare number has no unit and is refused.
    """
    return _with_unit(text, _TIMES, "a duration such as 10ms, 500us or 0.01s")


def parse_size_bytes(text: str) -> int:
    """Read `5MB`, `800kB`, `4MiB` as bytes.

    Raises:
        RecipeError: Something else; a bare number has no unit and is refused.
    """
    return _with_unit(text, _SIZES, "a size such as 5MB, 800kB or 4MiB")


def _with_unit(text: str, units: dict[str, int], expected: str) -> int:
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    if not found or found[2].upper() not in units:
        raise RecipeError(f"expected {expected}, found {text!r}")
    return round(float(found[1]) * units[found[2].upper()])
