# SPDX-License-Identifier: Apache-2.0
"""A device listens to the fastest lane that it measured it can keep, and to none where it cannot."""

import pytest

from edgeopt_agent.listening import LEAST_QUIET_S, MAX_QUIET, Listening
from edgeopt_wire.lanes import BURST, LANES_KIB_S, Lanes

CHUNK = 64 * 1024
OFFER = Lanes("a" * 64, LANES_KIB_S)


def hear(listening: Listening, kib_s: float, bursts: int, now: float = 0.0) -> tuple[int, float]:
    """Bursts of the lane over a way that takes `kib_s`; where the device wants to be, and when."""
    wanted, lane = listening.lane, listening.lane
    for _ in range(bursts):
        for number in range(BURST):
            wanted = listening.heard(now + number * 64 / kib_s, is_news=True)
            if wanted != lane:
                return wanted, now
        now += BURST * 64 / lane
    return wanted, now


@pytest.mark.parametrize(("took_s", "lane"), [(0.01, 64), (0.9, 64), (1.1, 0), (16.0, 0)])
def test_the_first_chunk_says_whether_the_slowest_lane_can_be_kept(took_s: float, lane: int) -> None:
    assert Listening(OFFER, CHUNK).first(took_s) == lane


@pytest.mark.parametrize(
    ("kib_s", "lane"), [(100_000, 4096), (9000, 4096), (8000, 512), (1100, 512), (1000, 64)]
)
def test_a_faster_lane_is_taken_only_with_twice_its_rate(kib_s: float, lane: int) -> None:
    listening = Listening(OFFER, CHUNK)
    listening.begin(64, 0.0)
    assert hear(listening, kib_s, 5)[0] == lane


def test_one_fast_burst_is_not_enough() -> None:
    listening = Listening(OFFER, CHUNK)
    listening.begin(64, 0.0)
    assert hear(listening, 100_000, 1)[0] == 64


def test_a_lane_that_is_too_fast_is_left() -> None:
    listening = Listening(OFFER, CHUNK)
    listening.begin(512, 0.0)
    assert hear(listening, 400, 5)[0] == 0


def test_a_limit_of_the_device_holds_for_lanes() -> None:
    listening = Listening(OFFER, CHUNK, limit_bytes_s=600 * 1024)
    listening.begin(64, 0.0)
    assert hear(listening, 100_000, 5)[0] == 512
    assert Listening(OFFER, CHUNK, limit_bytes_s=10 * 1024).first(0.001) == 0


def test_a_lane_that_may_not_be_heard_is_not_asked_for_again() -> None:
    listening = Listening(OFFER, CHUNK)
    listening.begin(64, 0.0)
    listening.without(4096)
    assert hear(listening, 100_000, 5)[0] == 512
    listening.without(64)
    assert listening.first(0.001) == 0


def test_a_silent_lane_is_asked_again_and_then_left() -> None:
    listening = Listening(OFFER, CHUNK)
    listening.begin(4096, 0.0)
    assert not listening.is_due(LEAST_QUIET_S - 0.1)
    now = 0.0
    for attempt in range(MAX_QUIET):
        now += LEAST_QUIET_S
        assert listening.is_due(now)
        assert listening.asked_again(now) == (0 if attempt == MAX_QUIET - 1 else 4096)
