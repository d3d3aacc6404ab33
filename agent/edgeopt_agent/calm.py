# SPDX-License-Identifier: Apache-2.0
"""Measuring waits until the board is cool and idle and on mains, with patience, or says what it did not wait out.

Rules:
- Cool: the hottest zone is below its limit and has not moved by more than `SETTLED_C` within `SETTLED_S`, and nothing
  throttles. The limit is `BELOW_TRIP_C` under the lowest passive trip point, where the kernel begins to throttle.
- Idle: others take less than `MAX_OTHER_CORES` of CPU, nobody waits for a CPU, and no request is served here.
- What others took *while* a variant was measured counts for its figure: all CPU time less that of the probe.
- What a board cannot tell is None: nobody waits for it, and nobody says that it was fine.

Sources: kernel Documentation/driver-api/thermal/sysfs-api.rst (trip points), accounting/psi.rst (pressure),
filesystems/proc.rst (`/proc/stat`), ABI/testing/sysfs-class-power.
"""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgeopt_agent.conditions import ROOT, Ask, ask, read_thermal
from edgeopt_agent.probe import ProbeRequest
from edgeopt_wire.measurement import Measurement

SETTLED_C, SETTLED_S = 2.0, 10.0
BELOW_TRIP_C, MAX_TEMPERATURE_C = 10.0, 70.0
MAX_OTHER_CORES = 0.3
MAX_PRESSURE = 0.05
"""Share of the time in which somebody waited for a CPU."""
LOOK_S = 1.0
"""Seconds between two looks, and the time over which CPU load is averaged."""


@dataclass(frozen=True)
class Seen:
    """What a board was like: None where it cannot tell. `why` says what was not as it should be."""

    cool: bool | None = None
    idle: bool | None = None
    mains: bool | None = None
    why: str = ""
    waited_s: float = 0.0

    @property
    def is_calm(self) -> bool:
        """Whether nothing that can be told speaks against measuring."""
        return False not in (self.cool, self.idle, self.mains)


@dataclass(frozen=True)
class Load:
    """Counters of one moment; seconds of CPU time, of waiting for a CPU, and of the clock."""

    at: float
    busy_s: float | None
    waiting_s: float | None
    probes_s: float
    served: int

    def since(self, before: Load) -> tuple[bool | None, str]:
        """Whether others left the CPUs alone since `before`, and what they took if not."""
        took = self.at - before.at
        if self.served > before.served:
            return False, f"{self.served - before.served} requests were served"
        if self.busy_s is None or before.busy_s is None or took <= 0:
            return None, ""
        cores = (self.busy_s - before.busy_s - (self.probes_s - before.probes_s)) / took
        if cores > MAX_OTHER_CORES:
            return False, f"others kept {cores:.1f} cores busy"
        return True, ""

    def pressed_since(self, before: Load) -> str:
        """What waited for a CPU since `before`; nothing while no probe of ours may be what pressed."""
        if self.waiting_s is None or before.waiting_s is None or self.at <= before.at:
            return ""
        share = (self.waiting_s - before.waiting_s) / (self.at - before.at)
        return f"processes waited for a CPU {share:.0%} of the time" if share > MAX_PRESSURE else ""


