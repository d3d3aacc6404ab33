# SPDX-License-Identifier: Apache-2.0
"""A budget is a contract: met, or exit code 3 with the nearest candidates.

Rules:
- `max_drop` is in points of the metric (0.01 = one point of top-1, or of agreement with the baseline where there are
  no labels) and is checked on the evaluation data as given; what a sample cannot tell is a warning, not a pass mark.
- `max_latency` is checked against p90, because that is what can be promised, and only where it was measured on the
  device itself: a figure of another machine proves nothing.
- `max_size` is the model file's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeopt_wire.errors import RecipeError
from edgeopt_wire.manifest import Quality
from edgeopt_wire.measurement import Measurement

_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TIMES = {"NS": 1, "US": 10**3, "MS": 10**6, "S": 10**9}


@dataclass(frozen=True)
class Budget:
    """What a candidate must keep to; None where the user set no limit."""

    max_drop: float | None = None
    max_latency_ns: int | None = None
    max_size_bytes: int | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.max_drop, self.max_latency_ns, self.max_size_bytes))

    def broken_by(
        self, *, size_bytes: int, quality: Quality | None, measurement: Measurement | None, on_device: bool
    ) -> list[str]:
        """Say which limits a candidate breaks, one sentence each; empty if it keeps all."""
        found: list[str] = []
        if self.max_size_bytes is not None and size_bytes > self.max_size_bytes:
            found.append(f"{size_bytes} bytes, {size_bytes - self.max_size_bytes} above --max-size")
        if self.max_drop is not None:
            found.extend(self._drop_broken(quality))
        if self.max_latency_ns is not None:
            found.extend(self._latency_broken(measurement, on_device=on_device))
        return found

    def _drop_broken(self, quality: Quality | None) -> list[str]:
        lost = drop(quality) if quality else None
        if lost is None:
            return ["--max-drop cannot be checked: there is no evaluation data"]
        if self.max_drop is not None and lost > self.max_drop + 1e-9:
            return [f"drops {100 * lost:.2f} points, --max-drop allows {100 * self.max_drop:.2f}"]
        return []

    def _latency_broken(self, measurement: Measurement | None, *, on_device: bool) -> list[str]:
        if not on_device:
            why = (
                "this machine is not the device; leave it out and let a rollout measure, or build for `host`"
            )
            return [f"--max-latency cannot be checked: {why}"]
        if measurement is None or measurement.timing is None:
            return ["--max-latency cannot be checked: it could not be measured here"]
        if self.max_latency_ns is not None and measurement.timing.p90_ns > self.max_latency_ns:
            return [
                f"p90 {measurement.timing.p90_ns / 1e6:.2f} ms, --max-latency allows {self.max_latency_ns / 1e6:.2f} ms"
            ]
        return []


def drop(quality: Quality) -> float | None:
    """How much a candidate lost, as a share: of the metric where there are labels, else of agreement."""
    if quality.value is not None and quality.baseline_value is not None:
        return quality.baseline_value - quality.value
    return None if quality.agreement is None else 1 - quality.agreement


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
