# SPDX-License-Identifier: Apache-2.0
"""How often a device connects to a broker that takes it and throws it out: by a virtual clock, then a real kicker."""

import itertools
import queue
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tcp_proxy import kind_of, split

from edgeopt_agent.reconnecting import MOST, End, Pace, Reconnecting
from edgeopt_agent.transports import Identity, Inbox, Trouble
from edgeopt_agent.transports import mqtt as transport_module
from edgeopt_agent.transports.mqtt import MqttOptions, MqttTransport

TEN_MINUTES = 600.0
TAKEN_OVER = b"\xe0\x02\x8e\x00"
CONNACK = b"\x20\x03\x00\x00\x00"
REFUSED = b"\x20\x03\x00\x87\x00"


class Days:
    """A clock of a simulation, and a device on it."""

    def __init__(self, seed: int, pace: Pace | None = None) -> None:
        self.seconds = 0.0
        self.pace = pace or Pace()
        self.reconnecting = Reconnecting(self.pace, lambda: self.seconds, random.Random(seed))

    def live(self, until_s: float, end: End, session_s: float) -> list[float]:
        """Connect until then, every session as long; when it connected."""
        connects = []
        while self.seconds < until_s:
            began = self.seconds
            connects.append(began)
            self.seconds += session_s
            self.seconds += self.reconnecting.pause_s(end, began, session_s)
        return connects


def most_in_ten_minutes(moments: list[float]) -> int:
    return max(sum(begin <= moment < begin + TEN_MINUTES for moment in moments) for begin in moments)


@pytest.mark.parametrize("session_s", [0.0, 0.01, 4.0, 20.0, 59.0])
def test_broker_that_kicks_sees_at_most_twelve_connects_in_any_ten_minutes(session_s: float) -> None:
    """However long it waits before it kicks; 200 devices, a day each."""
    counts = [most_in_ten_minutes(Days(seed).live(86400, End.LOST, session_s)[:60]) for seed in range(200)]
    assert max(counts) <= MOST
    assert sum(counts) / len(counts) < 10


def test_kicks_after_good_sessions_are_bounded_too() -> None:
    assert max(most_in_ten_minutes(Days(seed).live(7200, End.LOST, 61.0)) for seed in range(50)) <= MOST


def test_lost_session_is_taken_up_within_seconds_and_a_fleet_comes_back_spread_out() -> None:
    pauses = []
    for seed in range(1000):
        device = Days(seed)
        device.live(1200, End.LOST, 0.0)
        began = device.seconds
        device.seconds += 3600.0
        pauses.append(device.reconnecting.pause_s(End.LOST, began, 3600.0))
    assert max(pauses) <= device.pace.first_s
    assert max(sum(n <= pause < n + 1 for pause in pauses) for n in range(5)) < 350


def test_nobody_there_is_tried_at_least_once_a_minute() -> None:
    moments = Days(1).live(86400, End.AWAY, 0.0)
    assert max(later - earlier for earlier, later in itertools.pairwise(moments)) <= 60.0


def test_somebody_with_this_name_is_never_answered_in_kind() -> None:
    """Two devices with one identity, each throwing the other out: some ten minutes a turn, not a second."""
    moments = Days(3).live(86400, End.DISPLACED, 1.0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert min(gaps) > 300


def test_changed_configuration_begins_anew() -> None:
    device = Days(5)
    device.live(3600, End.LOST, 0.0)
    device.reconnecting.soon()
    assert device.reconnecting.pause_s(End.LOST, device.seconds, 0.0) <= device.pace.first_s


class Kicker:
    """A broker by TCP and MQTT 5 alone that takes whoever connects and then does one unfriendly thing."""

    def __init__(self, unfriendly: Callable[[socket.socket], None]) -> None:
        self.connects: list[float] = []
        self._unfriendly = unfriendly
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            self.connects.append(time.monotonic())
            threading.Thread(target=self._serve, args=(end,), daemon=True).start()

    def _serve(self, end: socket.socket) -> None:
        with end:
            try:
                self._unfriendly(end)
            except OSError:
                return

    def close(self) -> None:
        self._listener.close()


def packets(end: socket.socket) -> Iterator[bytes]:
    rest = b""
    while content := end.recv(65536):
        found, rest = split(rest + content)
        yield from found


def slam(end: socket.socket) -> None:
    """Close before anything was said."""


def refuse(end: socket.socket) -> None:
    next(packets(end))
    end.sendall(REFUSED)


def kick_after_connack(end: socket.socket) -> None:
    next(packets(end))
    end.sendall(CONNACK)
    time.sleep(0.02)


def kick_after_subscribing(end: socket.socket) -> None:
    """The device is online for a moment, as far as it knows."""
    for packet in packets(end):
        if kind_of(packet) == 1:
            end.sendall(CONNACK)
        elif kind_of(packet) == 8:
            (mid,) = struct.unpack_from(">H", packet, 2)
            end.sendall(struct.pack(">BBHB5B", 0x90, 8, mid, 0, 1, 1, 1, 1, 0))
            time.sleep(0.05)
            return


def take_over(end: socket.socket) -> None:
    next(packets(end))
    end.sendall(CONNACK)
    time.sleep(0.02)
    end.sendall(TAKEN_OVER)


def connect(kicker: Kicker) -> tuple[MqttTransport, Inbox]:
    inbox: Inbox = queue.Queue(100)
    made = MqttTransport(MqttOptions("127.0.0.1", kicker.port), Identity("default", "d1", "s", "0"), inbox)
    made.start()
    return made, inbox


def count(unfriendly: Callable[[socket.socket], None], seconds: float) -> list[float]:
    kicker = Kicker(unfriendly)
    device, _ = connect(kicker)
    time.sleep(seconds)
    device.close()
    kicker.close()
    return kicker.connects


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> float:
    """Everything that is waited for passes 600 times as fast: ten minutes are one second."""
    for name in ("FIRST_DELAY_S", "MAX_DELAY_S", "AWAY_DELAY_S", "SETTLED_S"):
        monkeypatch.setattr(transport_module, name, getattr(transport_module, name) / 600)
    return TEN_MINUTES / 600


@pytest.mark.parametrize("unfriendly", [slam, refuse, kick_after_connack, kick_after_subscribing])
def test_real_kicker_sees_at_most_twelve_connects_in_ten_fast_minutes(
    faster: float, unfriendly: Callable[[socket.socket], None]
) -> None:
    connects = count(unfriendly, faster)
    assert 2 <= len(connects) <= MOST


def test_two_devices_with_one_identity_are_reported_and_tried_slowly(faster: float) -> None:
    kicker = Kicker(take_over)
    device, inbox = connect(kicker)
    said: Any = inbox.get(timeout=5)
    assert isinstance(said, Trouble)
    assert "default.d1: two devices have one identity" in said.error
    time.sleep(faster)
    device.close()
    kicker.close()
    assert len(kicker.connects) <= 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("unfriendly", [kick_after_connack])
def test_ten_real_minutes_of_kicks(unfriendly: Callable[[socket.socket], None]) -> None:
    connects = count(unfriendly, TEN_MINUTES)
    assert 2 <= len(connects) <= MOST
