# SPDX-License-Identifier: Apache-2.0
"""Which chunk goes out next, and to whom: own streams of single devices, and lanes that devices share.

Rules:
- A device's own stream holds what it asked for and no more: the window is the device's.
- A lane sends a chunk once for all that asked for it, in bursts, at the rate that is its name and never faster: whoever
  listens measured that it keeps up, so that nothing piles up at the broker for a slow one.
- A lane waits a little until those that will share it have asked; who comes later is served on the next round.
- Own streams take turns, and no lane waits for another: a slow device slows only itself.

No clock and no network in here; `edgeopt.fleet.courier` has both. The idea of asking, keeping still and hearing another's
answer is that of scalable reliable multicast (Floyd et al., 1997).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from edgeopt_wire.index import PackageIndex
from edgeopt_wire.lanes import BURST
from edgeopt_wire.messages import Pull

GATHER_S = 3.0
"""The longest that a lane waits for others before its first burst."""
QUIET_S = 0.25
"""A lane that everybody asked on begins when nobody has come for this long."""
RECENT_S = 1.0
"""What a lane sent so recently may be on its way to whoever asks for it again."""
MAX_OWN_CHUNKS = 256
"""More is not kept for one device; it asks again."""
FORGET_S = 60.0


@dataclass(frozen=True)
class Chunk:
    """A chunk to publish: on a lane, or for one device where `lane` is 0."""

    index: PackageIndex
    number: int
    device: str = ""
    lane: int = 0


@dataclass
class _Own:
    """What one device waits for of one blob, in the order in which it asked."""

    index: PackageIndex
    waiting: OrderedDict[int, None] = field(default_factory=OrderedDict)


@dataclass
class _Lane:
    """One blob on one lane: who still wants which chunks, as bits of a number."""

    index: PackageIndex
    opened_at: float
    wants: dict[str, int] = field(default_factory=dict)
    came_at: float = 0.0
    next_at: float = 0.0
    is_open: bool = False
    at: int = 0
    sent_at: dict[int, float] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)

    def pick(self, now: float) -> int | None:
        """The next chunk in the round that somebody wants."""
        wanted = 0
        for mask in self.wants.values():
            wanted |= mask
        if not wanted:
            return None
        above = wanted >> self.at
        number = self.at + _lowest(above) if above else _lowest(wanted)
        bit = ~(1 << number)
        self.wants = {device: mask & bit for device, mask in self.wants.items() if mask & bit}
        self.at, self.sent_at[number] = number + 1, now
        return number


class Streams:
    """All streams of a tenant. `now` is seconds that only go forward; one thread at a time."""

    def __init__(self) -> None:
        self._own: OrderedDict[tuple[str, str], _Own] = OrderedDict()
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._expected: dict[str, int] = {}

    def ask(self, device: str, pull: Pull, index: PackageIndex) -> None:
        """A device asks on its own stream; it is on no lane then."""
        self._leave(device, index.sha256)
        own = self._own.setdefault((device, index.sha256), _Own(index))
        for number in _numbers(pull, index):
            if len(own.waiting) >= MAX_OWN_CHUNKS:
                break
            own.waiting[number] = None

    def ask_lane(
        self, device: str, pull: Pull, index: PackageIndex, *, lane: int, expected: int, now: float
    ) -> None:
        """A device that listens to `lane` asks there; `expected` is how many are told to run the package, all in all."""
        self._leave(device, index.sha256, but=lane)
        found = self._lanes.setdefault((index.sha256, lane), _Lane(index, now))
        again = device in found.known
        if not again:
            found.came_at = now
            found.known.add(device)
        mask = found.wants.get(device, 0)
        for number in _numbers(pull, index):
            if not again or now - found.sent_at.get(number, now - RECENT_S) >= RECENT_S:
                mask |= 1 << number
        if mask:
            found.wants[device] = mask
        self._expected[index.sha256] = expected

    def gone(self, device: str) -> None:
        """A device is away: nothing more is sent to it."""
        for key in [key for key in self._own if key[0] == device]:
            del self._own[key]
        for lane in self._lanes.values():
            lane.wants.pop(device, None)

    def next_own(self) -> Chunk | None:
        """The next chunk of an own stream, devices in turn."""
        while self._own:
            key, own = self._own.popitem(last=False)
            if own.waiting:
                number, _ = own.waiting.popitem(last=False)
                self._own[key] = own  # behind all others
                return Chunk(own.index, number, device=key[0])
        return None

    def next_burst(self, now: float) -> list[Chunk]:
        """What one of the lanes sends now: a burst, or nothing where none is due."""
        for (sha256, rate), lane in list(self._lanes.items()):
            if not lane.is_open:
                lane.is_open = self._has_gathered(sha256, lane, now)
                lane.next_at = max(lane.next_at, now)
            if not lane.is_open or now < lane.next_at:
                continue
            burst = [Chunk(lane.index, n, lane=rate) for n in _take(lane, now)]
            if burst:
                lane.next_at = now + len(burst) * lane.index.chunk_bytes / (rate * 1024)
                return burst
            if now - max(lane.came_at, lane.next_at) > FORGET_S:
                del self._lanes[sha256, rate]
        return []

    def pause_s(self, now: float, most: float) -> float:
        """Seconds until a lane may be due, at most `most`."""
        due = [
            lane.next_at if lane.is_open else lane.came_at + QUIET_S
            for lane in self._lanes.values()
            if lane.wants
        ]
        return min([most, *(max(moment - now, 0.01) for moment in due)])

    def _has_gathered(self, sha256: str, lane: _Lane, now: float) -> bool:
        if now - lane.opened_at >= GATHER_S:
            return True
        here = sum(len(other.wants) for (sha, _), other in self._lanes.items() if sha == sha256)
        return now - lane.came_at >= QUIET_S and here >= self._expected.get(sha256, 0)

    def _leave(self, device: str, sha256: str, but: int = 0) -> None:
        for (sha, rate), lane in self._lanes.items():
            if sha == sha256 and rate != but:
                lane.wants.pop(device, None)


def _numbers(pull: Pull, index: PackageIndex) -> Iterator[int]:
    for first, count in pull.runs:
        yield from range(first, min(first + count, len(index.chunks)))


def _take(lane: _Lane, now: float) -> Iterator[int]:
    for _ in range(BURST):
        number = lane.pick(now)
        if number is None:
            return
        yield number


def _lowest(mask: int) -> int:
    """The number of the lowest bit that is set."""
    return (mask & -mask).bit_length() - 1
