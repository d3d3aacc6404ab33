# SPDX-License-Identifier: Apache-2.0
"""How many chunks a device has asked for and not got yet, and when it may ask for more.

Rules:
- The window grows while chunks come soon after they were asked for. Once they wait for each other on the way it shrinks:
  what queues up on a slow link delays everything else that the device must hear, acknowledgements above all.
- Silence halves it, and is judged by how long chunks took before: four times that, at least a second.
- A limit of bytes a second, where the configuration gives one, holds for what is asked for.

Source: the delay target is the idea of LEDBAT (RFC 6817), the time-out that of TCP (RFC 6298) without repeated samples.
"""

from __future__ import annotations

from collections.abc import Sequence

FIRST, LEAST, MOST = 4, 1, 64
"""Chunks: 256 KiB at the start, 4 MiB at most."""
TARGET_S = 0.3
"""A chunk that takes so much longer than the fastest waited for others on the way."""
SLOW_S = 2.0
"""Where a chunk takes longer than this, one at a time is asked for: what else is to be heard waits for one at most."""
FIRST_SILENCE_S, LEAST_SILENCE_S, MOST_SILENCE_S = 5.0, 1.0, 60.0
LIMIT_BURST_S = 0.5
"""So much of the limited rate may be asked for at once."""


class Window:
    """One pull's window. `limit_bytes_s` is the device's own limit, 0 for none; `silence_s` the first time-out."""

    def __init__(
        self, chunk_bytes: int, now: float, *, limit_bytes_s: int = 0, silence_s: float = FIRST_SILENCE_S
    ) -> None:
        self._size = float(FIRST)
        self._is_starting = True
        self.silence_s = silence_s
        self._least_silence_s = min(silence_s, LEAST_SILENCE_S)
        self._chunk_bytes = chunk_bytes
        self._asked: dict[int, float] = {}
        self._again: set[int] = set()
        self._fastest = float("inf")
        self._heard_at = now
        self.took_s = 0.0
        """How long the last chunk took that was asked for once."""
        self._smooth_s = 0.0
        self._limit = limit_bytes_s
        self._allowance = max(float(limit_bytes_s) * LIMIT_BURST_S, float(chunk_bytes))
        self._filled_at = now

    @property
    def size(self) -> int:
        """Chunks that may be asked for at once."""
        return int(self._size)

    @property
    def asked(self) -> list[int]:
        """What was asked for and has not come, ascending."""
        return sorted(self._asked)

    def room(self, now: float) -> int:
        """How many more chunks to ask for now: none until a quarter of the window is free, so that requests are few."""
        free = self.size - len(self._asked)
        if free < max(1, self.size // 4):
            return 0
        if self._limit:
            most = max(self._limit * LIMIT_BURST_S, float(self._chunk_bytes))
            self._allowance = min(most, self._allowance + (now - self._filled_at) * self._limit)
            self._filled_at = now
            free = min(free, int(self._allowance / self._chunk_bytes))
        return free

    def wait_s(self, now: float) -> float:
        """How long to listen before looking again: until silence, or until the limit lets one more chunk be asked for."""
        wait = max(0.01, self._heard_at + self.silence_s - now)
        if self._limit and len(self._asked) < self.size:
            wait = min(wait, max(0.01, (self._chunk_bytes - self._allowance) / self._limit))
        return wait

    def is_silent(self, now: float) -> bool:
        """Whether what was asked for stays away for too long."""
        return bool(self._asked) and now - self._heard_at >= self.silence_s

    def ask(self, numbers: Sequence[int], now: float) -> None:
        """These are asked for now."""
        if not self._asked:
            self._heard_at = now
        for number in numbers:
            self._asked[number] = now
        self._allowance -= len(numbers) * self._chunk_bytes

    def came(self, number: int, now: float) -> bool:
        """A chunk came; whether it had been asked for."""
        self._heard_at = now
        at = self._asked.pop(number, None)
        if at is None:
            return False
        if number in self._again:  # of which of the two requests?
            self._again.discard(number)
            return True
        took = self.took_s = now - at
        self._fastest = min(self._fastest, took)
        self._smooth_s = took if not self._smooth_s else 0.8 * self._smooth_s + 0.2 * took
        self.silence_s = min(MOST_SILENCE_S, max(self._least_silence_s, 4 * self._smooth_s))
        self._resize(took - self._fastest)
        return True

    def _resize(self, queued_s: float) -> None:
        self._is_starting = self._is_starting and queued_s < TARGET_S / 2
        off = max(-1.0, min(1.0, (TARGET_S - queued_s) / TARGET_S))
        self._size += 1.0 if self._is_starting else off / self._size
        least = LEAST if self._fastest > SLOW_S else LEAST + 1
        self._size = max(float(least), min(float(MOST), self._size))

    def clear(self) -> list[int]:
        """Nothing is asked for any more; what was."""
        asked = self.asked
        self._asked.clear()
        return asked

    def silent(self) -> list[int]:
        """Nothing came for long enough: what had been asked for, to be asked for again, in a window of half the size."""
        lost = self.clear()
        self._again.update(lost)
        self._size = max(float(LEAST), self._size / 2)
        self._is_starting = False
        self.silence_s = min(MOST_SILENCE_S, 2 * self.silence_s)
        return lost
