# SPDX-License-Identifier: Apache-2.0
"""A device on a real broker whose other side can be told to lie: the agent's own code from the socket up."""

import base64
import json
import queue
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from securesystemslib.dsse import Envelope

from edgeopt.keys import load_signer
from edgeopt_agent import golden
from edgeopt_agent.config import AgentConfig
from edgeopt_agent.loop import Agent
from edgeopt_agent.model import open_model
from edgeopt_agent.outbox import Outbox
from edgeopt_agent.probe import ProbeRequest
from edgeopt_agent.serve.models import Models
from edgeopt_agent.store import Store
from edgeopt_agent.transports import Identity, Inbox
from edgeopt_agent.transports.mqtt import MqttOptions, MqttTransport
from edgeopt_agent.trust import Trust
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire import topics
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import EdgeoptError
from edgeopt_wire.measurement import Conditions, Measurement, Timing
from edgeopt_wire.messages import (
    TIME_TYPE,
    Ack,
    EventBatch,
    MetaReply,
    MetaRequest,
    Pull,
    Reported,
    SignedTime,
)

PAGE = 64 * 1024
WAIT_S = 20.0
FASTER = 60.0
"""The agent's pauses pass that much faster; the network's time-outs are set by the tests."""

Files = dict[str, bytes]


class Source:
    """What answers the device: the honest repository, or whatever an attack puts in its place."""

    def __init__(self, port: int, publisher: Any) -> None:
        self.publisher = publisher
        self.events: list[Any] = []
        self.reports: list[Reported] = []
        self.asked: list[str] = []
        self._jobs: queue.Queue[Any] = queue.Queue()
        self.be_honest()
        self.client = mqtt.Client(
            CallbackAPIVersion.VERSION2, f"source-{time.monotonic_ns()}", protocol=mqtt.MQTTv5
        )
        self.client.on_message = lambda _c, _u, message: self._jobs.put(message)
        self.wish = b""
        """The retained document; a broker that forgot it gets it again, as from the fleet."""
        self._ready = threading.Event()
        self.client.on_connect = self._on_connect
        self.client.on_disconnect = lambda *_: self._ready.clear()
        self.client.on_subscribe = self._on_subscribe
        self.client.reconnect_delay_set(1, 1)
        self.client.connect("127.0.0.1", port, clean_start=True)
        self.client.loop_start()
        self.wait()
        threading.Thread(target=self._work, daemon=True).start()

    def wait(self) -> None:
        """Wait until the broker hears what this side sends."""
        assert self._ready.wait(WAIT_S)

    def _on_connect(self, client: mqtt.Client, *_: Any) -> None:
        client.subscribe([(topics.every_device("default", what), 1) for what in topics.UP])

    def _on_subscribe(self, *_: Any) -> None:
        if self.wish:
            self._send("desired", self.wish, retain=True)
        self._ready.set()

    def be_honest(self) -> None:
        """Answer from the newest publication."""
        self.files: Files = self.publisher.files()
        self.blobs: Files = self.publisher.blobs()
        self.tell_time: Callable[[str], bytes | None] = self.signed_time
        self.page: Callable[[MetaRequest], MetaReply] = self.honest_page
        self.chunk: Callable[[int, bytes], list[tuple[int, bytes]]] = lambda number, chunk: [(number, chunk)]

    def honest_page(self, request: MetaRequest) -> MetaReply:
        content = (
            self.tell_time(request.name.removeprefix("time/"))
            if request.name.startswith("time/")
            else self.files.get(request.name)
        )
        if content is None:
            return MetaReply(request.id, found=False)
        page = base64.b64encode(content[request.offset :][:PAGE]).decode()
        return MetaReply(request.id, True, request.offset, len(content), page)

    def signed_time(self, nonce: str) -> bytes:
        return self.sign_time(nonce, self.publisher.now)

    def sign_time(self, nonce: str, moment: datetime, role: str = "director") -> bytes:
        envelope = Envelope(to_bytes(SignedTime(nonce, moment)), TIME_TYPE, {})
        envelope.sign(load_signer(self.publisher.keys, role))
        return json.dumps(envelope.to_dict()).encode()

    def want(self, envelope: bytes) -> None:
        self.wish = envelope
        self._send("desired", envelope, retain=True)

    def _work(self) -> None:
        while (message := self._jobs.get()) is not None:
            what = topics.parse(message.topic)[2]
            if what == "meta":
                request = from_bytes(MetaRequest, message.payload)
                self.asked.append(request.name)
                self._send("meta-reply", to_bytes(self.page(request)))
            elif what == "pull":
                self._give(from_bytes(Pull, message.payload))
            elif what == "reported":
                self.reports.append(from_bytes(Reported, message.payload))
            elif what == "event":
                batch = from_bytes(EventBatch, message.payload)
                self.events += batch.events
                self._send("ack", to_bytes(Ack(batch.outbox, batch.events[-1].sequence)))

    def _give(self, pull: Pull) -> None:
        blob = self.blobs.get(pull.sha256, b"")
        for first, count in pull.runs:
            for number in range(first, first + count):
                for sent, content in self.chunk(number, blob[number * PAGE :][:PAGE]):
                    topic = topics.chunk("default", "d1", pull.sha256, sent)
                    self.client.publish(topic, content, qos=0)

    def _send(self, what: str, payload: bytes, *, retain: bool = False) -> None:
        self.client.publish(topics.topic("default", "d1", what), payload, qos=1, retain=retain)

    def close(self) -> None:
        self._jobs.put(None)
        self.client.disconnect()
        self.client.loop_stop()


