# SPDX-License-Identifier: Apache-2.0
"""systemd hears that the agent is ready and alive, and stops hearing it when the loop hangs."""

import json
import logging
import os
import socket
import sys
import time
from pathlib import Path

import pytest

from edgeopt_agent.logs import JsonFormatter
from edgeopt_agent.systemd import Pulse, notify, watchdog_interval


def test_a_message_reaches_the_socket_that_systemd_named(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        assert notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert receiver.recv(100) == b"READY=1"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0edgeopt-{os.getpid()}")
        assert notify("STOPPING=1", {"NOTIFY_SOCKET": f"@edgeopt-{os.getpid()}"})
        assert receiver.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("where", [{}, {"NOTIFY_SOCKET": "/no/such/socket"}, {"NOTIFY_SOCKET": "odd"}])
def test_without_systemd_nothing_is_sent_and_nothing_fails(where: dict[str, str]) -> None:
    assert not notify("READY=1", where)


def test_the_watchdog_is_for_the_process_that_systemd_means() -> None:
    assert watchdog_interval({"WATCHDOG_USEC": "30000000"}) == 15.0
    assert watchdog_interval({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}) == 15.0
    assert watchdog_interval({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}) is None
    assert watchdog_interval({}) is None
    assert watchdog_interval({"WATCHDOG_USEC": "0"}) is None


def test_a_loop_that_hangs_is_not_called_alive() -> None:
    said: list[str] = []
    seconds = [0.0]
    pulse = Pulse(interval_s=0.01, stuck_s=10.0, send=said.append, monotonic=lambda: seconds[0])
    pulse.start()
    _until(lambda: len(said) >= 2)
    seconds[0] = 11.0
    time.sleep(0.05)  # a beat that was under way
    count = len(said)
    time.sleep(0.1)
    assert len(said) == count
    pulse.mark()
    _until(lambda: len(said) > count)
    pulse.stop()


def _until(is_so: object) -> None:
    end = time.monotonic() + 10
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_log_line_as_json_holds_the_error_on_one_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.LogRecord("agent", logging.ERROR, "f", 1, "it %s", ("is",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["message"], found["logger"]) == ("error", "it is", "agent")
    assert "ValueError: broken" in found["error"]
