# SPDX-License-Identifier: Apache-2.0
"""What time it is, on a board whose clock may say anything: the newest of what can be believed.

    built      the moment the agent was built
    floor      the newest moment that was seen signed, saved by the device
    signed     a moment that the director signed for a nonce of ours, plus what has passed since
    wall       the system's clock, unless it is before `built` or more than `LIFETIME` after it

Rules:
- Time only moves forward with a signature: a wall clock never raises the floor, so a clock that jumps to next year and
  back has no effect that lasts.
- A wall clock at 1970 or 2100 counts as none. With none, and no signed moment, `is_known` is false: freeze protection
  rests on the floor alone.
- What has passed is counted by the kernel's boot clock, which no setting of the wall clock moves and which goes on
  while a board sleeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

from edgeopt_wire.document import parse_moment

BUILT_AT = datetime(2026, 11, 1, tzinfo=timezone.utc)
"""No clock that says less is believed."""

LIFETIME = timedelta(days=20 * 365)
"""No agent is that old: a clock that says more is wrong."""


def boot_seconds() -> float:
    """Seconds since boot, sleep included."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


class TrustedClock:
    """A device's sense of time. `floor` gives the saved moment, empty if there is none; `built` when the agent was."""

    def __init__(
        self,
        wall: Callable[[], datetime],
        floor: Callable[[], str] = lambda: "",
        elapsed: Callable[[], float] = boot_seconds,
        *,
        built: datetime = BUILT_AT,
    ) -> None:
        self._built = built
        self._wall = wall
        self._floor = floor
        self._elapsed = elapsed
        self._signed: tuple[datetime, float] | None = None

    def now(self) -> datetime:
        """The newest moment that can be believed, whole seconds, UTC."""
        certain = self.certain()
        return max(certain, self._wall().replace(microsecond=0)) if self.is_wall_plausible else certain

    def certain(self) -> datetime:
        """The newest moment that has certainly been: built, floor or signed, never the wall clock's; whole seconds."""
        saved = self._floor()
        found = [self._built, parse_moment(saved) if saved else self._built]
        if (signed := self.signed_now()) is not None:
            found.append(signed)
        return max(found).replace(microsecond=0)

    def signed_now(self) -> datetime | None:
        """The signed moment and what has passed since, if one was learned since the start."""
        if self._signed is None:
            return None
        moment, at = self._signed
        return moment + timedelta(seconds=max(0.0, self._elapsed() - at))

    def learn(self, moment: datetime) -> None:
        """Take a moment that the director signed just now; an older one than is known changes nothing."""
        known = self.signed_now()
        if known is None or moment > known:
            self._signed = (moment, self._elapsed())

    @property
    def is_known(self) -> bool:
        """Whether there is more to go by than the floor: a plausible clock, or a signed moment."""
        return self._signed is not None or self.is_wall_plausible

    @property
    def ahead_by(self) -> timedelta | None:
        """How far the wall clock runs ahead of signed time (negative: behind), None where it cannot be told."""
        signed = self.signed_now()
        return None if signed is None else self._wall() - signed

    @property
    def is_wall_plausible(self) -> bool:
        """Whether the wall clock may be right: an agent is neither older nor younger than it says."""
        return self._built <= self._wall() <= self._built + LIFETIME
