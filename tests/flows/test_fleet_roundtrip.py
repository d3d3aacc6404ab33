# SPDX-License-Identifier: Apache-2.0
"""`edgeopt fleet up` as users run it, with each real broker, and a device that speaks the protocol of the wire."""

import base64
import hashlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.subscribeoptions import SubscribeOptions
from securesystemslib.dsse import Envelope
from securesystemslib.signer import Key

from edgeopt.keys import create_keys
from edgeopt.publish import publish
from edgeopt_wire import topics
from edgeopt_wire.archive import write_archive
from edgeopt_wire.document import canonical_bytes, from_bytes, to_bytes, to_json
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.manifest import Compatible, FileEntry, Manifest, Provenance, Variant
from edgeopt_wire.measurement import Conditions, Measurement, Timing
from edgeopt_wire.messages import (
    Ack,
    Desired,
    Event,
    EventBatch,
    MetaReply,
    MetaRequest,
    Phase,
    Presence,
    Pull,
    PullRefused,
    Reported,
    ReportedModel,
)
from edgeopt_wire.tensor import TensorSpec

pytestmark = pytest.mark.flow

MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
WAIT_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_package(path: Path, version: str) -> Path:
    weights = bytes((number * 7 + int(version)) % 256 for number in range(300_000))
    files = {
        "variants/a.json": canonical_bytes({"schema": "edgeopt.null-model/1"}),
        "variants/weights.bin": weights,
    }
    edge = TensorSpec("x", (1, 4), "float32")
    manifest = Manifest(
        name="tiny",
        version=version,
        device="host",
        compatible=Compatible(("host",)),
        signature_inputs=(edge,),
        signature_outputs=(edge,),
        variants=(
            Variant("a", "null", "fp32", "variants/a.json", (edge,), (edge,), "golden/outputs/a", 30.0),
        ),
        files=tuple(FileEntry(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in sorted(files.items())),
        golden_inputs="golden/inputs",
        baseline={},
        provenance=Provenance("0" * 64, "0" * 64),
    )
    with path.open("w+b") as file:
        write_archive(file, {"manifest.json": to_bytes(manifest), **files})
    return path


@dataclass
class RunningFleet:
    """A fleet process, its addresses and what was published into its repository."""

    process: subprocess.Popen[str]
    http: str
    mqtt: str
    folder: Path
    packages: dict[str, PackageIndex] = field(default_factory=dict)

    @property
    def mqtt_port(self) -> int:
        return int(self.mqtt.rpartition(":")[2])

    def get(self, path: str) -> dict[str, Any]:
        answer = httpx.get(f"{self.http}/api/v1/{path}")
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def edgeopt(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from edgeopt.cli import main; main()", *words, "--fleet", self.http],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def start_fleet(folder: Path, *more: str) -> RunningFleet:
    keys, repository = folder / "keys", folder / "repo"
    indexes = {}
    if not keys.exists():
        create_keys(keys)
    for version in ("1", "2"):
        package = write_package(folder / f"{version}.edgeopt", version)
        indexes[version] = publish(
            package, repository, keys, now=datetime.now(UTC).replace(microsecond=0)
        ).index
    command = [
        "fleet",
        "up",
        "--dir",
        folder / "fleet",
        "--repository",
        repository,
        "--keys",
        keys,
        "--json",
        *more,
    ]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from edgeopt.cli import main; main()",
            *map(str, command),
            "--http-port",
            str(free_port()),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"fleet up ended with {process.wait(10)}"
    found = json.loads(line)
    assert found["schema"] == "edgeopt.fleet/1"
    fleet = RunningFleet(process, found["http"], found["mqtt"], folder, indexes)
    until(lambda: answers(fleet.http), "the API answers")
    return fleet


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/api/v1/health").is_success
    except httpx.HTTPError:
        return False


def until(claim: Any, what: str) -> None:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if claim():
            return
        time.sleep(0.05)
    pytest.fail(f"waited {WAIT_S} s for: {what}")


def stop(fleet: RunningFleet) -> int:
    fleet.process.send_signal(signal.SIGTERM)
    return fleet.process.wait(20)


@pytest.fixture(params=["iotcore", "mosquitto"])
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningFleet]:
    broker, more = None, []
    if request.param == "mosquitto":
        if MOSQUITTO is None:
            pytest.skip("mosquitto is not installed")
        port = free_port()
        config = tmp_path / "mosquitto.conf"
        config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
        broker = subprocess.Popen([MOSQUITTO, "-c", str(config)], stderr=subprocess.DEVNULL)
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "mosquitto listens")
        more = ["--broker", f"mqtt://127.0.0.1:{port}"]
    made = start_fleet(tmp_path, *more)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            stop(made)
        if broker is not None:
            broker.terminate()
            broker.wait(10)