class Device:
    """A real agent, store and MQTT transport; only the probe's timing is given."""

    def __init__(self, folder: Path, port: int, publisher: Any, wall: Callable[[], datetime]) -> None:
        self.config = AgentConfig("d1", "host", str(folder), str(publisher.root), {"kind": "mqtt"})
        self.port, self.publisher, self.wall = port, publisher, wall
        self.root = publisher.root.read_bytes()
        self.passed = timedelta()
        self.boot()

    def boot(self) -> None:
        """A fresh process on the same disk."""
        inbox: Inbox = queue.Queue(100)
        self.store = Store(self.config.folder)
        identity = Identity("default", "d1", f"s{time.monotonic_ns()}", "0")
        self.transport = MqttTransport(MqttOptions("127.0.0.1", self.port), identity, inbox)
        self.clock = TrustedClock(
            self.wall,
            lambda: self.store.load_device().newest_moment,
            lambda: time.monotonic() + self.passed.total_seconds(),
        )
        self.transport.use_clock(self.clock)
        folder = self.config.folder
        self.agent = Agent(
            self.config,
            self.store,
            self.transport,
            inbox,
            trust=Trust(folder / "metadata", self.root, self.transport.fetch, self.clock, needs_time=True),
            outbox=Outbox(folder / "outbox", "d1"),
            models=Models(self.store),
            probe=self._probe,
            now=self.clock.now,
            session="s",
            monotonic=self.seconds,
        )
        self.agent.start()

    def stop(self) -> None:
        self.transport.close()

    def seconds(self) -> float:
        """The agent's own seconds."""
        return FASTER * time.monotonic()

    def run_until(self, claim: Callable[[], Any], what: str, wait_s: float = WAIT_S) -> None:
        end = time.monotonic() + wait_s
        while not claim():
            assert time.monotonic() < end, f"waited {wait_s} s for: {what}; {self.error}"
            self.agent.tick(0.02)

    def run_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.agent.tick(0.02)

    @property
    def error(self) -> str:
        state = self.agent.states.get("tiny")
        return state.error if state else ""

    def serves(self) -> str:
        """The version that answers a real inference now; empty if none."""
        try:
            loaded, outputs = self.agent.models.infer("tiny", {"image": np.ones((1, 2, 4, 4), np.float32)})
        except EdgeoptError:
            return ""
        assert outputs["scores"].shape == (1, 4)
        return loaded.manifest.version

    def _probe(self, request: ProbeRequest) -> Measurement:
        folder = Path(request.folder)
        manifest = self.store.manifest("tiny", folder.name)
        with open_model(folder, manifest, request.variant) as loaded:
            wanted = golden.load_outputs(folder, manifest, loaded.variant)
            found = [loaded.infer(sample) for sample in golden.load_inputs(folder, manifest)]
        right = all(
            np.allclose(f["scores"], w["scores"], atol=1e-3) for f, w in zip(found, wanted, strict=True)
        )
        return Measurement(
            package_sha256=request.package_sha256, model="tiny", version=manifest.version, variant=request.variant,
            precision="fp32", device_id="d1", device_class="host", agent_version="0", measured_at=self.publisher.now,
            conditions=Conditions("null", "1.0", 1, 1, "cpu", "x", "x", "x"),
            timing=Timing.of([1000] * 10, warmup=1, load_ns=1, first_inference_ns=1), golden_ok=right,
        )  # fmt: skip


class Site:
    """Publisher, source and device; version 1 runs, version 2 is published, and `before` is the world before it."""

    def __init__(self, folder: Path, port: int, publisher: Any) -> None:
        self.publisher = publisher
        self.now: datetime = publisher.now
        publisher.add("1")
        self.before: Files = publisher.files()
        self.source = Source(port, publisher)
        self.device = Device(folder / "device", port, publisher, lambda: self.now)
        self.revision = 0
        self.want("1")
        self.device.run_until(lambda: self.device.serves() == "1", "version 1 serves")
        publisher.add("2")
        self.source.be_honest()

    def want(self, version: str, **options: Any) -> None:
        self.revision += 1
        self.source.want(self.publisher.desire(self.revision, version, **options))

    def alarms(self) -> list[str]:
        return [event.body["error"] for event in self.source.events if event.kind == "trust"]

    def pass_time(self, span: timedelta) -> None:
        """Let days go by on the wall and since boot."""
        self.now += span
        self.device.passed += span

    def close(self) -> None:
        self.device.stop()
        self.source.close()
