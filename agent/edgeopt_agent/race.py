# SPDX-License-Identifier: Apache-2.0
"""Which variant is the fastest on this device: each once, then those that are close in turns until their order is certain.

Rules:
- Only variants that reproduce their golden outputs run for first place.
- Close ones are measured in turns, in a new order every round, so that a board that warms or a neighbour that works is
  everybody's. A round's ratio to the leader counts, not its time.
- Certain is what a paired t interval of the logarithms says (95 %); what is not certain after `MAX_ROUNDS` is said.
- A crash, a time-out or missing memory may have been the moment's fault: such a variant gets one more try at the end.

Source: Student 1908, "The probable error of a mean" (paired differences, n - 1 degrees of freedom).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeopt_wire.measurement import Measurement

CLOSE = 1.15
"""Within this of the fastest a first measurement tells nothing: boards vary by 5 % and more from minute to minute."""
MAX_ROUNDS = 7
MOMENTARY = frozenset({"crash", "timeout", "memory"})
"""Kinds of failure (`edgeopt_agent.probe.Failure`) that a second try may not meet."""

_T95 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom."""

Probe = Callable[[str], Measurement]


@dataclass(frozen=True)
class Race:
    """How it ended. `said` is a sentence for the log and the fleet; `winner` is None where no variant runs right."""

    measurements: tuple[Measurement, ...]
    winner: Measurement | None
    is_certain: bool
    said: str


def race(variants: Sequence[str], probe: Probe) -> Race:
    """Measure variants (ids, in the manifest's order) with `probe` until it is clear which is the fastest."""
    found = _each_once(variants, probe)
    times = {entry.variant: [p50] for entry in found if (p50 := _p50(entry)) is not None}
    if not times:
        return Race(tuple(found), None, is_certain=True, said="no variant runs right on this device")
    leader = min(times, key=lambda variant: times[variant][0])
    behind = {variant: times[variant][0] / times[leader][0] for variant in times}
    close = [variant for variant in times if behind[variant] <= CLOSE]
    for number in range(1, MAX_ROUNDS):
        if len(close) == 1:
            break
        close = _again(close if number % 2 == 0 else close[::-1], probe, found, times)
        if not close:
            return Race(
                tuple(found), None, is_certain=True, said="every fast variant failed when it ran again"
            )
        leader = min(close, key=lambda variant: _mean_log(times[variant]))
        ratios = {variant: _ratio(times[variant], times[leader]) for variant in close}
        behind |= {variant: ratio for variant, (ratio, _) in ratios.items()}
        close = [variant for variant in close if variant == leader or ratios[variant][1] <= 1]
    winner = next(entry for entry in reversed(found) if entry.variant == leader and _p50(entry) is not None)
    said = _said(leader, behind, [variant for variant in close if variant != leader])
    return Race(tuple(found), winner, is_certain=len(close) == 1, said=said)


def _each_once(variants: Sequence[str], probe: Probe) -> list[Measurement]:
    """One measurement of each, and one more of those that failed by the moment's fault."""
    found = [probe(variant) for variant in variants]
    again = [entry.variant for entry in found if entry.extra.get("failure") in MOMENTARY]
    return [*found, *(probe(variant) for variant in again)]


def _again(
    close: Sequence[str], probe: Probe, found: list[Measurement], times: dict[str, list[int]]
) -> list[str]:
    """One round; gives those that still run right: one that fails now is none to rely on."""
    right = []
    for variant in close:
        found.append(probe(variant))
        p50 = _p50(found[-1])
        if p50 is not None:
            times[variant].append(p50)
            right.append(variant)
    return right


def _said(leader: str, behind: dict[str, float], tied: Sequence[str]) -> str:
    others = ", ".join(f"{variant} {ratio:.2f}x" for variant, ratio in behind.items() if variant != leader)
    said = f"{leader} is the fastest{f' ({others} its time)' if others else ''}"
    return said + (f"; {', '.join(tied)} cannot be told from it in {MAX_ROUNDS} rounds" if tied else "")


def _p50(entry: Measurement) -> int | None:
    """The median latency in nanoseconds of a variant that runs right."""
    is_right = entry.timing is not None and entry.golden_ok and not entry.error
    return entry.timing.p50_ns if is_right and entry.timing is not None else None


def _mean_log(times: Sequence[int]) -> float:
    return sum(map(math.log, times)) / len(times)


def _ratio(times: Sequence[int], leader: Sequence[int]) -> tuple[float, float]:
    """How much slower than the leader, and the lower end of its 95 % interval, from the rounds that both ran."""
    logs = [math.log(a / b) for a, b in zip(times, leader, strict=True)]
    mean = sum(logs) / len(logs)
    freedom = len(logs) - 1
    if freedom < min(_T95):
        return math.exp(mean), 0.0
    error = math.sqrt(sum((value - mean) ** 2 for value in logs) / freedom / len(logs))
    return math.exp(mean), math.exp(mean - _T95[freedom] * error)
