# SPDX-License-Identifier: Apache-2.0
"""Pure rules of a rollout: what a device's word means for it, which wave is open, when it widens, halts or ends.

Rules:
- Only a device's own report counts, and only for the rollout that it names: a retained report on an earlier try of
  the same version says nothing of this one. Succeeded means: the new package is committed, after its outputs were compared
  with golden ones and its variants were measured on the device.
- Silence is a result: a device that was offered the package and has not finished by the deadline is `timed_out`.
- A wave opens when every device of the wave before has succeeded, failures allowed by `max_failures` aside.
- More failures than allowed halt the rollout: nobody else is offered the package.
- A device has one rollout of a model in hand: a newer one takes it over (`superseded`). A rollout whose devices have
  all ended, some of them elsewhere, is `superseded` too: nothing was proved on those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from edgeopt_wire.errors import RecipeError
from edgeopt_wire.messages import Phase, Reported

SUCCEEDED = "succeeded"
SUPERSEDED = "superseded"
FAILURES = ("failed", "rolled_back", "timed_out", "rejected")
FINAL = (SUCCEEDED, *FAILURES, SUPERSEDED, "removed")
"""Statuses of a device in a rollout that nothing changes any more."""

ENDED = ("succeeded", "halted", "aborted", SUPERSEDED)
"""Statuses of a rollout that nothing changes any more."""

_WORKING = {
    Phase.IDLE: "offered",
    Phase.RESOLVING: "accepted",
    Phase.DOWNLOADING: "downloading",
    Phase.VERIFYING: "downloading",
    Phase.STAGED: "staged",
    Phase.PROBING: "probing",
    Phase.TRIAL: "trial",
    Phase.COMMITTED: "trial",
    Phase.ROLLING_BACK: "trial",
    Phase.ROLLED_BACK: "rolled_back",
    Phase.FAILED: "failed",
}


@dataclass(frozen=True)
class Part:
    """One device's part in a rollout, as the rules see it."""

    device: str
    wave: int
    status: str
    offered_at: datetime | None = None


@dataclass(frozen=True)
class Step:
    """What to do now: whom to offer the package, who timed out, and the rollout's status."""

    offer: tuple[str, ...] = ()
    timed_out: tuple[str, ...] = ()
    status: str = "running"
    reason: str = ""


def status_of(report: Reported, *, model: str, version: str, rollout: str) -> tuple[str, str]:
    """What a report means for a rollout of `version`: (status, error); ("", "") if it says nothing of it.

    A report that names no rollout is taken for any rollout of the version.
    """
    for entry in report.models:
        if entry.name != model or entry.rollout not in ("", rollout):
            continue
        done = entry.phase in (Phase.COMMITTED, Phase.IDLE) and entry.version == version
        if done and entry.candidate_version in ("", version):
            return SUCCEEDED, ""
        if entry.candidate_version == version:
            return _WORKING[entry.phase], entry.error
    return "", ""


def next_step(parts: Sequence[Part], *, now: datetime, deadline: timedelta, max_failures: int) -> Step:
    """Decide the next step of a running rollout."""
    late = tuple(
        part.device
        for part in parts
        if part.status not in FINAL and part.offered_at is not None and now - part.offered_at > deadline
    )
    now_is = {part.device: "timed_out" if part.device in late else part.status for part in parts}
    failed = [device for device, status in now_is.items() if status in FAILURES]
    if len(failed) > max_failures:
        reason = f"{len(failed)} of {len(parts)} devices failed ({', '.join(failed[:3])}), {max_failures} are allowed"
        return Step(timed_out=late, status="halted", reason=reason)
    open_parts = [part for part in parts if now_is[part.device] not in FINAL]
    replaced = [device for device, status in now_is.items() if status == SUPERSEDED]
    if not open_parts and replaced:
        reason = f"a newer rollout took over {len(replaced)} of {len(parts)} devices"
        return Step(timed_out=late, status=SUPERSEDED, reason=reason)
    if not open_parts:
        return Step(timed_out=late, status="succeeded")
    wave = min(part.wave for part in open_parts)
    offer = tuple(
        part.device for part in open_parts if part.wave == wave and now_is[part.device] == "pending"
    )
    return Step(offer=offer, timed_out=late)


def assign_waves(devices: Sequence[tuple[str, str]], percents: Sequence[int]) -> dict[str, int]:
    """Split (device, class) pairs into waves by cumulative percent of each class, at least one device a wave.

    Raises:
        RecipeError: The percents do not rise to 100.
    """
    if not percents or list(percents) != sorted(set(percents)) or percents[-1] != 100 or percents[0] < 1:
        raise RecipeError(
            f"waves are rising percents that end with 100, such as 10,50,100; found {list(percents)}"
        )
    found: dict[str, int] = {}
    for device_class in sorted({kind for _, kind in devices}):
        members = sorted(device for device, kind in devices if kind == device_class)
        for position, device in enumerate(members):
            found[device] = next(
                wave
                for wave, percent in enumerate(percents)
                if position < max(wave + 1, -(-len(members) * percent // 100))
            )
    return found
