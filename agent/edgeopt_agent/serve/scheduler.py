# SPDX-License-Identifier: Apache-2.0
"""Who runs next: priorities, deadlines, batches and several instances, behind one bounded queue.

Rules:
- There is no thread here. A caller that finds an instance free leads: it runs its own request on its own thread, and
  with batching takes waiting requests along. Whoever ends a run hands the instance to the best that waits.
- Best is the lowest priority number, then the earliest deadline, then the first to come.
- At most `queue` requests wait; the next is `Busy`. A deadline counts while a request waits; a run is never broken off.
- A request that leads waits at most `max_delay_us` for others; with a full batch not at all.

Why not a thread per instance? A lone request would pay two thread switches (0.1 ms here) for nothing.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from _thread import allocate_lock
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from edgeopt_agent.serve.refusals import Busy, Expired
from edgeopt_wire.errors import EdgeoptError, RuntimeFailure
from edgeopt_wire.serving import Serving

Instance = TypeVar("Instance")


class Ticket:
    """One request that wants to run: `rows` of a batch, whatever `content` its runner takes."""

    __slots__ = (
        "answer",
        "content",
        "error",
        "instance",
        "rank",
        "rows",
        "state",
        "until",
        "waited_ns",
        "wake",
    )

    def __init__(self, content: Any, rows: int = 1, priority: int = 100, until: float = float("inf")) -> None:
        self.content = content
        self.rows = rows
        self.until = until
        self.rank: tuple[int, float, int] = (priority, until, 0)
        self.state = _NEW
        self.answer: Any = None
        self.error: BaseException | None = None
        self.instance: Any = None
        self.wake = allocate_lock()
        self.waited_ns = 0

    def __lt__(self, other: Ticket) -> bool:
        return self.rank < other.rank


_NEW, _WAITING, _LEADING, _TAKEN, _DONE, _GONE = range(6)


@dataclass
class Counts:
    """What happened since the start."""

    runs: int = 0
    rows: int = 0
    refused: int = 0
    expired: int = 0
    queue_ns: int = 0
    run_ns: int = 0


class Scheduler(Generic[Instance]):
    """Runs tickets on instances. `run(instance, contents)` gives one answer a content, in order."""

    def __init__(
        self,
        instances: Sequence[Instance],
        serving: Serving,
        run: Callable[[Instance, list[Any]], Sequence[Any]],
    ) -> None:
        self.counts = Counts()
        self._free = list(instances)
        self._serving = serving
        self._run = run
        self._guard = threading.Lock()
        self._heap: list[Ticket] = []
        self._waiting = 0
        self._waiting_rows = 0
        self._gathering: tuple[Ticket, int] | None = None
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._waiting

    def run(self, ticket: Ticket) -> Any:
        """Run one ticket and return its answer.

        Raises:
            Busy: The queue is full.
            Expired: The ticket's deadline passed before it ran.
            EdgeoptError: What the runner raised.
        """
        started = time.perf_counter_ns()
        with self._guard:
            if self._free and not self._waiting and self._gathering is None:
                ticket.state, ticket.instance = _LEADING, self._free.pop()
            else:
                self._enqueue(ticket)
        if ticket.state is not _LEADING:
            self._await(ticket)
            if ticket.error is not None:
                raise ticket.error
            if ticket.state is _DONE:
                return ticket.answer
        ticket.waited_ns = time.perf_counter_ns() - started
        return self._lead(ticket)

    def _enqueue(self, ticket: Ticket) -> None:
        if self._waiting >= self._serving.queue:
            self.counts.refused += 1
            raise Busy(f"{self._waiting} requests wait, no more are taken; try again")
        ticket.rank = (ticket.rank[0], ticket.rank[1], next(self._numbers))
        ticket.state = _WAITING
        ticket.wake.acquire()
        heapq.heappush(self._heap, ticket)
        self._waiting += 1
        self._waiting_rows += ticket.rows
        if self._gathering and self._waiting_rows + self._gathering[1] >= self._serving.max_batch:
            leader = self._gathering[0]
            self._gathering = None
            leader.wake.release()

    def _await(self, ticket: Ticket) -> None:
        left = ticket.until - time.monotonic()
        if left == float("inf"):
            ticket.wake.acquire()
            return
        if ticket.wake.acquire(timeout=max(0.0, left)):
            return
        with self._guard:
            if ticket.state is _WAITING:
                ticket.state = _GONE
                self._forget(ticket)
                self.counts.expired += 1
                self._sweep()
                raise Expired("the deadline passed while the request waited; ask for less, or later")
        ticket.wake.acquire()  # it was taken just now: its answer is near

    def _lead(self, ticket: Ticket) -> Any:
        batch = [ticket]
        instance = ticket.instance
        error: BaseException | None = None
        answers: Sequence[Any] = ()
        started = time.perf_counter_ns()
        try:
            if self._serving.max_batch > 1:
                self._gather(ticket, batch)
            started = time.perf_counter_ns()
            answers = self._run(instance, [entry.content for entry in batch])
        except BaseException as found:
            error = found
            raise
        finally:
            self._release(instance, batch, time.perf_counter_ns() - started)
            for number, follower in enumerate(batch[1:], 1):
                follower.error = _again(error)
                follower.answer = None if error else answers[number]
                follower.state = _DONE
                follower.wake.release()
        return answers[0]

    def _gather(self, leader: Ticket, batch: list[Ticket]) -> None:
        delay_s = self._serving.max_delay_us / 1e6
        with self._guard:
            rows = self._take(leader.rows, batch)
            if rows >= self._serving.max_batch or not delay_s or self._gathering is not None:
                return
            self._gathering = (leader, rows)
            leader.wake = allocate_lock()
            leader.wake.acquire()
        leader.wake.acquire(timeout=delay_s)
        with self._guard:
            if self._gathering is not None and self._gathering[0] is leader:
                self._gathering = None
            self._take(rows, batch)
            self._dispatch()

    def _take(self, rows: int, batch: list[Ticket]) -> int:
        now = time.monotonic()
        while self._heap:
            best = self._heap[0]
            if best.state is not _WAITING:
                heapq.heappop(self._heap)
            elif best.until <= now:
                heapq.heappop(self._heap)
                self._expire(best)
            elif rows + best.rows <= self._serving.max_batch:
                heapq.heappop(self._heap)
                best.state = _TAKEN
                self._forget(best)
                batch.append(best)
                rows += best.rows
            else:
                break
        return rows

    def _release(self, instance: Instance, batch: list[Ticket], run_ns: int) -> None:
        with self._guard:
            self.counts.runs += 1
            self.counts.rows += sum(entry.rows for entry in batch)
            self.counts.run_ns += run_ns
            self.counts.queue_ns += batch[0].waited_ns
            self._free.append(instance)
            self._dispatch()

    def _dispatch(self) -> None:
        now = time.monotonic()
        while self._free and self._heap and self._gathering is None:
            best = heapq.heappop(self._heap)
            if best.state is not _WAITING:
                continue
            if best.until <= now:
                self._expire(best)
                continue
            self._forget(best)
            best.state, best.instance = _LEADING, self._free.pop()
            best.wake.release()

    def _expire(self, ticket: Ticket) -> None:
        self._forget(ticket)
        self.counts.expired += 1
        ticket.state = _DONE
        ticket.error = Expired("the deadline passed while the request waited; ask for less, or later")
        ticket.wake.release()

    def _forget(self, ticket: Ticket) -> None:
        self._waiting -= 1
        self._waiting_rows -= ticket.rows

    def _sweep(self) -> None:
        """Throw away tickets that left the queue from the middle of it, before they are more than those that wait."""
        if len(self._heap) > 2 * self._waiting + 16:
            self._heap = [entry for entry in self._heap if entry.state is _WAITING]
            heapq.heapify(self._heap)


def _again(error: BaseException | None) -> BaseException | None:
    """An error for another thread: raising one object in several would mix up their tracebacks."""
    if error is None:
        return None
    return (
        type(error)(str(error))
        if isinstance(error, EdgeoptError)
        else RuntimeFailure(f"the run failed: {error}")
    )
