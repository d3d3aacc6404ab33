# SPDX-License-Identifier: Apache-2.0
"""Which lane a device listens to: the fastest that it measured it can keep, or none.

Rules:
- The first chunk, which comes on the device's own stream, must have come fast enough for the slowest lane.
- On a lane chunks come in bursts; a burst's chunks follow each other as fast as the way to this device lets them. A faster
  lane is taken once two bursts in a row came at twice its rate, a lane is left once three came below its own.
- A lane that says nothing for long is left: its topic may not be allowed, or nobody sends there.

Source: the spacing of packets that were sent together shows the narrowest link (packet pairs; Keshav, 1991).
"""

from __future__ import annotations

from collections import deque

from edgeopt_wire.lanes import BURST, Lanes

MARGIN = 2.0
"""A lane must leave half of the link to everything else."""
SURE, TOO_SLOW = 2, 3
"""Bursts in a row for a faster lane, and for leaving this one."""
LEAST_QUIET_S = 4.0
"""More than a lane waits for those who share it (`edgeopt.fleet.streams`)."""
MAX_QUIET = 3


class Listening:
    """The choice of one pull. `lane` is where the device listens now, 0 for its own stream."""

    def __init__(self, offer: Lanes, chunk_bytes: int, limit_bytes_s: int = 0) -> None:
        most = limit_bytes_s // 1024 if limit_bytes_s else max(offer.kib_s)
        self._lanes = [lane for lane in offer.kib_s if lane <= most]
        self._chunk_bytes = chunk_bytes
        self._burst: list[float] = []
        self._rates: deque[float] = deque(maxlen=TOO_SLOW)
        self._quiet = 0
        self._heard_at = self._news_at = 0.0
        self.lane = 0

    def first(self, took_s: float) -> int:
        """The lane to begin with, after the first chunk came so many seconds after it was asked for; 0 for none."""
        kib_s = self._chunk_bytes / 1024 / max(took_s, 1e-6)
        return self._lanes[0] if self._lanes and kib_s >= self._lanes[0] else 0

    def begin(self, lane: int, now: float) -> None:
        """The device listens to this lane from now on."""
        self.lane = lane
        self._burst, self._quiet = [], 0
        self._rates.clear()
        self._heard_at = self._news_at = now

    def heard(self, at: float, *, is_news: bool) -> int:
        """A chunk came on the lane; the lane to be on (this one, another, or 0)."""
        self._heard_at, self._quiet = at, 0
        if is_news:
            self._news_at = at
        interval = BURST * self._chunk_bytes / 1024 / self.lane
        if self._burst and (at - self._burst[-1] > interval / 2 or len(self._burst) == BURST):
            self._burst = []
        self._burst.append(at)
        if len(self._burst) < BURST:
            return self.lane
        spread = max(self._burst[-1] - self._burst[0], 1e-6)
        self._rates.append((BURST - 1) * self._chunk_bytes / 1024 / spread)
        return self._judge()

    def without(self, lane: int) -> None:
        """This lane and those above it are not to be had."""
        self._lanes = [other for other in self._lanes if other < lane]

    @property
    def quiet_s(self) -> float:
        """How long without news until what is missing is asked for again."""
        return max(LEAST_QUIET_S, 3 * BURST * self._chunk_bytes / 1024 / max(self.lane, 1))

    def is_due(self, now: float) -> bool:
        """Whether to ask again on the lane: no chunk that was missing has come for long."""
        return now - self._news_at >= self.quiet_s

    def asked_again(self, now: float) -> int:
        """It was asked again; the lane to be on: 0 once the lane stayed silent several times."""
        self._news_at = now
        if now - self._heard_at >= self.quiet_s:
            self._quiet += 1
        return 0 if self._quiet >= MAX_QUIET else self.lane

    def _judge(self) -> int:
        recent = list(self._rates)
        if len(recent) == TOO_SLOW and max(recent) < self.lane:
            return 0
        if len(recent) >= SURE:
            sure = min(recent[-SURE:])
            better = [lane for lane in self._lanes if lane > self.lane and MARGIN * lane <= sure]
            return better[-1] if better else self.lane
        return self.lane
