# SPDX-License-Identifier: Apache-2.0
"""The whole way with nothing replaced: real build, keys, repository, broker, control plane and agent process."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt.keys import create_keys
from edgeopt.package import file_entries, write_package
from edgeopt.publish import publish
from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.manifest import Compatible, Manifest, Provenance, Variant
from edgeopt_wire.tensor import TensorSpec

pytestmark = pytest.mark.flow

BIN = Path(sys.executable).parent
MODELS = Path(__file__).with_name("small_models.py")
MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
WAIT_S = 90.0
EDGE = TensorSpec("x", (1, 4), "float32")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(claim: Callable[[], Any], what: str, wait_s: float = WAIT_S, every_s: float = 0.1) -> Any:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.CalledProcessError, json.JSONDecodeError):
            if found := claim():
                return found
        time.sleep(every_s)
    raise AssertionError(f"not within {wait_s:.0f} s: {what}")


def null_package(folder: Path, version: str, *, gain: float, padding_bytes: int = 1000) -> Path:
    """A package of the null runtime: y = gain * x, with as many bytes beside it as a download needs."""
    stage = folder / f"stage-{version}"
    for name in ("variants", "golden/inputs", "golden/outputs/null"):
        (stage / name).mkdir(parents=True)
    (stage / "variants/a.json").write_bytes(canonical_bytes({"schema": "edgeopt.null-model/1", "gain": gain}))
    block = np.random.default_rng(int(version)).bytes(1_000_000)
    with (stage / "variants/padding.bin").open("wb") as file:
        for start in range(0, padding_bytes, len(block)):
            file.write(block[: min(len(block), padding_bytes - start)])
    ones = np.ones((2, 1, 4), np.float32)
    np.save(stage / "golden/inputs/0.npy", ones.astype(np.float16))
    np.save(stage / "golden/outputs/null/0.npy", gain * ones)
    files = [path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()]
    manifest = Manifest(
        name="tiny", version=version, device="host", compatible=Compatible(("host",)), signature_inputs=(EDGE,),
        signature_outputs=(TensorSpec("y", (1, 4), "float32"),),
        variants=(
            Variant("null-1t", "null", "fp32", "variants/a.json", (EDGE,), (TensorSpec("y", (1, 4), "float32"),),
                    "golden/outputs/null", 30.0),
        ),
        files=file_entries(stage, files), golden_inputs="golden/inputs", baseline={}, provenance=Provenance("0" * 64, "1" * 64),
    )  # fmt: skip
    target = folder / f"tiny-{version}-host.edgeopt"
    write_package(stage, manifest, target)
    return target


@dataclass
class Site:
    """A fleet and one device on this machine, in real processes."""

    folder: Path
    kind: str
    http: int = field(default_factory=free_port)
    mqtt: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    @property
    def config(self) -> Path:
        return self.folder / "device" / "agent.json"

    def run(self, program: str, *args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / program, *map(str, args)], capture_output=True, text=True, check=check, timeout=200
        )

    def ask(self, program: str, *args: str | Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(program, *args, "--json").stdout)
        return found

    def spawn(self, name: str, *command: str | Path) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(30)

    def publish(self, package: Path) -> None:
        keys = self.folder / "keys"
        if not keys.exists():
            create_keys(keys)
        publish(package, self.folder / "repository", keys, now=datetime.now(UTC).replace(microsecond=0))

    def start_broker(self) -> None:
        assert MOSQUITTO is not None
        config = self.folder / "mosquitto.conf"
        config.write_text(
            f"listener {self.mqtt} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nuser root\n"
        )
        self.spawn("broker", MOSQUITTO, "-c", config)

    def start_fleet(self) -> None:
        where = ["--mqtt-port", str(self.mqtt)]
        if self.kind == "mosquitto":
            self.start_broker()
            time.sleep(0.3)
            where = ["--broker", f"mqtt://127.0.0.1:{self.mqtt}"]
        self.spawn(
            "fleet", BIN / "edgeopt", "fleet", "up", "--dir", self.folder / "fleet", "--repository",
            self.folder / "repository", "--keys", self.folder / "keys", "--http-port", str(self.http), *where,
        )  # fmt: skip
        until(lambda: self.ask("edgeopt", "fleet", "devices", "--fleet", self.url), "the fleet answers")

    def start_agent(self) -> None:
        if not self.config.exists():
            self.run(
                "edgeopt",
                "fleet",
                "add-device",
                "dev",
                "--class",
                "host",
                "-o",
                self.config,
                "--fleet",
                self.url,
            )
        self.spawn("agent", BIN / "edgeopt-agent", "run", "--config", self.config)

    def roll_out(self, model: str, version: str, deadline: str = "120s") -> int:
        made = self.ask(
            "edgeopt", "rollout", "create", "--model", model, "--version", version, "--deadline", deadline,
            "--fleet", self.url,
        )  # fmt: skip
        return int(made["id"])

    def rollout(self, number: int) -> dict[str, Any]:
        return self.ask("edgeopt", "rollout", "show", str(number), "--fleet", self.url)

    def ended(self, number: int) -> dict[str, Any]:
        def claim() -> dict[str, Any] | None:
            shown = self.rollout(number)
            return shown if shown["status"] != "running" else None

        found: dict[str, Any] = until(claim, f"rollout {number} ends\n{self.log()}")
        return found

    def infer(self, value: float = 1.0) -> dict[str, Any]:
        np.save(self.folder / "one.npy", np.full((1, 4), value, np.float32))
        return self.ask("edgeopt-agent", "infer", "--config", self.config, self.folder / "one.npy")

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.log"))


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    kind = getattr(request, "param", "iotcore")
    if kind == "mosquitto" and MOSQUITTO is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    found = Site(tmp_path, kind)
    yield found
    for name in list(found.processes):
        found.processes[name].kill()
        found.processes[name].wait()


@pytest.mark.parametrize("site", ["iotcore", "mosquitto"], indirect=True)
def test_build_publish_pull_measure_ledger_and_offline(site: Site) -> None:
    rng = np.random.default_rng(0)
    np.savez(site.folder / "data.npz", x=rng.normal(size=(8, 3, 32, 32)).astype(np.float32))
    report = site.ask(
        "edgeopt", "build", f"{MODELS}:net", "--device", "host", "--calibration", site.folder / "data.npz", "--quick",
        "-o", site.folder, "--no-cache",
    )  # fmt: skip
    site.publish(Path(report["files"]["package"]))
    site.start_fleet()
    site.start_agent()
    done = site.ended(site.roll_out("net", report["version"]))
    assert done["status"] == "succeeded", site.log()
    shipped = {candidate["id"] for candidate in report["candidates"] if candidate["shipped"]}

    def ledger() -> list[dict[str, Any]] | None:
        rows = site.ask("edgeopt", "fleet", "measurements", "--fleet", site.url)["measurements"]
        found = [row["measurement"] for row in rows]
        return found if {row["variant"] for row in found} == shipped else None

    rows = until(ledger, "every shipped variant has a row in the ledger")
    for row in rows:
        assert row["golden_ok"]
        assert row["package_sha256"] == report["package_sha256"]
        assert row["timing"]["n"] >= 100
        assert row["conditions"]["runtime_version"]
        assert row["conditions"]["cpu"]
    status = site.ask("edgeopt-agent", "status", "--config", site.config)
    fastest = min(rows, key=lambda row: row["timing"]["p50_ns"])
    assert (status["models"][0]["phase"], status["models"][0]["variant"]) == ("committed", fastest["variant"])
    for name in ("agent", "fleet", *(["broker"] if site.kind == "mosquitto" else [])):
        assert site.stop(name) == 0, site.log()
    site.start_agent()
    np.save(site.folder / "photo.npy", rng.normal(size=(1, 3, 32, 32)).astype(np.float32))
    answer = until(
        lambda: (
            found
            if (
                found := site.ask(
                    "edgeopt-agent", "infer", "--config", site.config, site.folder / "photo.npy"
                )
            )["via"]
            == "agent"
            else None
        ),
        "the restarted agent serves with no broker",
    )
    assert len(answer["top"]) == 5


@pytest.mark.parametrize("site", ["mosquitto"], indirect=True)
def test_a_broker_killed_in_the_middle_of_a_download_ends_in_an_installed_model(site: Site) -> None:
    size = 120_000_000
    site.publish(null_package(site.folder, "1", gain=3.0, padding_bytes=size))
    site.start_fleet()
    site.start_agent()
    number = site.roll_out("tiny", "1", deadline="300s")
    incoming = site.config.parent / "state" / "incoming"
    until(lambda: list(incoming.glob("*.map")), "the first chunks are on the disk", every_s=0.002)
    site.stop("broker", signal.SIGKILL)
    there = json.loads(next(incoming.glob("*.map")).read_text())
    assert 0 < len(there) < size / 65536, "the download was cut in the middle"
    time.sleep(2)
    site.start_broker()
    assert site.ended(number)["status"] == "succeeded", site.log()
    assert site.infer()["outputs"]["y"]["first"] == [3.0] * 4


def _flip(path: Path, start: int) -> None:
    """Flip the lowest bit of the first digit from `start` on: JSON stays JSON, so that trust refuses, not a parser."""
    raw = bytearray(path.read_bytes())
    at = next(i for i in range(start, len(raw)) if raw[i] in b"0123456789")
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("where", ["blob", "index", "targets", "snapshot", "timestamp"])
def test_a_flipped_byte_is_refused_and_the_old_model_serves(site: Site, where: str) -> None:
    site.publish(null_package(site.folder, "1", gain=2.0))
    site.start_fleet()
    site.start_agent()
    assert site.ended(site.roll_out("tiny", "1"))["status"] == "succeeded"
    package = null_package(site.folder, "2", gain=5.0, padding_bytes=300_000)
    site.publish(package)
    repository = site.folder / "repository"
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    files = {
        "blob": repository / "blobs" / digest,
        "index": next((repository / "targets/models/tiny/2").glob("*.host.json")),
        "targets": max((repository / "metadata").glob("*.targets.json")),
        "snapshot": max((repository / "metadata").glob("*.snapshot.json")),
        "timestamp": repository / "metadata/timestamp.json",
    }
    raw = files[where].read_bytes()
    mark = {"blob": raw[1000:1010], "index": b'"chunks":["'}.get(where, b'"sig"')
    _flip(files[where], raw.find(mark) + len(mark))
    done = site.ended(site.roll_out("tiny", "2", deadline="10s"))
    status = site.ask("edgeopt-agent", "status", "--config", site.config)["models"][0]
    assert done["status"] == "halted", site.log()
    assert status["version"] == "1"
    assert status["error"] or done["devices"][0]["error"]
    assert site.infer()["outputs"]["y"]["first"] == [2.0] * 4
