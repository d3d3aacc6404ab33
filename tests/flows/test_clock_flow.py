# SPDX-License-Identifier: Apache-2.0
"""A real agent process whose clock stands at 1970 or 2100, with a real fleet: it asks the director what time it is."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from publishing import write_package

from edgeopt.fleet.broker import free_port
from edgeopt.keys import create_keys
from edgeopt.package import write_package as pack
from edgeopt.publish import publish
from edgeopt_wire.document import from_bytes
from edgeopt_wire.manifest import Manifest

pytestmark = pytest.mark.flow
BIN = Path(sys.executable).parent
CONVERGES_S = 60.0

AGENT = """
import sys, time
from datetime import datetime, timedelta
import edgeopt_agent.main
from edgeopt_agent.cli import main
began, wall = time.monotonic(), datetime.fromisoformat(sys.argv[1])
edgeopt_agent.main.utc_now = lambda: wall + timedelta(seconds=int(time.monotonic() - began))
main(["run", "--config", sys.argv[2]])
"""
"""`edgeopt-agent run` with another wall clock. Why not faketime? It breaks Python's sleeps and timed waits."""


class Fleet:
    """A published model, a control plane and one enrolled device, in real processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        stage = folder / "stage"
        write_package(stage, {"a": {}}, name="model")
        package = folder / "model-1-host.edgeopt"
        pack(stage, from_bytes(Manifest, (stage / "manifest.json").read_bytes()), package)
        create_keys(folder / "keys")
        publish(package, folder / "repository", folder / "keys", now=datetime.now(UTC).replace(microsecond=0))
        http = free_port()
        self.url = f"http://127.0.0.1:{http}"
        self.spawn(
            [BIN / "edgeopt", "fleet", "up", "--dir", folder / "fleet", "--repository", folder / "repository",
             "--keys", folder / "keys", "--http-port", http]
        )  # fmt: skip
        self.until(lambda: self.ask("fleet", "devices"), 60)
        self.ask("fleet", "add-device", "d1", "--class", "host", "-o", folder / "device/agent.json")

    def spawn(self, command: list[Any]) -> None:
        with (self.folder / "log").open("ab") as log:
            self.processes.append(subprocess.Popen(list(map(str, command)), stdout=log, stderr=log))

    def ask(self, *arguments: Any) -> dict[str, Any]:
        done = subprocess.run(
            [BIN / "edgeopt", *map(str, arguments), "--fleet", self.url, "--json"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    def until(self, claim: Callable[[], Any], wait_s: float) -> float:
        started = time.monotonic()
        while not claim():
            assert time.monotonic() - started < wait_s, (self.folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        return time.monotonic() - started


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    yield made
    for process in made.processes:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize(
    "wall", ["1970-01-02T00:00:00+00:00", "2100-01-01T00:00:00+00:00"], ids=["1970", "2100"]
)
def test_agent_at_a_wrong_clock_installs_within_a_minute(fleet: Fleet, wall: str) -> None:
    number = fleet.ask("rollout", "create", "--model", "model", "--version", "1")["id"]
    config = fleet.folder / "device/agent.json"
    fleet.spawn([sys.executable, "-c", AGENT, wall, config])
    fleet.until(lambda: fleet.ask("rollout", "show", number).get("status") == "succeeded", CONVERGES_S)
    record = json.loads((config.parent / "state/device.json").read_text())
    assert record["newest_moment"][:4] == str(datetime.now(UTC).year)
