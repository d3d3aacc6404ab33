# SPDX-License-Identifier: Apache-2.0
"""Devices of one rollout pull together from the fleet's own worker, over a real broker: what they share goes out once."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from publishing import Publisher, write_package

from edgeopt.fleet.broker import EmbeddedBroker, free_port
from edgeopt.fleet.catalog import Catalog
from edgeopt.fleet.control import Control
from edgeopt.fleet.database import engine_of, open_database, sqlite_url
from edgeopt.fleet.up import utc_now
from edgeopt.fleet.worker import BrokerAddress, Worker
from edgeopt.keys import load_signer
from edgeopt.publish import publish
from edgeopt_agent.pulling import fill
from edgeopt_agent.store import Store
from edgeopt_agent.transports import Identity, Online
from edgeopt_agent.transports.mqtt import MqttOptions, MqttTransport
from edgeopt_wire.archive import write_archive
from edgeopt_wire.index import PackageIndex

pytestmark = pytest.mark.flow
WAIT_S = 30.0


@dataclass
class Site:
    """A broker, a worker, a package that some devices are told to run, and who hears every chunk."""

    port: int
    control: Control
    index: PackageIndex
    folder: Path
    lanes: Counter[int] = field(default_factory=Counter)
    own: Counter[str] = field(default_factory=Counter)

    def roll_out(self, *devices: str) -> list[MqttTransport]:
        for name in devices:
            self.control.enrol(name, "host", stand_in=True)
        self.control.create_rollout(
            model="tiny",
            version="1",
            classes=(),
            devices=devices,
            waves=(100,),
            deadline_s=600,
            max_failures=9,
        )
        self.control.step()
        return [self.connect(name) for name in devices]

    def connect(self, name: str) -> MqttTransport:
        inbox: queue.Queue[Any] = queue.Queue(100)
        made = MqttTransport(MqttOptions("127.0.0.1", self.port), Identity("default", name, "s", "0"), inbox)
        made.start()
        end = time.monotonic() + WAIT_S
        while not isinstance(inbox.get(timeout=max(0.0, end - time.monotonic())), Online):
            pass
        return made

    def pull(self, devices: list[MqttTransport]) -> list[bool]:
        """Pull on all at once; whether each has the whole package."""
        stores = [Store(self.folder / str(number)).incoming(self.index) for number in range(len(devices))]

        def one(number: int) -> None:
            stores[number].reserve()
            fill(stores[number], devices[number].pull, lambda: None)

        workers = [threading.Thread(target=one, args=(number,)) for number in range(len(devices))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        return [not store.missing() for store in stores]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    publisher = Publisher(tmp_path / "publisher")
    work = tmp_path / "package"
    weights = work / "variants" / "weights.bin"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(np.random.default_rng(5).bytes(24 * 64 * 1024))
    write_package(work, {"a": {}})
    path = tmp_path / "tiny.edgeopt"
    with path.open("w+b") as file:
        write_archive(file, {p.relative_to(work).as_posix(): p for p in work.rglob("*") if p.is_file()})
    index = publish(path, publisher.repository, publisher.keys, now=publisher.now).index
    broker = EmbeddedBroker(tmp_path, free_port())
    broker.start()
    sessions = open_database(sqlite_url(tmp_path))
    control = Control(
        sessions, Catalog(publisher.repository), load_signer(publisher.keys, "director"), utc_now
    )
    worker = Worker(control, BrokerAddress("127.0.0.1", broker.port))
    worker.start()
    made = Site(broker.port, control, index, tmp_path)
    ear = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)

    def hear(_client: Any, _user: Any, message: Any) -> None:
        parts = message.topic.split("/")
        if parts[4] == "blob":
            made.lanes[int(parts[-1])] += 1
        elif parts[-1].isdigit():
            made.own[parts[3]] += 1

    ear.on_message = hear
    ready = threading.Event()
    ear.on_subscribe = lambda *_: ready.set()
    ear.connect("127.0.0.1", broker.port)
    ear.loop_start()
    ear.subscribe([("eo/1/default/-/blob/#", 0), ("eo/1/default/+/chunk/#", 0)])
    assert ready.wait(WAIT_S)
    yield made
    ear.disconnect()
    ear.loop_stop()
    worker.stop()
    broker.stop()
    engine_of(sessions).dispose()


def test_five_devices_cost_the_publisher_less_than_two_packages(site: Site) -> None:
    devices = site.roll_out(*(f"d{number}" for number in range(5)))
    assert site.pull(devices) == [True] * 5
    chunks = len(site.index.chunks)
    assert set(site.lanes) >= set(range(1, chunks)), "everything but the first chunk went over a lane"
    assert site.lanes.total() + site.own.total() <= 2 * chunks
    for device in devices:
        device.close()


def test_two_devices_pull_on_streams_of_their_own(site: Site) -> None:
    devices = site.roll_out("d0", "d1")
    assert site.pull(devices) == [True] * 2
    assert site.lanes.total() == 0
    assert site.own["d0"] == site.own["d1"] == len(site.index.chunks)
    for device in devices:
        device.close()
