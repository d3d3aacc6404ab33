# SPDX-License-Identifier: Apache-2.0
"""Pauses between attempts at work that was put off: full jitter, doubled each time up to `MAX_PAUSE_S`.

Source: Brooker 2015, "Exponential Backoff And Jitter" (the full jitter).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0


@dataclass
class Pause:
    """How long to wait before work that was put off is tried again; moments in seconds that only go forward."""

    until: float = 0.0
    seconds: float = FIRST_PAUSE_S

    def begin(self, now: float) -> None:
        """Put off once more."""
        self.until = now + random.uniform(0, self.seconds)
        self.seconds = min(MAX_PAUSE_S, 2 * self.seconds)

    def shorten(self, now: float) -> None:
        """Something changed that may help: try within a second."""
        self.until = min(self.until, now + random.uniform(0, 1))
