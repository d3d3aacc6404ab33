# SPDX-License-Identifier: Apache-2.0
"""The table of fitted costs (`coefficients.toml`), and an estimate with its interval from it; standard library only.

Ways, the best first; each has the interval that it earned on published latencies it had not seen:
- `runtime`: this runtime (any version) on this board, with as many threads.
- `device`: other runtimes on this board, with as many threads; their geometric mean.
- `kind`: CPUs like this one, by cores, clock and instruction set.
Where none of them has anything to go by, there is no estimate, and the reason is said.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path
from typing import Any

from edgeopt_profiles.latency.boards import descriptors
from edgeopt_profiles.profile import DeviceProfile

FILE = Path(__file__).parent / "coefficients.toml"
SHARE = 0.8
"""The share of published latencies that lie in such an interval."""

RANGE = 4.0
"""Up to how many times beyond the published networks' multiply-accumulates an estimate is given."""

_MACS = slice(2, 7)
"""Where `work.FEATURES` holds multiply-accumulates."""

DOT_PRODUCTS = ("asimddp", "avx512_vnni", "avx_vnni", "amx_int8")
HALF_FLOATS = ("asimdhp",)


@dataclass(frozen=True)
class Group:
    """Costs in ms of one board, runtime, number format and number of threads (0: all cores)."""

    device: str
    runtime: str
    number: str
    threads: int
    rows: int
    models: int
    macs_m: tuple[float, float]
    costs: tuple[float, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Everything that was fitted. `kinds` are (proportions, speed); `residuals` log ratios (low, high) by way."""

    groups: tuple[Group, ...]
    costs: Mapping[str, tuple[float, ...]]
    speeds: Mapping[str, tuple[float, ...]]
    boards: Mapping[str, int]
    residuals: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Asked:
    """How the model is run: the runtime on the CPU with so many threads."""

    runtime: str
    threads: int


@dataclass(frozen=True)
class Found:
    """Milliseconds with the interval that holds four of five published latencies, and what it rests on."""

    ms: float
    low_ms: float
    high_ms: float
    way: str
    basis: str
    sources: tuple[str, ...]


@functools.cache
def load(file: Path = FILE) -> Table:
    """Read the table."""
    data = tomllib.loads(file.read_text(encoding="utf-8"))
    kinds = data["kinds"]
    return Table(
        tuple(Group(**_tuples(entry)) for entry in data["groups"]),
        {kind: tuple(entry["costs"]) for kind, entry in kinds.items()},
        {kind: tuple(entry["speed"]) for kind, entry in kinds.items() if "speed" in entry},
        {kind: entry["boards"] for kind, entry in kinds.items()},
        {way: (entry["low"], entry["high"]) for way, entry in data["residuals"].items()},
    )


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def estimate(
    table: Table, profile: DeviceProfile, asked: Asked, work: Mapping[str, Sequence[float]]
) -> Found | str:
    """Estimate a latency, or say why there is none.

    Args:
        table: What was fitted.
        profile: The device.
        asked: How the model is run on it.
        work: Features (`work.FEATURES`) by the number format that they are computed in; the first has the overhead.
    """
    macs = sum(sum(features[_MACS]) for features in work.values())
    everything = [group.macs_m for group in table.groups]
    low, high = min(first for first, _ in everything), max(last for _, last in everything)
    if not low / RANGE <= macs <= high * RANGE:
        return (
            f"{macs:.3g} million multiply-accumulates are far from the published networks' {low:.3g} to {high:.3g}; "
            "measure on the device"
        )
    near = [group for group in table.groups if group.macs_m[0] / RANGE <= macs <= group.macs_m[1] * RANGE]
    within = replace(table, groups=tuple(near))
    parts = [_part(within, profile, asked, number, features) for number, features in work.items()]
    if reasons := [part for part in parts if isinstance(part, str)]:
        return reasons[0]
    found = [part for part in parts if not isinstance(part, str)]
    worst = max(found, key=lambda part: log(part.high_ms / part.low_ms))
    return Found(
        sum(part.ms for part in found),
        sum(part.low_ms for part in found),
        sum(part.high_ms for part in found),
        worst.way,
        "; ".join(dict.fromkeys(part.basis for part in found)),
        tuple(dict.fromkeys(source for part in found for source in part.sources)),
    )


def _part(
    table: Table, profile: DeviceProfile, asked: Asked, number: str, features: Sequence[float]
) -> Found | str:
    cores = profile.cpu.cores
    threads = 0 if cores is not None and asked.threads >= cores else asked.threads
    place = (_board(profile), number, threads)
    here = [group for group in table.groups if (group.device, group.number, group.threads) == place]
    own = [group for group in here if group.runtime == asked.runtime]
    if own:
        return _from_groups(table, "runtime", own, features)
    if here:
        return _from_groups(table, "device", here, features)
    return _from_kind(table, profile, asked, number, features)


def _board(profile: DeviceProfile) -> str:
    """The board whose figures a family's profile shows."""
    return profile.default_module or profile.id


def _from_groups(table: Table, way: str, groups: Sequence[Group], features: Sequence[float]) -> Found:
    logs = [log(_dot(features, group.costs)) for group in groups]
    first = groups[0]
    rows, models = sum(group.rows for group in groups), max(group.models for group in groups)
    names = ", ".join(dict.fromkeys(group.runtime for group in groups))
    threads = {0: ", all cores", 1: ", 1 thread"}.get(first.threads, f", {first.threads} threads")
    basis = (
        f"{rows} published latencies of {models} networks on this board ({names} in {first.number}{threads})"
    )
    sources = tuple(dict.fromkeys(source for group in groups for source in group.sources))
    return _found(table, way, exp(sum(logs) / len(logs)), basis, sources)


def _from_kind(
    table: Table, profile: DeviceProfile, asked: Asked, number: str, features: Sequence[float]
) -> Found | str:
    kind, cpu = f"cpu-{number}", profile.cpu
    if cpu.max_mhz is None or cpu.cores is None:
        return (
            f"{profile.title} is no single board: its profile gives no clock and no number of cores, so nothing can be "
            "estimated; build for a board's own profile, or measure on the device"
        )
    if kind not in table.speeds:
        return f"no latency in {number} on a CPU is published that this could rest on; measure on the device"
    explained = descriptors(
        min(asked.threads, cpu.cores),
        cpu.max_mhz,
        dot_products=any(name in cpu.isa for name in DOT_PRODUCTS),
        half_floats=any(name in cpu.isa for name in HALF_FLOATS),
    )
    ms = _dot(features, table.costs[kind]) * exp(_dot(explained, table.speeds[kind]))
    basis = (
        f"{table.boards[kind]} other boards in {number}, scaled by cores, clock and instruction set; no measurements of this "
        "board"
    )
    return _found(table, "kind", ms, basis, ())


def _found(table: Table, way: str, ms: float, basis: str, sources: tuple[str, ...]) -> Found:
    low, high = table.residuals[way]
    return Found(ms, min(ms, ms * exp(-high)), max(ms, ms * exp(-low)), way, basis, sources)


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))
