# SPDX-License-Identifier: Apache-2.0
"""Who runs next, with whom, and who is turned away: threads on a runner that waits for the test's word."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from edgeopt_agent.serve.refusals import Busy, Expired
from edgeopt_agent.serve.scheduler import Scheduler, Ticket
from edgeopt_wire.errors import RuntimeFailure
from edgeopt_wire.serving import Serving

WAIT_S = 10.0


class Gate:
    """A runner that notes its batches, and holds each run until `open` is set."""

    def __init__(self, serving: Serving, instances: int = 1) -> None:
        self.open = threading.Event()
        self.batches: list[list[Any]] = []
        self.scheduler = Scheduler(list(range(instances)), serving, self.run)
        self.answers: dict[Any, Any] = {}
        self.threads: list[threading.Thread] = []

    def run(self, _instance: int, contents: list[Any]) -> list[Any]:
        self.batches.append(contents)
        assert self.open.wait(WAIT_S)
        if "bad" in contents:
            raise RuntimeFailure("bad")
        return [f"answer to {content}" for content in contents]

    def ask(self, content: Any, **options: Any) -> None:
        def work() -> None:
            try:
                self.answers[content] = self.scheduler.run(Ticket(content, **options))
            except Exception as error:
                self.answers[content] = error

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()

    def end(self) -> None:
        self.open.set()
        for thread in self.threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()


def until(claim: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_the_lower_priority_number_goes_first_then_the_earlier_deadline_then_the_first() -> None:
    gate = Gate(Serving())
    gate.ask("in hand")
    until(lambda: bool(gate.batches))
    later, sooner = time.monotonic() + 100, time.monotonic() + 50
    waiting = (("late", 100, later), ("second", 100, later), ("soon", 100, sooner), ("urgent", 1, later))
    for number, (name, priority, deadline) in enumerate(waiting):
        gate.ask(name, priority=priority, until=deadline)
        until(lambda n=number: gate.scheduler.waiting == n + 1)  # type: ignore[misc]
    gate.end()
    assert gate.batches == [["in hand"], ["urgent"], ["soon"], ["late"], ["second"]]


def test_a_full_queue_refuses_the_next_with_a_time_to_come_again() -> None:
    gate = Gate(Serving(queue=2))
    gate.ask("in hand")
    until(lambda: bool(gate.batches))
    gate.ask("a")
    gate.ask("b")
    until(lambda: gate.scheduler.waiting == 2)
    with pytest.raises(Busy) as caught:
        gate.scheduler.run(Ticket("c"))
    assert caught.value.headers == {"Retry-After": "1"}
    gate.end()
    assert gate.answers == {n: f"answer to {n}" for n in ("in hand", "a", "b")}
    assert gate.scheduler.counts.refused == 1


def test_a_deadline_that_passes_in_the_queue_ends_the_request_and_frees_its_place() -> None:
    gate = Gate(Serving(queue=1))
    gate.ask("in hand")
    until(lambda: bool(gate.batches))
    with pytest.raises(Expired):
        gate.scheduler.run(Ticket("late", until=time.monotonic() + 0.05))
    assert gate.scheduler.waiting == 0
    gate.ask("next")
    until(lambda: gate.scheduler.waiting == 1)
    gate.end()
    assert gate.batches == [["in hand"], ["next"]]
    assert gate.scheduler.counts.expired == 1


def test_requests_that_wait_run_together_up_to_the_largest_batch() -> None:
    gate = Gate(Serving(max_batch=4))
    gate.ask("in hand")
    until(lambda: bool(gate.batches))
    for number in range(6):
        gate.ask(number)
        until(lambda n=number: gate.scheduler.waiting == n + 1)  # type: ignore[misc]
    gate.end()
    assert gate.batches == [["in hand"], [0, 1, 2, 3], [4, 5]]
    assert gate.answers[5] == "answer to 5"
    assert (gate.scheduler.counts.runs, gate.scheduler.counts.rows) == (3, 7)


def test_rows_count_and_a_request_that_does_not_fit_waits_for_the_next_batch() -> None:
    gate = Gate(Serving(max_batch=4))
    gate.ask("in hand")
    until(lambda: bool(gate.batches))
    for number, rows in enumerate((3, 2, 1)):
        gate.ask(number, rows=rows)
        until(lambda n=number: gate.scheduler.waiting == n + 1)  # type: ignore[misc]
    gate.end()
    assert gate.batches == [["in hand"], [0], [1, 2]]


def test_the_first_of_a_batch_waits_no_longer_than_the_delay_and_not_when_it_is_full() -> None:
    gate = Gate(Serving(max_batch=2, max_delay_us=10_000_000))
    gate.open.set()
    started = time.monotonic()
    gate.ask("first")
    time.sleep(0.05)
    assert not gate.batches, "it waits for a second one"
    gate.ask("second")
    gate.end()
    assert gate.batches == [["first", "second"]]
    assert time.monotonic() - started < 5
    alone = Gate(Serving(max_batch=2, max_delay_us=50_000))
    alone.open.set()
    started = time.monotonic()
    assert alone.scheduler.run(Ticket("alone")) == "answer to alone"
    assert 0.05 <= time.monotonic() - started < 5


def test_several_instances_run_at_once() -> None:
    gate = Gate(Serving(), instances=3)
    for number in range(4):
        gate.ask(number)
    until(lambda: len(gate.batches) == 3)
    assert gate.scheduler.waiting == 1
    gate.end()
    assert len(gate.batches) == 4


def test_a_run_that_fails_fails_for_its_batch_and_the_next_one_runs() -> None:
    gate = Gate(Serving(max_batch=2))
    gate.ask("in hand")
    until(lambda: bool(gate.batches))
    for number, name in enumerate(("bad", "its fellow", "fine")):
        gate.ask(name)
        until(lambda n=number: gate.scheduler.waiting == n + 1)  # type: ignore[misc]
    gate.end()
    assert isinstance(gate.answers["bad"], RuntimeFailure)
    assert isinstance(gate.answers["its fellow"], RuntimeFailure)
    assert gate.answers["fine"] == "answer to fine"


def test_many_threads_with_deadlines_lose_nothing_and_leave_nothing_behind() -> None:
    done: list[int] = []
    scheduler = Scheduler(
        [0, 1],
        Serving(max_batch=8, max_delay_us=500, queue=16),
        lambda _, contents: [c + 1 for c in contents],
    )
    failures: list[BaseException] = []

    def work(start: int) -> None:
        for number in range(start, start + 150):
            late = time.monotonic() + (0.0005 if number % 7 == 0 else 60)
            try:
                answer = scheduler.run(
                    Ticket(number, rows=1 + number % 3, priority=1 + number % 5, until=late)
                )
                assert answer == number + 1
                done.append(number)
            except (Busy, Expired):
                done.append(number)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a request was forgotten"
    assert not failures
    assert len(done) == 24 * 150
    assert scheduler.waiting == 0
    assert len(scheduler._free) == 2
    assert scheduler._gathering is None
