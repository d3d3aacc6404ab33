# SPDX-License-Identifier: Apache-2.0
"""`edgeopt-agent` as an operator runs it: install from a stick, look, infer with and without the agent, stop."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt_agent.serve.http import ask
from edgeopt_wire.errors import EdgeoptError, RecipeError

pytestmark = pytest.mark.flow
Publisher = Any
COMMAND = [sys.executable, "-c", "from edgeopt_agent.cli import main; main()"]


class Board:
    """One device's configuration, and its command line."""

    def __init__(self, folder: Path, publisher: Publisher) -> None:
        self.folder = folder
        self.publisher = publisher
        self.state = folder / "state"
        self.config = folder / "agent.json"
        document = {
            "schema": "edgeopt.agent/1",
            "device": "d1",
            "device_class": "host",
            "state_dir": str(self.state),
            "root": str(publisher.root),
            "transport": {"kind": "folder", "path": str(publisher.repository)},
        }
        self.config.write_text(json.dumps(document))
        self.input = folder / "x.npy"
        np.save(self.input, np.ones((1, 2, 4, 4), np.float32))

    def run(self, command: str, *words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, command, "--config", str(self.config), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def json(self, command: str, *words: object) -> dict[str, Any]:
        done = self.run(command, *words, "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def board(tmp_path: Path, publisher: Publisher) -> Board:
    publisher.add("1")
    return Board(tmp_path, publisher)


@pytest.fixture
def running(board: Board) -> Iterator[subprocess.Popen[bytes]]:
    assert board.run("install", board.publisher.repository).returncode == 0
    process = subprocess.Popen([*COMMAND, "run", "--config", str(board.config)], stderr=subprocess.PIPE)
    end = time.monotonic() + 20
    while True:
        try:
            ask(board.state / "agent.sock", "GET", "/v2/health/ready")
            break
        except EdgeoptError:
            assert time.monotonic() < end, "the agent does not answer"
            time.sleep(0.05)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate(timeout=10)


def test_stick_is_installed_shown_and_run(board: Board) -> None:
    done = board.run("install", board.publisher.repository)
    assert (done.returncode, done.stdout) == (0, "tiny 1: committed\n"), done.stderr
    status = board.json("status")
    assert (status["schema"], status["running"]) == ("edgeopt.status/1", False)
    assert [(m["name"], m["version"], m["variant"]) for m in status["models"]] == [("tiny", "1", "a")]
    assert status["events_waiting"] >= 1, "the probe's measurement waits for a fleet"
    answer = board.json("infer", board.input)
    assert (answer["model"], answer["variant"], answer["via"]) == ("tiny", "a", "slot")
    assert answer["outputs"]["scores"]["first"] == [1.0, 1.0, 1.0, 1.0]


def test_several_versions_ask_which_and_the_old_one_stays_beside_the_new(board: Board) -> None:
    board.publisher.add("2", gain=1.0)
    which = board.run("install", board.publisher.repository)
    assert which.returncode == 2
    assert "say which with --model and --model-version" in which.stderr
    for version in ("1", "2"):
        assert board.run("install", board.publisher.repository, "--model-version", version).returncode == 0
    found = board.json("status")["models"][0]
    assert (found["version"], found["previous"]) == ("2", "1")


def test_stick_of_somebody_else_is_refused_and_nothing_is_installed(
    board: Board, tmp_path: Path, make_publisher: type[Publisher]
) -> None:
    thief = make_publisher(tmp_path / "thief")
    thief.add("1")
    done = board.run("install", thief.repository)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert board.json("status")["models"] == []


def test_bare_file_needs_a_word_of_the_operator(board: Board) -> None:
    package = board.publisher.folder / "tiny-1-host.edgeopt"
    refused = board.run("install", package)
    assert refused.returncode == 1
    assert "--unsigned" in refused.stderr
    assert board.run("install", package, "--unsigned").returncode == 0
    assert board.json("infer", board.input)["version"] == "1"


def test_flipped_byte_in_a_bare_file_is_found(board: Board) -> None:
    package = board.publisher.folder / "tiny-1-host.edgeopt"
    content = bytearray(package.read_bytes())
    content[len(content) // 2] ^= 1
    package.write_bytes(bytes(content))
    done = board.run("install", package, "--unsigned")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_model_that_lies_is_not_installed(board: Board) -> None:
    board.publisher.add("3", failure="wrong")
    done = board.run("install", board.publisher.repository, "--model-version", "3")
    assert done.returncode == 1
    assert "no variant runs right" in done.stderr


def test_running_agent_answers_infer_metadata_and_errors(
    board: Board, running: subprocess.Popen[bytes]
) -> None:
    assert running.poll() is None
    assert board.json("infer", board.input)["via"] == "agent"
    assert board.json("status")["running"]
    socket = board.state / "agent.sock"
    assert ask(socket, "GET", "/v2/models/tiny")["inputs"][0]["shape"] == [1, 2, 4, 4]
    for target, body in (
        ("/v2/models/none/infer", {"inputs": []}),
        ("/v2/models/tiny/infer", {}),
        ("/v2/models/tiny/infer", {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1]}]}),
        ("/v3", {}),
    ):
        with pytest.raises(RecipeError):
            ask(socket, "POST", target, body)
    assert oct((board.state / "agent.sock").stat().st_mode)[-3:] == "600"


