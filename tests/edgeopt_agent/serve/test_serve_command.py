# SPDX-License-Identifier: Apache-2.0
"""`edgeopt-agent serve` as an operator runs it: a socket, a port, the device's own keys, SIGTERM in the middle."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt_agent.client import Client
from edgeopt_wire.errors import RecipeError

pytestmark = pytest.mark.flow
COMMAND = [sys.executable, "-c", "from edgeopt_agent.cli import main; main()"]
ONES = np.ones((1, 2, 4, 4), np.float32)


def write_config(folder: Path, publisher: Any, **more: Any) -> Path:
    document = {
        "schema": "edgeopt.agent/1", "device": "d1", "device_class": "host", "state_dir": str(folder / "state"),
        "root": str(publisher.root), "transport": {"kind": "folder", "path": str(publisher.repository)}, **more,
    }  # fmt: skip
    (folder / "agent.json").write_text(json.dumps(document))
    return folder / "agent.json"


def call(command: str, config: Path, *words: object) -> subprocess.CompletedProcess[str]:
    line = [*COMMAND, command, "--config", str(config), *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_serve_answers_on_both_and_sigterm_finishes_what_is_in_hand(tmp_path: Path, publisher: Any) -> None:
    publisher.add("1", latency_ns=700_000_000)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    more = {"http": {"port": port}, "serving": {"tiny": {"response_cache": {}, "queue": 2}}}
    config = write_config(tmp_path, publisher, **more)
    assert call("install", config, publisher.repository).returncode == 0
    process = subprocess.Popen([*COMMAND, "serve", "--config", str(config)], stderr=subprocess.PIPE)
    try:
        path, end = tmp_path / "state/agent.sock", time.monotonic() + 30
        while not Client(path).is_ready("tiny"):
            assert time.monotonic() < end, "it does not serve"
            time.sleep(0.05)
        by_port = Client(f"http://127.0.0.1:{port}")
        assert by_port.infer("tiny", {"image": ONES}).outputs["scores"].tolist() == [[1.0] * 4]
        assert by_port.infer("tiny", {"image": ONES}).parameters["cache"] == "response"
        with pytest.raises(RecipeError, match="shared memory"):
            by_port.share("tiny")
        second = call("serve", config)
        assert second.returncode == 1
        assert "another agent uses" in second.stderr
        answers: list[Any] = []

        def ask(value: float) -> None:
            answers.append(Client(path).infer("tiny", {"image": value * ONES}).outputs["scores"][0, 0])

        asking = [threading.Thread(target=ask, args=(value,)) for value in (2.0, 3.0)]
        for thread in asking:
            thread.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        for thread in asking:
            thread.join(30)
        assert sorted(answers) == [2.0, 3.0]
        assert process.wait(30) == 0
        assert not path.exists()
    finally:
        process.kill()
        process.communicate()


def test_serve_with_nothing_installed_says_what_to_do(tmp_path: Path, publisher: Any) -> None:
    publisher.add("1")
    found = call("serve", write_config(tmp_path, publisher))
    assert found.returncode == 2
    assert "install one first" in found.stderr


@pytest.mark.parametrize(
    ("more", "says"), [({"http": {"prot": 1}}, "shared_memory"), ({"http": {"port": 70000}}, "65535")]
)
def test_a_wrong_http_key_is_refused(tmp_path: Path, publisher: Any, more: Any, says: str) -> None:
    publisher.add("1")
    found = call("serve", write_config(tmp_path, publisher, **more))
    assert found.returncode == 2
    assert says in found.stderr
