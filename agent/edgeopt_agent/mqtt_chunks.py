# SPDX-License-Identifier: Apache-2.0
"""Getting a package's chunks over MQTT: on the device's own stream, or on a lane that several devices share.

Rules:
- Chunks and requests for them travel at QoS 0. They are asked for in a window that the device owns (`window`); what does not come is asked for
  again, so that a lost message, a broker that was killed and one that forgot everything all look the same.
- A lane is believed as little as any other way: every chunk is judged by whoever keeps it. A lane that is slow, silent,
  refused or gives wrong bytes is left for the own stream.
- Telemetry goes first: while events wait for their acknowledgement nothing more is asked for, for `HOLD_S` at most.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from edgeopt_agent.listening import Listening
from edgeopt_agent.pulling import MAX_WRONG_CHUNKS, NOTHING, check_rate, runs
from edgeopt_agent.window import Window
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import DocumentError, NotOfferedError, TransportError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.lanes import Lanes
from edgeopt_wire.messages import Pull, PullRefused
from edgeopt_wire.topics import OFFER

_log = logging.getLogger(__name__)

MAX_SILENT_ROUNDS = 4
"""Rounds of silence, each with half the window, before the pull is put off."""
HOLD_S = 2.0
"""The longest that a pull waits for telemetry."""
HOLD_STEP_S, STEP_S = 0.05, 0.5
ANSWER_S = 10.0
"""How long a broker may take to answer a subscription."""
LEAST_TO_SHARE = 8
"""Fewer missing chunks are not worth a lane."""
MAX_RUNS = 512
"""More runs of missing chunks are asked for later: a request stays below 10 kB."""

Answers: TypeAlias = "queue.Queue[tuple[str, tuple[str, ...], bytes]]"
"""What the control plane answered: the topic's word, what follows it, and the payload.

