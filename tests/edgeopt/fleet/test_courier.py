# SPDX-License-Identifier: Apache-2.0
"""How chunks are handed to the connection: not more than it takes, in the order of asking, and on after it was lost."""

import queue
from collections.abc import Iterator

import pytest
from paho.mqtt.client import MQTT_ERR_CONN_LOST, MQTTMessageInfo

from edgeopt.fleet.courier import MAX_UNDER_WAY, Courier
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.manifest import Compatible
from edgeopt_wire.messages import Pull

CHUNK = 64 * 1024
INDEX = PackageIndex(
    "tiny", "1", "host", Compatible(("host",)), 200 * CHUNK, "a" * 64, CHUNK, ("b" * 64,) * 200
)
ROOM = MAX_UNDER_WAY // CHUNK


class Everybody:
    """All may have it, and nobody shares it."""

    def allowed_index(self, device_id: str, sha256: str) -> PackageIndex | None:
        return INDEX if sha256 == INDEX.sha256 else None

    def sharers(self, sha256: str) -> int:
        return 1


class Connection:
    """Takes messages and writes them when it is told to. Its receipts are paho's own, treated as paho treats them."""

    def __init__(self) -> None:
        self.waiting: list[MQTTMessageInfo] = []
        self.numbers: queue.Queue[int] = queue.Queue()

    def send(self, topic: str, content: bytes) -> MQTTMessageInfo:
        receipt = MQTTMessageInfo(1)
        self.waiting.append(receipt)
        self.numbers.put(int(topic.rsplit("/", maxsplit=1)[-1]))
        return receipt

    def write(self) -> None:
        while self.waiting:
            self.waiting.pop()._set_as_published()

    def lose(self) -> None:
        """As `Client.reconnect` does with what waits at QoS 0."""
        while self.waiting:
            receipt = self.waiting.pop()
            receipt.rc = MQTT_ERR_CONN_LOST
            receipt._set_as_published()

    def taken(self) -> list[int]:
        """What was handed over until nothing more is."""
        found = []
        try:
            while True:
                found.append(self.numbers.get(timeout=0.5))
        except queue.Empty:
            return found


@pytest.fixture
def connection() -> Connection:
    return Connection()


@pytest.fixture
def courier(connection: Connection) -> Iterator[Courier]:
    made = Courier("default", Everybody(), lambda _index, _number: bytes(CHUNK), connection.send)
    made.start()
    yield made
    made.stop()


def test_no_more_waits_in_this_process_than_is_allowed(courier: Courier, connection: Connection) -> None:
    courier.ask("d1", Pull(INDEX.sha256, ((0, 200),)))
    first = connection.taken()
    assert first == list(range(len(first)))
    assert ROOM // 2 <= len(first) <= ROOM
    found = first
    while len(found) < 200:
        connection.write()
        found += connection.taken()
    assert found == list(range(200))


def test_what_was_lost_with_a_connection_does_not_end_it(courier: Courier, connection: Connection) -> None:
    courier.ask("d1", Pull(INDEX.sha256, ((0, 200),)))
    before = len(connection.taken())
    connection.lose()
    assert connection.taken()[0] == before


def test_who_may_not_have_it_is_told(courier: Courier) -> None:
    offer = courier.ask("d1", Pull("c" * 64, ((0, 1),)))
    assert offer is not None
    assert "not told to run" in offer.refusal