@dataclass
class Calm:
    """Looks at one board, whose files lie below `root`. `served` counts calls of the runtime in this process."""

    root: Path = ROOT
    ask: Ask = ask
    served: Callable[[], int] = lambda: 0
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    max_temperature_c: float | None = None
    _seen_c: list[tuple[float, float]] = field(default_factory=list)

    def wait(self, patience_s: float, go_on: Callable[[], None] = lambda: None) -> Seen:
        """Return as soon as the board is calm, or after `patience_s` with what spoke against it.

        `go_on` is called between looks; what it raises ends the waiting. Without patience nothing is waited for, and
        the CPU's load, which takes time to see, is left to `watch`.
        """
        began = before = self.load()
        seen: Seen | None = None
        while (left := patience_s - (self.monotonic() - began.at)) > 0:
            self.sleep(min(LOOK_S, max(left, LOOK_S / 2)))
            go_on()
            seen = self._look(before)
            if seen.is_calm:
                break
            before = self.load()
        return replace(seen or self._look(before), waited_s=round(self.monotonic() - began.at, 1))

    def watch(self, measure: Callable[[], Measurement], before: Seen) -> Measurement:
        """Measure, and put into the conditions what the board was like before and meanwhile."""
        began = self.load()
        found = measure()
        idle, why = self.load().since(began)
        cool, hot = self._cool(settled=False)
        if found.conditions.after.throttled:
            cool, hot = False, "the board throttled while it was measured"
        reasons = dict.fromkeys(text for text in (before.why, why, hot) if text)
        said = {
            "cool": _worse(before.cool, cool),
            "idle": _worse(before.idle, idle) if idle is not None else before.idle,
            "mains": before.mains,
            "waited_s": before.waited_s,
            **({"not_calm": "; ".join(reasons)} if reasons else {}),
        }
        conditions = replace(found.conditions, extra={**found.conditions.extra, **said})
        return replace(found, conditions=conditions)

    def carefully(
        self,
        probe: Callable[[ProbeRequest], Measurement],
        patience_s: float = 0.0,
        *,
        waited_s: float = 0.0,
        go_on: Callable[[], None] = lambda: None,
    ) -> Callable[[ProbeRequest], Measurement]:
        """A probe that waits for a calm board, `patience_s` in all its calls; `waited_s` were waited before."""
        until = self.monotonic() + patience_s

        def run(request: ProbeRequest) -> Measurement:
            seen = self.wait(until - self.monotonic(), go_on)
            return self.watch(lambda: probe(request), replace(seen, waited_s=seen.waited_s + waited_s))

        return run

    def load(self) -> Load:
        """Read the counters now."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return Load(
            at=self.monotonic(),
            busy_s=busy_seconds(self.root),
            waiting_s=_waiting_s(self.root),
            probes_s=used.ru_utime + used.ru_stime,
            served=self.served(),
        )

    def _look(self, before: Load) -> Seen:
        now = self.load()
        idle, busy = (None, "") if now.at - before.at < LOOK_S / 4 else now.since(before)
        pressed = now.pressed_since(before) if idle else ""
        cool, hot = self._cool(settled=True)
        mains = on_mains(self.root)
        reasons = (hot, busy or pressed, "the board runs on its battery" if mains is False else "")
        return Seen(
            cool=cool,
            idle=idle and not pressed if idle is not None else None,
            mains=mains,
            why="; ".join(text for text in reasons if text),
        )

    def _cool(self, *, settled: bool) -> tuple[bool | None, str]:
        now = read_thermal(self.root, ask=self.ask)
        if now.throttled:
            return False, "the board throttles"
        if now.temperature_c is None:
            return None, ""
        moved = self._moved(now.temperature_c)
        limit = self.max_temperature_c or limit_c(self.root)
        if now.temperature_c > limit:
            return False, f"{now.temperature_c:.0f} degrees, at most {limit:.0f} are right for measuring"
        if settled and moved > SETTLED_C:
            return False, f"the temperature moved by {moved:.0f} degrees within {SETTLED_S:.0f} s"
        return True, ""

    def _moved(self, celsius: float) -> float:
        at = self.monotonic()
        self._seen_c = [entry for entry in self._seen_c if 0 <= at - entry[0] <= SETTLED_S]
        self._seen_c.append((at, celsius))
        values = [value for _, value in self._seen_c]
        return max(values) - min(values)


def limit_c(root: Path = ROOT) -> float:
    """The temperature in degrees Celsius up to which a board measures without soon being throttled."""
    found = []
    for kind in root.glob("sys/class/thermal/thermal_zone*/trip_point_*_type"):
        if _text(kind).strip() in ("passive", "active", "hot"):
            text = _text(kind.with_name(kind.name.replace("_type", "_temp"))).strip()
            found += [int(text) / 1000] if re.fullmatch(r"\d+", text) and int(text) > 30_000 else []
    return min(found) - BELOW_TRIP_C if found else MAX_TEMPERATURE_C


def on_mains(root: Path = ROOT) -> bool | None:
    """Whether the board is fed from outside; None where it does not say, as most boards without a battery."""
    feeds = [
        _text(folder / "online").strip()
        for folder in root.glob("sys/class/power_supply/*")
        if _text(folder / "type").strip() not in ("", "Battery")
    ]
    states = [
        _text(folder / "status").strip()
        for folder in root.glob("sys/class/power_supply/*")
        if _text(folder / "type").strip() == "Battery" and _text(folder / "scope").strip() != "Device"
    ]
    if "1" in feeds:
        return True
    if "Discharging" in states:
        return False
    return True if states and set(states) <= {"Charging", "Full", "Not charging"} else None


def _worse(one: bool | None, other: bool | None) -> bool | None:
    return False if False in (one, other) else one if one is not None else other


def busy_seconds(root: Path) -> float | None:
    """CPU time of everybody since boot in seconds: all of `/proc/stat`'s first line but idle and waiting for disks."""
    found = re.match(r"cpu +((?:\d+ ?)+)", _text(root / "proc/stat"))
    if found is None:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; guest is counted in user
    values = [int(text) for text in found.group(1).split()[:8]]
    return (sum(values) - sum(values[3:5])) / os.sysconf("SC_CLK_TCK")


def _waiting_s(root: Path) -> float | None:
    found = re.search(r"^some .*total=(\d+)", _text(root / "proc/pressure/cpu"), re.MULTILINE)
    return int(found.group(1)) / 1e6 if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
