# SPDX-License-Identifier: Apache-2.0
"""Measure variants of an extracted package on this host, by the probe that the agent runs on a device.

Rules:
- Rounds are interleaved (A, B, A, B): a machine that gets slower while it works does not favour who came first.
- A variant's result is its round with the lowest p50; all rounds stand in `extra["rounds"]`.
- A variant that failed, or missed its golden outputs, in any round has that round as its result.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from edgeopt_agent.probe import ProbeRequest, run_probe, utc_now
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.measurement import Measurement

Progress = Callable[[str, int, Measurement], None]
"""Called after each probe with the variant, the round (from 0) and what came of it."""


@dataclass(frozen=True)
class ProbeBudget:
    """How long one probe of one variant may take."""

    warmup_ns: int = 500_000_000
    minimum_runs: int = 100
    minimum_ns: int = 1_000_000_000
    maximum_ns: int = 30_000_000_000
    timeout_s: float = 120.0
    memory_limit_bytes: int | None = None


QUICK = ProbeBudget(warmup_ns=100_000_000, minimum_runs=100, minimum_ns=300_000_000, maximum_ns=5_000_000_000)
"""For a first look: still 100 samples, so that there is a p99."""


def measure(
    folder: Path,
    variants: Sequence[str],
    *,
    package_sha256: str,
    device_id: str,
    device_class: str,
    stand_in_for: str = "",
    budget: ProbeBudget | None = None,
    rounds: int = 1,
    progress: Progress | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> dict[str, Measurement]:
    """Probe each variant `rounds` times, interleaved, one process at a time.

    Raises:
        RecipeError: No variant, a variant named twice, or no round.
        StoreError: The folder holds no readable package.
    """
    if not variants or len(set(variants)) != len(variants) or rounds < 1:
        raise RecipeError(
            f"measure needs at least one round and variants that differ, found {rounds} of {list(variants)}"
        )
    budget = budget or ProbeBudget()
    found: dict[str, list[Measurement]] = {variant: [] for variant in variants}
    for number in range(rounds):
        for variant in variants:
            request = ProbeRequest(
                folder=str(folder),
                variant=variant,
                package_sha256=package_sha256,
                device_id=device_id,
                device_class=device_class,
                stand_in_for=stand_in_for,
                warmup_ns=budget.warmup_ns,
                minimum_runs=budget.minimum_runs,
                minimum_ns=budget.minimum_ns,
                maximum_ns=budget.maximum_ns,
            )
            result = run_probe(
                request, timeout_s=budget.timeout_s, memory_limit_bytes=budget.memory_limit_bytes, clock=clock
            )
            found[variant].append(result)
            if progress is not None:
                progress(variant, number, result)
    return {variant: best_round(measurements) for variant, measurements in found.items()}


def best_round(measurements: Sequence[Measurement]) -> Measurement:
    """Return the round that counts, with all rounds in its `extra`; see the rules above."""
    chosen = min(measurements, key=_order)
    return dataclasses.replace(
        chosen, extra={**chosen.extra, "rounds": [_summary(measurement) for measurement in measurements]}
    )


def _order(measurement: Measurement) -> tuple[int, int]:
    if measurement.timing is None:
        return (0, 0)
    return (2 if measurement.golden_ok else 1, measurement.timing.p50_ns)


def _summary(measurement: Measurement) -> dict[str, Any]:
    if measurement.timing is None:
        return {"error": measurement.error}
    timing = measurement.timing
    return {
        "n": timing.n,
        "min_ns": timing.min_ns,
        "p50_ns": timing.p50_ns,
        "p90_ns": timing.p90_ns,
        "stable": measurement.stable,
        "golden_ok": measurement.golden_ok,
    }
