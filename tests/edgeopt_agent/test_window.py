# SPDX-License-Identifier: Apache-2.0
"""The window of a pull on links of every kind, played chunk by chunk: it fills the link and fills nothing else."""

import heapq

import pytest

from edgeopt_agent.window import FIRST, LEAST, MOST, MOST_SILENCE_S, TARGET_S, Window

CHUNK = 64 * 1024


class Link:
    """A link with a rate and a delay; chunks queue in it one behind the other."""

    def __init__(self, bytes_s: float, delay_s: float, limit_bytes_s: int = 0) -> None:
        self.now, self.free_at = 0.0, 0.0
        self.bytes_s, self.delay_s = bytes_s, delay_s
        self.window = Window(CHUNK, 0.0, limit_bytes_s=limit_bytes_s)
        self.coming: list[tuple[float, int]] = []
        self.next = 0
        self.waits: list[float] = []

    def ask(self) -> None:
        room = self.window.room(self.now)
        for _ in range(room):
            self.free_at = max(self.free_at, self.now + self.delay_s / 2) + CHUNK / self.bytes_s
            heapq.heappush(self.coming, (self.free_at + self.delay_s / 2, self.next))
            self.window.ask([self.next], self.now)
            self.next += 1

    def run(self, seconds: float) -> int:
        """Bytes that came in these seconds."""
        end, came = self.now + seconds, 0
        while self.now < end:
            self.ask()
            at = self.coming[0][0] if self.coming else end
            later = min(at, self.now + self.window.wait_s(self.now))
            self.now = later
            if later == at and self.coming:
                self.waits.append(max(0.0, self.free_at - self.now))
                self.window.came(heapq.heappop(self.coming)[1], self.now)
                came += CHUNK
        return came


@pytest.mark.parametrize(
    ("bytes_s", "delay_s"),
    [(125e3, 0.3), (1.25e6, 0.02), (1.25e6, 0.2), (12.5e6, 0.05), (19e6, 0.05), (200e6, 0.001)],
)
def test_the_window_fills_the_link(bytes_s: float, delay_s: float) -> None:
    link = Link(bytes_s, delay_s)
    link.run(10)
    assert link.run(20) >= 0.93 * 20 * bytes_s


@pytest.mark.parametrize("bytes_s", [30e3, 125e3, 1.25e6, 12.5e6])
def test_what_is_heard_besides_waits_for_few_chunks(bytes_s: float) -> None:
    link = Link(bytes_s, 0.02)
    link.run(60)
    link.waits.clear()
    link.run(60)
    assert max(link.waits) <= max(TARGET_S * 1.1 + CHUNK / bytes_s, 2.1 * CHUNK / bytes_s)


def test_a_limit_is_kept_and_used() -> None:
    link = Link(50e6, 0.01, limit_bytes_s=1_000_000)
    came = link.run(30)
    assert 0.95 * 30e6 <= came <= 30e6 + 1_000_000


def test_silence_halves_the_window_and_is_judged_more_slowly_each_time() -> None:
    window = Window(CHUNK, 0.0)
    window.ask(range(FIRST), 0.0)
    assert not window.is_silent(4.9)
    assert window.is_silent(5.0)
    assert window.silent() == list(range(FIRST))
    assert window.size == FIRST // 2
    assert not window.is_silent(100.0), "nothing is asked for"
    for _ in range(10):
        window.ask([0], 0.0)
        window.silent()
    assert window.size == LEAST
    assert window.silence_s == MOST_SILENCE_S


def test_a_modem_gets_the_time_that_a_chunk_takes_there() -> None:
    link = Link(4000, 0.5)
    link.run(120)
    assert link.window.silence_s >= CHUNK / 4000
    assert link.window.size <= 3


def test_a_chunk_that_was_asked_for_twice_teaches_nothing_about_time() -> None:
    window = Window(CHUNK, 0.0)
    window.ask([0], 0.0)
    window.silent()
    window.ask([0], 5.0)
    assert window.came(0, 5.001)
    assert window.took_s == 0.0


def test_what_nobody_asked_for_changes_nothing_and_the_window_has_an_end() -> None:
    window = Window(CHUNK, 0.0)
    assert not window.came(3, 0.1)
    assert window.size == FIRST
    for number in range(500):
        window.ask([number], number * 0.001)
        window.came(number, number * 0.001 + 0.0005)
    assert window.size == MOST
