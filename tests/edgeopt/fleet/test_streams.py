# SPDX-License-Identifier: Apache-2.0
"""Who gets which chunk when: windows stay the devices', what many ask for goes out once, and nobody waits for a slow one."""

import random

import pytest

from edgeopt.fleet.streams import FORGET_S, GATHER_S, MAX_OWN_CHUNKS, Chunk, Streams
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.lanes import BURST
from edgeopt_wire.manifest import Compatible
from edgeopt_wire.messages import Pull

KIB = 1024


def index_of(chunks: int, letter: str = "a") -> PackageIndex:
    return PackageIndex(
        "tiny",
        "1",
        "host",
        Compatible(("host",)),
        chunks * 64 * KIB,
        letter * 64,
        64 * KIB,
        ("b" * 64,) * chunks,
    )


def everything(index: PackageIndex) -> Pull:
    return Pull(index.sha256, ((0, len(index.chunks)),))


class Clock:
    """Takes what lanes send until they pause for `enough` seconds; time goes on as they say."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.now = streams, 100.0
        self.sent: list[tuple[float, Chunk]] = []

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            burst = self.streams.next_burst(self.now)
            self.sent += [(self.now, chunk) for chunk in burst]
            if not burst:
                self.now += self.streams.pause_s(self.now, 0.5)

    def numbers(self, lane: int) -> list[int]:
        return [chunk.number for _, chunk in self.sent if chunk.lane == lane]


@pytest.fixture
def streams() -> Streams:
    return Streams()


@pytest.fixture
def clock(streams: Streams) -> Clock:
    return Clock(streams)


def test_a_device_gets_what_it_asked_for_in_its_order_and_nothing_else(streams: Streams) -> None:
    index = index_of(10)
    streams.ask("d1", Pull(index.sha256, ((7, 2), (0, 1))), index)
    found = [streams.next_own() for _ in range(3)]
    assert [(chunk.device, chunk.number) for chunk in found if chunk] == [("d1", 7), ("d1", 8), ("d1", 0)]
    assert streams.next_own() is None


def test_what_does_not_exist_is_not_sent_and_no_device_can_ask_for_more_than_its_share(
    streams: Streams,
) -> None:
    index = index_of(2 * MAX_OWN_CHUNKS)
    streams.ask("d1", Pull(index.sha256, ((2 * MAX_OWN_CHUNKS - 1, 5000),)), index)
    streams.ask("d1", everything(index), index)
    sent = 0
    while streams.next_own():
        sent += 1
    assert sent == MAX_OWN_CHUNKS


def test_devices_take_turns_on_their_own_streams(streams: Streams) -> None:
    index = index_of(50)
    streams.ask("greedy", everything(index), index)
    streams.ask("small", Pull(index.sha256, ((3, 2),)), index)
    order = [chunk.device for _ in range(4) if (chunk := streams.next_own())]
    assert order == ["greedy", "small", "greedy", "small"]


def test_fifty_devices_on_a_lane_cost_one_package(streams: Streams, clock: Clock) -> None:
    index = index_of(40)
    for number in range(50):
        streams.ask_lane(f"d{number}", everything(index), index, lane=512, expected=50, now=clock.now)
        clock.now += 0.01
    clock.run(30)
    assert clock.numbers(512) == list(range(40))


def test_who_comes_late_costs_only_what_was_sent_before(streams: Streams, clock: Clock) -> None:
    index = index_of(40)
    for name in ("a", "b", "c"):
        streams.ask_lane(name, everything(index), index, lane=512, expected=3, now=clock.now)
    clock.run(2.0)
    before = len(clock.sent)
    assert 0 < before < 40
    streams.ask_lane("late", everything(index), index, lane=512, expected=4, now=clock.now)
    clock.run(30)
    assert len(clock.sent) == 40 + before
    assert set(clock.numbers(512)[before:]) == set(range(40))


def test_a_lane_never_goes_faster_than_its_name(streams: Streams, clock: Clock) -> None:
    index = index_of(40)
    streams.ask_lane("a", everything(index), index, lane=512, expected=1, now=clock.now)
    clock.run(30)
    first = clock.sent[0][0]
    for moment in {at for at, _ in clock.sent}:
        sent_kib = 64 * sum(at <= moment for at, _ in clock.sent)
        assert sent_kib <= 512 * (moment - first) + BURST * 64


def test_a_lane_waits_for_those_who_are_to_share_it_but_not_for_ever(streams: Streams, clock: Clock) -> None:
    index = index_of(8)
    began = clock.now
    streams.ask_lane("a", everything(index), index, lane=64, expected=5, now=clock.now)
    clock.run(GATHER_S + 1)
    assert began + GATHER_S <= clock.sent[0][0] < began + GATHER_S + 0.6


def test_what_is_on_its_way_is_not_sent_again_and_what_was_lost_is(streams: Streams, clock: Clock) -> None:
    index = index_of(4)
    streams.ask_lane("a", everything(index), index, lane=4096, expected=1, now=clock.now)
    clock.run(0.6)
    assert clock.numbers(4096) == [0, 1, 2, 3]
    streams.ask_lane(
        "a", Pull(index.sha256, ((3, 1),)), index, lane=4096, expected=1, now=clock.sent[-1][0] + 0.1
    )
    clock.run(2)
    assert clock.numbers(4096) == [0, 1, 2, 3]
    streams.ask_lane("a", Pull(index.sha256, ((3, 1),)), index, lane=4096, expected=1, now=clock.now)
    clock.run(1)
    assert clock.numbers(4096) == [0, 1, 2, 3, 3]


def test_a_device_that_goes_to_a_faster_lane_or_its_own_stream_leaves_nothing_behind(
    streams: Streams, clock: Clock
) -> None:
    index = index_of(16)
    for lane in (64, 512):
        streams.ask_lane("a", everything(index), index, lane=lane, expected=1, now=clock.now)
    streams.ask("a", Pull(index.sha256, ((15, 1),)), index)
    clock.run(10)
    assert clock.sent == []
    own = streams.next_own()
    assert own is not None
    assert (own.device, own.number) == ("a", 15)


def test_a_slow_lane_delays_no_fast_one_and_lanes_of_nobody_are_forgotten(
    streams: Streams, clock: Clock
) -> None:
    index = index_of(16)
    streams.ask_lane("slow", everything(index), index, lane=64, expected=2, now=clock.now)
    streams.ask_lane("fast", everything(index), index, lane=4096, expected=2, now=clock.now)
    clock.run(1.5)
    assert sorted(clock.numbers(4096)) == list(range(16))
    clock.run(FORGET_S + 60)
    assert sorted(clock.numbers(64)) == list(range(16))
    assert streams.pause_s(clock.now, 0.5) == 0.5


def test_whatever_is_asked_each_device_gets_all_of_it(streams: Streams, clock: Clock) -> None:
    rng = random.Random(3)
    index = index_of(30)
    wanted: dict[tuple[str, int], set[int]] = {}
    for number in range(40):
        device, lane, first = f"d{number}", rng.choice((64, 512, 4096)), rng.randrange(25)
        wanted[device, lane] = set(range(first, first + 5))
        streams.ask_lane(
            device, Pull(index.sha256, ((first, 5),)), index, lane=lane, expected=40, now=clock.now
        )
        clock.run(rng.random() / 5)
    asked_at_once = len(clock.sent)
    clock.run(120)
    assert asked_at_once < len(clock.sent)
    for (_, lane), numbers in wanted.items():
        assert numbers <= set(clock.numbers(lane))
