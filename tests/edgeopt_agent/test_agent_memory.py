# SPDX-License-Identifier: Apache-2.0
"""What the agent costs a board before it has a model: the real process, against a real broker and a real repository."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgeopt.fleet.broker import EmbeddedBroker
from edgeopt_wire.document import from_bytes
from edgeopt_wire.messages import Reported

pytestmark = pytest.mark.flow
MAX_RSS_MB = 45.0
"""Of a board with 512 MB that also runs the customer's program."""

NEVER_BEFORE_A_MODEL = ("numpy", "PIL", "onnxruntime", "ai_edge_litert", "torch")
WAIT_S = 20.0


def test_agent_without_a_model_stays_small_and_reports(tmp_path: Path, publisher: Any) -> None:
    publisher.add("1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    broker = EmbeddedBroker(tmp_path, port)
    broker.start()
    reports: list[bytes] = []
    listener = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    listener.on_message = lambda _c, _u, message: reports.append(message.payload)
    listener.connect("127.0.0.1", port)
    listener.subscribe("eo/1/default/d1/reported", 1)
    listener.loop_start()
    config = tmp_path / "agent.json"
    document = {
        "schema": "edgeopt.agent/1",
        "device": "d1",
        "device_class": "host",
        "state_dir": str(tmp_path / "state"),
        "root": str(publisher.root),
        "transport": {"kind": "mqtt", "host": "127.0.0.1", "port": port},
    }
    config.write_text(json.dumps(document))
    command = [
        sys.executable,
        "-c",
        "from edgeopt_agent.cli import main; main()",
        "run",
        "--config",
        str(config),
    ]
    process = subprocess.Popen(command)
    try:
        end = time.monotonic() + WAIT_S
        while not reports and time.monotonic() < end:
            time.sleep(0.05)
        assert reports, "the agent never reported"
        assert from_bytes(Reported, reports[-1]).models == ()
        status = Path(f"/proc/{process.pid}/status").read_text()
        maps = Path(f"/proc/{process.pid}/maps").read_text()
    finally:
        process.terminate()
        code = process.wait(20)
        listener.disconnect()
        listener.loop_stop()
        broker.stop()
    peak_mb = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    assert peak_mb < MAX_RSS_MB, f"peak resident memory {peak_mb:.1f} MB, the promise is {MAX_RSS_MB} MB"
    assert [name for name in NEVER_BEFORE_A_MODEL if f"/{name}/" in maps] == []
    assert code == 0