Chunks of a lane come under the word `blob`; `lane` is what became of the subscription of that
number, with no payload if it holds."""


class Line(Protocol):
    """The connection that questions go out on."""

    @property
    def is_online(self) -> bool:
        """Whether what is published now is handed over."""
        ...

    @property
    def is_telling(self) -> bool:
        """Whether telemetry was sent and is not acknowledged yet."""
        ...

    def require_online(self) -> None:
        """Wait a little for the broker; TransportError if it stays away."""
        ...

    def publish(self, what: str, payload: bytes, *, qos: int = 1) -> bool:
        """Hand a message over; False where nobody listens."""
        ...

    def listen(self, kib_s: int, sha256: str) -> int:
        """Subscribe to a lane of a blob; the number of the subscription comes back among the answers."""
        ...

    def stop_listening(self, kib_s: int, sha256: str) -> None:
        """End such a subscription."""
        ...


class ChunkPull:
    """One pull of one blob. `keep` says whether a chunk was right."""

    def __init__(
        self,
        line: Line,
        answers: Answers,
        index: PackageIndex,
        *,
        silence_s: float,
        limit_bytes_s: int = 0,
    ) -> None:
        self._line = line
        self._answers = answers
        self._index = index
        self._limit = limit_bytes_s
        self._started = time.monotonic()
        self._window = Window(
            index.chunk_bytes, self._started, limit_bytes_s=limit_bytes_s, silence_s=silence_s
        )
        self._missing: set[int] = set()
        self._waiting: deque[int] = deque()
        self._keep: Callable[[int, bytes], bool] = lambda _number, _chunk: False
        self._kept_bytes = self._wrong = self._silent = 0
        self._held_since = 0.0
        self._may_share = False
        self._listening: Listening | None = None
        self._wanted_lane = self._subscription = 0
        self._wanted_at = 0.0

    def run(self, missing: Sequence[int], keep: Callable[[int, bytes], bool]) -> None:
        """Get all of `missing`.

        Raises:
            TransportError: The other side is away, too slow, or gives wrong bytes.
            NotOfferedError: It refuses.
        """
        self._missing, self._keep = set(missing), keep
        self._waiting = deque(sorted(self._missing))
        self._may_share = len(self._missing) >= LEAST_TO_SHARE
        drain(self._answers)
        try:
            while self._missing:
                self._ask()
                self._hear()
                self._look()
        finally:
            self._leave_lanes()

    @property
    def _lane(self) -> int:
        return self._listening.lane if self._listening is not None else 0

    def _ask(self) -> None:
        """Fill the window of the own stream."""
        now = time.monotonic()
        if self._lane or self._wanted_lane or self._is_held(now):
            return
        room = self._window.room(now)
        fresh: list[int] = []
        while self._waiting and len(fresh) < room:
            number = self._waiting.popleft()
            if number in self._missing:
                fresh.append(number)
        if fresh:
            self._window.ask(fresh, now)
            self._request(fresh, 0 if self._may_share else None)

    def _is_held(self, now: float) -> bool:
        if not self._line.is_telling:
            self._held_since = 0.0
            return False
        self._held_since = self._held_since or now
        return now - self._held_since < HOLD_S

    def _request(self, numbers: Sequence[int], lane: int | None) -> None:
        extra = {} if lane is None else {"lane": lane}
        request = to_bytes(Pull(self._index.sha256, runs(numbers)[:MAX_RUNS], extra))
        if not self._line.publish("pull", request, qos=0):
            raise TransportError("the broker is away")

    def _hear(self) -> None:
        """Take the next answer, if one comes before there is something else to do."""
        try:
            what, rest, payload = self._answers.get(timeout=self._step_s())
        except queue.Empty:
            self._keep(NOTHING, b"")
            return
        digest = self._index.sha256[:16]
        if what == "refused":
            reason = _refusal(payload, self._index)
            if reason:
                raise NotOfferedError(f"the package is refused: {reason}")
        elif what == "lane":
            if rest == (str(self._subscription),):
                self._answered(is_open=not payload)
        elif what == "blob" and len(rest) == 3 and rest[1] == digest and rest[2].isdigit():
            self._chunk(int(rest[2]), payload, lane=rest[0])
        elif what == "chunk" and len(rest) == 2 and rest[0] == digest:
            if rest[1].isdigit():
                self._chunk(int(rest[1]), payload)
            elif rest[1] == OFFER:
                self._offered(payload)

    def _step_s(self) -> float:
        if self._held_since:
            return HOLD_STEP_S
        return min(STEP_S, self._window.wait_s(time.monotonic()))

    def _chunk(self, number: int, chunk: bytes, lane: str = "") -> None:
        now = time.monotonic()
        self._window.came(number, now)
        is_news = number in self._missing
        if is_news:
            self._silent = 0
            if self._keep(number, chunk):
                self._missing.discard(number)
                self._kept_bytes += len(chunk)
            else:
                self._wrong_chunk(number, lane)
        if lane and lane == str(self._lane) and self._listening is not None:
            self._go_to(self._listening.heard(now, is_news=is_news))
        elif not lane:
            self._consider()

    def _wrong_chunk(self, number: int, lane: str) -> None:
        _log.warning(
            "chunk %d of %s is not what was signed; asked for again", number, self._index.sha256[:12]
        )
        self._wrong += 1
        if self._wrong > MAX_WRONG_CHUNKS:
            raise TransportError(
                f"{self._wrong} chunks of {self._index.sha256[:12]} came wrong, the last is {number}; later again"
            )
        if lane:
            self._go_to(0)
        else:
            self._waiting.append(number)

    def _look(self) -> None:
        """Whether it is slow, silent, or gone."""
        now = time.monotonic()
        check_rate(f"the package {self._index.sha256[:12]}", self._kept_bytes, now - self._started)
        if not self._missing:
            return
        if not self._line.is_online:
            self._give_up()
        if self._wanted_lane and now - self._wanted_at > ANSWER_S:
            self._answered(is_open=False)
        if self._listening is not None and self._lane:
            if self._listening.is_due(now):
                self._ask_lane_again(now)
        elif self._window.is_silent(now):
            self._silent += 1
            if self._silent > MAX_SILENT_ROUNDS:
                self._give_up()
            self._put_back(self._window.silent())

    def _give_up(self) -> None:
        raise TransportError(f"the package stopped arriving, {len(self._missing)} chunks are missing")

    def _put_back(self, numbers: Sequence[int]) -> None:
        self._waiting.extendleft(reversed(numbers))

    def _offered(self, payload: bytes) -> None:
        try:
            offer = from_bytes(Lanes, payload)
        except DocumentError as error:
            _log.warning("an offer of lanes is ignored: %s", error)
            return
        if self._may_share and self._listening is None and offer.sha256 == self._index.sha256:
            self._listening = Listening(offer, self._index.chunk_bytes, self._limit)
            self._consider()

    def _consider(self) -> None:
        """Choose the first lane, once there is an offer and a chunk that shows how fast they come."""
        if self._listening is None or self._lane or self._wanted_lane or not self._window.took_s:
            return
        self._put_back(
            self._window.clear()
        )  # the rest of the first request is not sent: it is to come on a lane
        lane = self._listening.first(self._window.took_s)
        if lane:
            self._try(lane)
        else:
            self._go_to(0)

    def _try(self, lane: int) -> None:
        self._wanted_lane, self._wanted_at = lane, time.monotonic()
        self._subscription = self._line.listen(lane, self._index.sha256)

    def _answered(self, *, is_open: bool) -> None:
        """The broker lets us hear the lane that we asked for, or does not."""
        lane = self._wanted_lane
        if not lane or self._listening is None:
            return
        self._wanted_lane = 0
        if not is_open:
            _log.warning("the lane of %d KiB/s cannot be heard; the broker may not allow its topic", lane)
            self._listening.without(lane)
            if not self._lane:
                self._go_to(0)
            return
        if self._lane:
            self._line.stop_listening(self._lane, self._index.sha256)
        self._listening.begin(lane, time.monotonic())
        _log.info("%s is heard on the lane of %d KiB/s", self._index.sha256[:12], lane)
        self._request(sorted(self._missing), lane)

    def _go_to(self, lane: int) -> None:
        if lane == self._lane and lane:
            return
        if lane:
            if not self._wanted_lane:
                self._try(lane)
            return
        _log.info("%s comes on a stream of its own", self._index.sha256[:12])
        self._leave_lanes()
        self._may_share = False
        self._waiting = deque(sorted(self._missing - set(self._window.asked)))

    def _ask_lane_again(self, now: float) -> None:
        assert self._listening is not None, "called on a lane"
        if self._listening.asked_again(now):
            self._request(sorted(self._missing), self._lane)
        else:
            self._go_to(0)

    def _leave_lanes(self) -> None:
        for lane in {self._lane, self._wanted_lane} - {0}:
            self._line.stop_listening(lane, self._index.sha256)
        self._listening, self._wanted_lane = None, 0


def drain(answers: Answers) -> None:
    """Forget what was answered to earlier questions."""
    try:
        while True:
            answers.get_nowait()
    except queue.Empty:
        pass


def _refusal(payload: bytes, index: PackageIndex) -> str:
    """Why this package is refused; empty if it is not, or if what came cannot be read."""
    try:
        refused = from_bytes(PullRefused, payload)
    except DocumentError as error:
        _log.warning("a refusal is ignored: %s", error)
        return ""
    return (refused.reason or "no reason given") if refused.sha256 == index.sha256 else ""