class WireDevice:
    """A device that knows its id, the broker and the wire documents, and nothing of the control plane's code."""

    def __init__(self, name: str, port: int) -> None:
        self.name, self.session, self.revision = name, f"s-{time.monotonic_ns()}", 0
        self.inbox: dict[str, queue.Queue[tuple[str, bytes]]] = {what: queue.Queue() for what in topics.DOWN}
        self.client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=f"default.{name}", protocol=mqtt.MQTTv5
        )
        self.client.will_set(self._topic("presence"), to_bytes(Presence(name, False, self.session)), 1, True)
        self.client.on_message = lambda _c, _u, message: self.inbox[topics.parse(message.topic)[2]].put(
            (message.topic, bytes(message.payload))
        )
        ready = threading.Event()
        self.client.on_subscribe = lambda *_: ready.set()
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        wanted = [self._topic(what) for what in ("desired", "ack", "refused", "meta-reply")]
        wanted.append(self._topic("chunk") + "/#")
        self.client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in wanted])
        assert ready.wait(WAIT_S)
        self.send("presence", Presence(name, True, self.session), retain=True)

    def _topic(self, what: str) -> str:
        return topics.topic("default", self.name, what)

    def send(self, what: str, document: Any, *, retain: bool = False) -> None:
        self.client.publish(self._topic(what), to_bytes(document), qos=1, retain=retain)

    def take(self, what: str) -> tuple[str, bytes]:
        return self.inbox[what].get(timeout=WAIT_S)

    def fetch(self, name: str) -> bytes | None:
        found = b""
        while True:
            self.send("meta", MetaRequestOf(self.name, name, len(found)))
            reply = from_bytes(MetaReply, self.take("meta-reply")[1])
            if not reply.found:
                return None
            found += base64.b64decode(reply.data)
            if len(found) >= reply.total_bytes:
                return found

    def target(self, path: str) -> bytes:
        """A target by its signed path; python-tuf's checks are the agent's and the publisher's tests."""
        timestamp = json.loads(self.fetch("metadata/timestamp.json") or b"")
        snapshot = timestamp["signed"]["meta"]["snapshot.json"]["version"]
        meta = json.loads(self.fetch(f"metadata/{snapshot}.snapshot.json") or b"")["signed"]["meta"]
        listed = json.loads(self.fetch(f"metadata/{meta['targets.json']['version']}.targets.json") or b"")
        digest = listed["signed"]["targets"][path]["hashes"]["sha256"]
        folder, _, name = path.rpartition("/")
        raw = self.fetch(f"targets/{folder}/{digest}.{name}")
        assert raw is not None
        assert hashlib.sha256(raw).hexdigest() == digest
        return raw

    def desired(self) -> Desired:
        """The next signed desired document, checked with the keys of the director target."""
        envelope = Envelope.from_dict(json.loads(self.take("desired")[1]))
        keys = json.loads(self.target("fleet/director.json"))["keys"]
        envelope.verify([Key.from_dict(keyid, key) for keyid, key in keys.items()], threshold=1)
        found = from_bytes(Desired, envelope.payload)
        self.revision = found.revision
        return found

    def pull(self, index: PackageIndex) -> bytes:
        """Pull a package in windows of two chunks, asking again for what did not come."""
        found: dict[int, bytes] = {}
        while len(found) < len(index.chunks):
            missing = [number for number in range(len(index.chunks)) if number not in found][:2]
            self.send("pull", Pull(index.sha256, tuple((number, 1) for number in missing)))
            for _ in missing:
                topic, raw = self.take("chunk")
                number = int(topic.rpartition("/")[2])
                assert hashlib.sha256(raw).hexdigest() == index.chunks[number]
                found[number] = raw
        return b"".join(found[number] for number in sorted(found))

    def report(
        self, phase: Phase, rollout: str, version: str = "", candidate: str = "", error: str = ""
    ) -> None:
        model = ReportedModel(
            "tiny", phase, version, variant="a", candidate_version=candidate, rollout=rollout, error=error
        )
        self.send(
            "reported", Reported(self.name, "host", self.session, self.revision, "0", (model,)), retain=True
        )

    def measured(self, sha256: str, sequence: int) -> Ack:
        conditions = Conditions("null", "1", 1, 1, "cpu", "x86_64", "a test's CPU", "linux")
        timing = Timing.of([2_000_000] * 150, warmup=3, load_ns=1, first_inference_ns=1)
        now = datetime.now(UTC).replace(microsecond=0)
        found = Measurement(
            sha256,
            "tiny",
            "1",
            "a",
            "fp32",
            self.name,
            "host",
            "0",
            now,
            conditions,
            timing,
            golden_ok=True,
            stable=True,
        )
        self.send(
            "event", EventBatch(self.name, (Event(sequence, "measurement", now, to_json(found)),), "outbox")
        )
        return from_bytes(Ack, self.take("ack")[1])

    def install(self, index: PackageIndex) -> None:
        """Do what an agent does for one offer that goes well."""
        desired = self.desired()
        (model,) = desired.models
        assert from_bytes(PackageIndex, self.target(model.target)) == index
        self.report(Phase.DOWNLOADING, model.rollout, candidate=model.version)
        assert hashlib.sha256(self.pull(index)).hexdigest() == index.sha256
        assert self.measured(index.sha256, 1) == Ack("outbox", 1)
        self.report(Phase.COMMITTED, model.rollout, version=model.version)

    def drop(self) -> None:
        """Vanish as on a power cut: the broker sends the will."""
        sock = self.client.socket()
        self.client.loop_stop()
        if isinstance(sock, socket.socket):
            sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def MetaRequestOf(device: str, name: str, offset: int) -> MetaRequest:
    return MetaRequest(f"{device}-{time.monotonic_ns()}", name, offset)


