# SPDX-License-Identifier: Apache-2.0
"""The MQTT transport on real brokers: windows, lost chunks, garbage, and a broker that is killed in the middle."""

import hashlib
import os
import queue
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgeopt.fleet.broker import EmbeddedBroker
from edgeopt.fleet.catalog import Catalog
from edgeopt.publish import publish
from edgeopt_agent.transports import Acknowledged, Identity, Inbox, Online, Wanted
from edgeopt_agent.transports import mqtt as transport_module
from edgeopt_agent.transports.mqtt import MqttOptions, MqttTransport
from edgeopt_wire import topics
from edgeopt_wire.archive import write_archive
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import RecipeError, TransportError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.manifest import FileEntry, Manifest
from edgeopt_wire.messages import (
    Ack,
    EventBatch,
    MetaRequest,
    Presence,
    Pull,
    PullRefused,
    Reported,
)

pytestmark = pytest.mark.flow
Publisher = Any
MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
WAIT_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(claim: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if claim():
            return
        time.sleep(0.02)
    pytest.fail(f"waited {WAIT_S} s for: {what}")


class Mosquitto:
    """A real mosquitto on loopback that can be killed and started again on its port."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self._config = folder / "mosquitto.conf"
        self._config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")

    def start(self) -> None:
        assert MOSQUITTO is not None
        self._process = subprocess.Popen([MOSQUITTO, "-c", str(self._config)], stderr=subprocess.DEVNULL)
        until(self._listens, "mosquitto listens")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture(params=["iotcore", "mosquitto"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "mosquitto" and MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    made = (EmbeddedBroker if request.param == "iotcore" else Mosquitto)(tmp_path, free_port())
    made.start()
    yield made
    made.stop()


class Server:
    """Answers one device from a repository with the fleet's own catalog; `spoil` may change or drop a chunk."""

    def __init__(self, port: int, repository: Path, index: PackageIndex) -> None:
        self.catalog, self.index = Catalog(repository), index
        self.seen: dict[str, list[bytes]] = {what: [] for what in topics.UP}
        self.spoil: Callable[[int, bytes], bytes | None] = lambda _, chunk: chunk
        self.refuse = ""
        self.asked: list[int] = []
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self.client.on_message = lambda _c, _u, message: self.jobs.put(message)
        self.client.on_connect = lambda client, *_: client.subscribe(
            [(topics.every_device("default", what), 1) for what in topics.UP]
        )
        self.ready = threading.Event()
        self.client.on_subscribe = lambda *_: self.ready.set()
        self.client.reconnect_delay_set(1, 1)
        self.jobs: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert self.ready.wait(WAIT_S)

    def send(self, what: str, payload: bytes, *, retain: bool = False) -> None:
        self.client.publish(topics.topic("default", "d1", what), payload, qos=1, retain=retain)

    def _work(self) -> None:
        while (message := self.jobs.get()) is not None:
            what = topics.parse(message.topic)[2]
            self.seen[what].append(message.payload)
            if what == "meta":
                self.send(
                    "meta-reply", to_bytes(self.catalog.answer(from_bytes(MetaRequest, message.payload)))
                )
            elif what == "pull":
                self._give(from_bytes(Pull, message.payload))

    def _give(self, pull: Pull) -> None:
        if self.refuse:
            self.send("refused", b"garbage")
            self.send("refused", to_bytes(PullRefused(pull.sha256, self.refuse)))
            return
        for number, chunk in self.catalog.chunks(pull, self.index):
            self.asked.append(number)
            content = self.spoil(number, chunk)
            if content is not None:
                self.client.publish(topics.chunk("default", "d1", pull.sha256, number), content, qos=0)

    def close(self) -> None:
        self.jobs.put(None)
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def index(publisher: Publisher, tmp_path: Path) -> PackageIndex:
    """A package of about 60 chunks."""
    publisher.add("1")
    small = publisher.folder / "package-1"
    weights = np.random.default_rng(5).bytes(60 * 64 * 1024)
    manifest = from_bytes(Manifest, (small / "manifest.json").read_bytes())
    entry = FileEntry("variants/weights.bin", len(weights), hashlib.sha256(weights).hexdigest())
    large = replace(manifest, version="2", files=(*manifest.files, entry))
    members: dict[str, Any] = {e.path: small / e.path for e in manifest.files}
    path = tmp_path / "large.edgeopt"
    with path.open("w+b") as file:
        write_archive(file, {**members, "variants/weights.bin": weights, "manifest.json": to_bytes(large)})
    found: PackageIndex = publish(path, publisher.repository, publisher.keys, now=publisher.now).index
    return found


@pytest.fixture
def server(broker: Any, publisher: Publisher, index: PackageIndex) -> Iterator[Server]:
    made = Server(broker.port, publisher.repository, index)
    yield made
    made.close()


@pytest.fixture
def inbox() -> Inbox:
    return queue.Queue(100)


@pytest.fixture
def device(
    broker: Any, server: Server, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MqttTransport]:
    monkeypatch.setattr(transport_module, "CHUNK_TIMEOUT_S", 0.5)
    monkeypatch.setattr(transport_module, "MAX_DELAY_S", 1.0)
    made = MqttTransport(MqttOptions("127.0.0.1", broker.port), Identity("default", "d1", "s1", "0"), inbox)
    made.start()
    assert isinstance(inbox.get(timeout=WAIT_S), Online)
    yield made
    made.close()


class Kept:
    """Keeps what is right, as a store does."""

    def __init__(self, index: PackageIndex) -> None:
        self.index, self.chunks = index, {}

    def __call__(self, number: int, chunk: bytes) -> bool:
        if hashlib.sha256(chunk).hexdigest() != self.index.chunks[number]:
            return False
        self.chunks[number] = chunk
        return True

    def pull(self, device: MqttTransport) -> None:
        missing = [n for n in range(len(self.index.chunks)) if n not in self.chunks]
        device.pull(self.index, missing, self)

    @property
    def is_whole(self) -> bool:
        joined = b"".join(self.chunks[n] for n in sorted(self.chunks))
        return hashlib.sha256(joined).hexdigest() == self.index.sha256


def test_package_arrives_whole_and_each_chunk_once(
    device: MqttTransport, server: Server, index: PackageIndex
) -> None:
    kept = Kept(index)
    kept.pull(device)
    assert kept.is_whole
    assert sorted(server.asked) == list(range(len(index.chunks)))


def test_only_what_is_missing_is_asked_for(
    device: MqttTransport, server: Server, index: PackageIndex
) -> None:
    device.pull(index, [3, 4, 9], Kept(index))
    assert sorted(server.asked) == [3, 4, 9]


def test_lost_chunks_are_asked_for_again(device: MqttTransport, server: Server, index: PackageIndex) -> None:
    lost = {5, 6, 30}

    def lose(number: int, chunk: bytes) -> bytes | None:
        if number in lost:
            lost.discard(number)
            return None
        return chunk

    server.spoil = lose
    kept = Kept(index)
    kept.pull(device)
    assert kept.is_whole


def test_one_wrong_chunk_comes_again_and_one_that_stays_wrong_ends_the_pull(
    device: MqttTransport, server: Server, index: PackageIndex
) -> None:
    wrong = {7: 1}

    def spoil(number: int, chunk: bytes) -> bytes:
        if wrong.get(number, 0) > 0:
            wrong[number] -= 1
            return chunk[::-1]
        return chunk

    server.spoil = spoil
    kept = Kept(index)
    kept.pull(device)
    assert kept.is_whole
    wrong[7] = 10_000
    with pytest.raises(TransportError, match="came wrong"):
        Kept(index).pull(device)


def test_silence_ends_the_pull_with_how_much_is_missing(
    device: MqttTransport, server: Server, index: PackageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_module, "CHUNK_TIMEOUT_S", 0.05)
    server.spoil = lambda _number, _chunk: None
    with pytest.raises(TransportError, match=f"{len(index.chunks)} chunks are missing"):
        Kept(index).pull(device)


def test_refusal_is_said_and_garbage_is_not_taken_for_one(
    device: MqttTransport, server: Server, index: PackageIndex
) -> None:
    server.refuse = "not desired by this device"
    with pytest.raises(TransportError, match="not desired by this device"):
        Kept(index).pull(device)


@pytest.mark.parametrize(
    "broker", ["mosquitto"], indirect=True
)  # iotcore cannot be started twice in one process
def test_broker_that_is_killed_in_the_middle_costs_only_what_was_under_way(
    device: MqttTransport, server: Server, broker: Any, index: PackageIndex, inbox: Inbox
) -> None:
    kept = Kept(index)

    def kill(number: int, chunk: bytes) -> bytes:
        if number == 20 and not killed:
            killed.append(number)
            broker.stop()
        return chunk

    killed: list[int] = []
    server.spoil = kill
    with pytest.raises(TransportError):
        kept.pull(device)
    assert killed
    before = set(kept.chunks)
    server.ready.clear()
    broker.start()
    assert server.ready.wait(WAIT_S)
    server.asked.clear()
    until(lambda: isinstance(inbox.get(timeout=WAIT_S), Online), "the device is back")
    kept.pull(device)
    assert kept.is_whole
    assert not before & set(server.asked)


def test_metadata_of_many_pages_arrives_and_none_is_an_answer(
    device: MqttTransport, publisher: Publisher
) -> None:
    large = publisher.repository / "targets" / "large.json"
    large.write_bytes(bytes(range(250)) * 800)
    assert device.fetch("targets/large.json") == large.read_bytes()
    assert device.fetch("metadata/2.root.json") is None
    assert device.fetch("../keys/root.pem") is None


def test_wishes_and_acknowledgements_reach_the_inbox_and_garbage_does_not(
    device: MqttTransport, server: Server, inbox: Inbox
) -> None:
    server.send("ack", b"\xff{")
    server.send("desired", b"an envelope", retain=True)
    server.send("ack", to_bytes(Ack("o", 7)))
    assert inbox.get(timeout=WAIT_S) == Wanted(b"an envelope")
    assert inbox.get(timeout=WAIT_S) == Acknowledged(Ack("o", 7))


def test_reports_events_and_both_presences_go_out(device: MqttTransport, server: Server) -> None:
    device.report(Reported("d1", "host", "s1", 0, "0", ()))
    assert device.send(EventBatch("d1", (), "o"))
    until(lambda: server.seen["reported"] and server.seen["event"], "report and events arrive")
    device.close()
    until(lambda: len(server.seen["presence"]) >= 2, "online, then offline")
    first, last = server.seen["presence"][0], server.seen["presence"][-1]
    assert from_bytes(Presence, first) == Presence("d1", True, "s1", "0")
    assert not from_bytes(Presence, last).online


@pytest.mark.parametrize("host", ["192.0.2.1", "broker.example"])
def test_plain_mqtt_to_another_machine_is_refused_unless_said(host: str) -> None:
    with pytest.raises(RecipeError, match="insecure"):
        MqttOptions(host)
    assert MqttOptions(host, insecure=True).insecure


def test_no_broker_is_an_error_that_names_it(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "REPLY_TIMEOUT_S", 0.2)
    port = free_port()
    away = MqttTransport(MqttOptions("127.0.0.1", port), Identity("default", "d1", "s", "0"), inbox)
    away.start()
    with pytest.raises(TransportError, match=f":{port} is away"):
        away.fetch("metadata/timestamp.json")
    away.close()