def test_second_agent_on_the_same_state_is_refused(board: Board, running: subprocess.Popen[bytes]) -> None:
    second = board.run("run")
    assert second.returncode == 1
    assert "another agent uses" in second.stderr
    assert running.poll() is None


def test_sigterm_ends_the_agent_with_0_and_takes_its_socket_along(
    board: Board, running: subprocess.Popen[bytes]
) -> None:
    running.send_signal(signal.SIGTERM)
    assert running.wait(20) == 0
    assert not (board.state / "agent.sock").exists()


def test_kill_leaves_nothing_that_hinders_the_next_start(
    board: Board, running: subprocess.Popen[bytes]
) -> None:
    running.kill()
    running.wait(10)
    assert board.json("infer", board.input)["via"] == "slot"
    assert board.run("run", "--once").returncode == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.npy", b"garbage"),
        ("x.json", b"{"),
        ("x.json", b"[]"),
        ("x.npz", b""),
        ("x.jpg", b"no photo"),
        ("none.npy", None),
    ],
)
def test_bad_input_is_said_in_one_line(board: Board, name: str, content: bytes | None) -> None:
    board.run("install", board.publisher.repository)
    path = board.folder / f"bad-{name}"
    if content is not None:
        path.write_bytes(content)
    done = board.run("infer", path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_shape_says_what_was_expected(board: Board) -> None:
    board.run("install", board.publisher.repository)
    np.save(board.folder / "small.npy", np.ones((1, 2), np.float32))
    done = board.run("infer", board.folder / "small.npy")
    assert done.returncode == 2
    assert "(1, 2, 4, 4)" in done.stderr


def test_unknown_command_and_missing_configuration_exit_with_2(tmp_path: Path) -> None:
    for words in (["fly"], ["run"], ["status", "--config", str(tmp_path / "none.json")]):
        assert subprocess.run([*COMMAND, *words], capture_output=True, check=False).returncode == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_state_directory_without_permission_is_said(board: Board) -> None:
    board.folder.chmod(0o500)
    assert "cannot use the state directory" in board.run("status").stderr
    board.folder.chmod(0o700)


def test_doctor_tells_people_and_programs_the_same(board: Board) -> None:
    board.run("install", board.publisher.repository)
    found = board.json("doctor")
    assert (found["schema"], found["ok"]) == ("edgeopt.doctor/1", True)
    text = board.run("doctor").stdout
    for row in found["findings"]:
        assert row["check"] in text
    document = json.loads(board.config.read_text())
    board.config.write_text(json.dumps({**document, "root": str(board.folder / "none")}))
    done = board.run("doctor")
    assert done.returncode == 1
    assert "-> copy the fleet's root.json" in done.stdout


def test_systemd_hears_ready_alive_reloading_and_stopping(board: Board) -> None:
    assert board.run("install", board.publisher.repository).returncode == 0
    said: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(board.folder / "notify"))
        receiver.settimeout(30)

        def heard(word: str) -> None:
            while word not in said:
                said.extend(receiver.recv(200).decode().splitlines())

        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(board.folder / "notify"),
            "WATCHDOG_USEC": "200000",
        }
        process = subprocess.Popen(
            [*COMMAND, "run", "--config", str(board.config), "--log-format", "json"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            heard("READY=1")
            heard("WATCHDOG=1")
            good = board.config.read_text()
            board.config.write_text("{")
            process.send_signal(signal.SIGHUP)
            heard("RELOADING=1")
            said.clear()
            heard("READY=1")
            board.config.write_text(good)
            process.send_signal(signal.SIGHUP)
            said.clear()
            heard("READY=1")
            process.send_signal(signal.SIGTERM)
            heard("STOPPING=1")
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    messages = [json.loads(line)["message"] for line in errors.splitlines()]
    assert any("the configuration is not used" in message for message in messages)
    assert "the configuration was read again" in messages