def enrol(fleet: RunningFleet, name: str) -> WireDevice:
    done = fleet.edgeopt(
        "fleet", "add-device", name, "--class", "host", "-o", str(fleet.folder / name / "agent.json")
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((fleet.folder / name / "agent.json").read_text())
    assert config["transport"] == {"kind": "mqtt", "host": "127.0.0.1", "port": fleet.mqtt_port}
    assert Path(config["root"]).read_bytes() == (fleet.folder / "repo/metadata/1.root.json").read_bytes()
    return WireDevice(name, fleet.mqtt_port)


def test_package_reaches_a_device_and_its_latency_reaches_the_ledger(fleet: RunningFleet) -> None:
    device = enrol(fleet, "d1")
    assert device.fetch("metadata/2.root.json") is None
    made = fleet.edgeopt("rollout", "create", "--model", "tiny", "--version", "1", "--json")
    assert made.returncode == 0, made.stderr
    device.install(fleet.packages["1"])
    watched = fleet.edgeopt("rollout", "watch", str(json.loads(made.stdout)["id"]), "--json")
    assert watched.returncode == 0, watched.stderr
    assert json.loads(watched.stdout)["devices"][0]["status"] == "succeeded"
    (row,) = fleet.get("measurements?device=d1")["measurements"]
    assert row["measurement"]["timing"]["p50_ns"] == 2_000_000
    device.measured(fleet.packages["1"].sha256, 1)
    assert len(fleet.get("measurements")["measurements"]) == 1
    assert fleet.get("devices")["devices"][0]["online"]
    device.drop()
    until(lambda: not fleet.get("devices")["devices"][0]["online"], "the will says that the device is gone")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_fleet_its_broker_and_its_database_with_0(tmp_path: Path, number: int) -> None:
    fleet = start_fleet(tmp_path)
    assert (tmp_path / "fleet" / "fleet.sqlite-wal").exists()
    fleet.process.send_signal(number)
    assert fleet.process.wait(20) == 0
    assert socket.socket().connect_ex(("127.0.0.1", fleet.mqtt_port)) != 0
    assert not (tmp_path / "fleet" / "fleet.sqlite-wal").exists()


def test_failure_on_the_first_device_halts_and_watch_exits_with_1(fleet: RunningFleet) -> None:
    first, second = enrol(fleet, "a"), enrol(fleet, "b")
    made = fleet.edgeopt(
        "rollout", "create", "--model", "tiny", "--version", "1", "--waves", "50,100", "--json"
    )
    assert made.returncode == 0, made.stderr
    (model,) = first.desired().models
    first.report(Phase.FAILED, model.rollout, candidate="1", error="golden outputs differ: 3 dB")
    watched = fleet.edgeopt("rollout", "watch", "1")
    assert watched.returncode == 1
    assert "halted" in watched.stderr
    assert [d["status"] for d in fleet.get("rollouts/1")["devices"]] == ["failed", "removed"]
    assert second.inbox["desired"].empty()
    first.close()
    second.close()


def test_bytes_that_a_device_is_not_told_to_run_are_refused(fleet: RunningFleet) -> None:
    device = enrol(fleet, "d1")
    device.send("pull", Pull(fleet.packages["2"].sha256, ((0, 1),)))
    refused = from_bytes(PullRefused, device.take("refused")[1])
    assert refused.sha256 == fleet.packages["2"].sha256
    device.close()


def test_garbage_on_every_topic_does_not_end_the_fleet(fleet: RunningFleet) -> None:
    device = enrol(fleet, "d1")
    for what in topics.UP:
        for raw in (b"", b"\xff\x00", b"{}", b"[" * 5000, json.dumps({"schema": "edgeopt.pull/1"}).encode()):
            device.client.publish(topics.topic("default", "d1", what), raw, qos=1)
    assert device.fetch("metadata/timestamp.json") is not None
    fleet.edgeopt("rollout", "create", "--model", "tiny", "--version", "1")
    device.install(fleet.packages["1"])
    until(lambda: fleet.get("rollouts/1")["status"] == "succeeded", "the rollout ends")
    device.close()


def test_fleet_that_restarts_goes_on_with_its_rollout(tmp_path: Path) -> None:
    port = str(free_port())
    fleet = start_fleet(tmp_path, "--mqtt-port", port)
    enrol(fleet, "d1").close()
    assert fleet.edgeopt("rollout", "create", "--model", "tiny", "--version", "1").returncode == 0
    until(lambda: fleet.get("rollouts/1")["devices"][0]["status"] == "offered", "the offer")
    stop(fleet)
    until(
        lambda: socket.socket().connect_ex(("127.0.0.1", int(port))) != 0, "the broker ended with its fleet"
    )
    fleet = start_fleet(tmp_path, "--mqtt-port", port)
    try:
        device = WireDevice("d1", fleet.mqtt_port)
        device.install(fleet.packages["1"])
        until(lambda: fleet.get("rollouts/1")["status"] == "succeeded", "the rollout ends after the restart")
        device.close()
    finally:
        stop(fleet)


def test_page_shows_the_device_and_its_latency_in_a_real_browser(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    fleet = start_fleet(tmp_path)
    try:
        device = enrol(fleet, "kitchen")
        fleet.edgeopt("rollout", "create", "--model", "tiny", "--version", "1")
        device.install(fleet.packages["1"])
        until(lambda: fleet.get("rollouts/1")["status"] == "succeeded", "the rollout ends")
        with playwright.sync_playwright() as run:
            browser = run.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page()
            problems: list[str] = []
            elsewhere: list[str] = []
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on(
                "request",
                lambda request: elsewhere.append(request.url) if fleet.http not in request.url else None,
            )
            page.goto(fleet.http)
            page.get_by_text("2.00 / 2.00 ms").wait_for(timeout=WAIT_S * 1000)
            assert "kitchen" in page.locator("#devices").inner_text()
            assert "online" in page.locator("#devices").inner_text()
            assert "succeeded" in page.locator("#rollouts").inner_text()
            assert "1 of 1" in page.locator("#rollouts").inner_text()
            if "EDGEOPT_SCREENSHOTS" in os.environ:
                page.screenshot(path=os.environ["EDGEOPT_SCREENSHOTS"] + "/fleet.png", full_page=True)
            browser.close()
        assert problems == []
        assert elsewhere == []
        device.close()
    finally:
        stop(fleet)


@pytest.mark.parametrize(
    "words",
    [
        ("fleet", "devices"),
        ("rollout", "create", "--model", "tiny", "--version", "1"),
        ("rollout", "watch", "1"),
    ],
)
def test_no_fleet_is_said_with_what_to_do(words: tuple[str, ...], tmp_path: Path) -> None:
    nobody = RunningFleet(None, f"http://127.0.0.1:{free_port()}", "", tmp_path)  # type: ignore[arg-type]
    done = nobody.edgeopt(*words)
    assert done.returncode == 1
    assert "start one with `edgeopt fleet up`" in done.stderr
    assert "Traceback" not in done.stderr


def test_broker_that_is_not_there_is_said_with_its_address(tmp_path: Path) -> None:
    create_keys(tmp_path / "keys")
    port = free_port()
    words = ["--dir", tmp_path / "fleet", "--repository", tmp_path / "repo", "--keys", tmp_path / "keys"]
    options = [*map(str, words), "--broker", f"mqtt://127.0.0.1:{port}", "--http-port", str(free_port())]
    main = "from edgeopt.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", main, "fleet", "up", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert f"no MQTT broker at 127.0.0.1:{port}" in done.stderr
