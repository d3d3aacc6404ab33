# SPDX-License-Identifier: Apache-2.0
"""What was served reaches the fleet as windows: soon while somebody listens, hourly while nobody does, none twice."""

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt_agent.serve.http import ask
from edgeopt_agent.serve.metrics import exposition
from edgeopt_agent.service import CONDITION_S, LONGEST_S, LOOK_EVERY, REPORT_S, Service
from edgeopt_agent.surroundings import POWER_MODE_S, Condition, Surroundings
from edgeopt_wire.sketch import Sketch

KEY = ("tiny", "1", "a")
BEGIN = datetime(2026, 11, 25, tzinfo=UTC)
IMAGE = {"image": np.arange(32, dtype=np.float32)}


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> datetime:
        return BEGIN + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def start(clock: Clock, tmp_path: Path) -> Callable[[], Service]:
    return lambda: Service(clock.now, tmp_path / "service.json", monotonic=clock.monotonic)


def test_a_window_holds_latencies_rows_failures_and_what_inputs_looked_like(
    start: Callable[[], Service], clock: Clock
) -> None:
    service = start()
    for number in range(100):
        service.ran(KEY, 1_000_000 + 10_000 * number, 2, IMAGE)
    service.failed(KEY)
    assert service.flush(lambda: True) == []
    clock.seconds = REPORT_S
    (body,) = service.flush(lambda: True)
    assert (body["model"], body["calls"], body["rows"], body["failed"]) == ("tiny", 100, 200, 1)
    assert (body["from"], body["to"]) == ("2026-11-25T00:00:00Z", "2026-11-25T00:05:00Z")
    p50 = Sketch.from_json(body["run_ns"]).quantile(0.5)
    assert p50 == pytest.approx(1_495_000, rel=0.011)
    looked = body["inputs"]["image"]
    assert looked["values"] == 32 * (1 + 100 // LOOK_EVERY)
    assert (looked["mean"], looked["std"]) == pytest.approx((15.5, np.arange(32).std()))
    clock.seconds *= 2
    assert service.flush(lambda: True) == [], "nothing was served since"
    json.dumps(body)


def test_without_a_listener_windows_are_hours(start: Callable[[], Service], clock: Clock) -> None:
    service, bodies = start(), []
    while clock.seconds < 24 * 3600:
        service.ran(KEY, 10**6, 1, IMAGE)
        clock.seconds += 60
        bodies += service.flush(lambda: False)
    assert len(bodies) == 24 * 3600 / LONGEST_S
    assert sum(body["calls"] for body in bodies) == 24 * 60


def test_a_start_takes_up_what_was_saved_and_sends_it_once(
    start: Callable[[], Service], clock: Clock, tmp_path: Path
) -> None:
    service = start()
    service.ran(KEY, 10**6, 1, IMAGE)
    clock.seconds = REPORT_S + 1
    assert service.flush(lambda: False) == []
    again = start()
    again.ran(KEY, 10**6, 1, IMAGE)
    clock.seconds *= 2
    assert [body["calls"] for body in again.flush(lambda: True)] == [1, 1]
    clock.seconds *= 2
    assert start().flush(lambda: True) == []
    (tmp_path / "service.json").write_bytes(b"[{]")
    assert start().flush(lambda: True) == []


def test_threads_count_everything(start: Callable[[], Service]) -> None:
    service = start()

    def work() -> None:
        for _ in range(500):
            service.ran(KEY, 10**6, 1, IMAGE)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert service.totals()[KEY].run.count == 4000


def test_values_that_are_no_numbers_spoil_no_statistics(start: Callable[[], Service], clock: Clock) -> None:
    service = start()
    service.ran(KEY, 10**6, 1, {"image": np.array([np.nan, 1.0], np.float32)})
    clock.seconds = REPORT_S
    (body,) = service.flush(lambda: True)
    assert body["inputs"]["image"]["values"] == 0


def test_prometheus_reads_quantiles_counters_and_odd_names(start: Callable[[], Service]) -> None:
    service = start()
    for _ in range(10):
        service.ran(KEY, 2_000_000, 4, IMAGE)
    service.failed(('o"dd\\', "1", "a"))
    page = exposition(service.totals(), {"tiny": "1"})
    assert 'edgeopt_run_seconds{model="tiny",version="1",variant="a",quantile="0.5"} 0.002' in page
    assert 'edgeopt_run_seconds_count{model="tiny",version="1",variant="a"} 10' in page
    assert 'edgeopt_rows_total{model="tiny",version="1",variant="a"} 40' in page
    assert 'edgeopt_failed_total{model="o\\"dd\\\\",version="1",variant="a"} 1' in page
    assert page.endswith("\n")


def test_each_condition_has_a_sketch_of_its_own_and_they_add_up(clock: Clock) -> None:
    now = [Condition("30W", "cool", "idle")]
    service = Service(clock.now, monotonic=clock.monotonic, surroundings=lambda: now[0])
    service.look_around()
    for nanoseconds in (1_000_000, 1_100_000):
        service.ran(KEY, nanoseconds, 1, IMAGE)
    now[0] = Condition("7W", "hot", "busy")
    service.ran(KEY, 1_200_000, 1, IMAGE)  # within CONDITION_S of the last look: still the old condition
    clock.seconds += CONDITION_S
    service.look_around()
    service.ran(KEY, 9_000_000, 1, IMAGE)
    assert service.totals()[KEY].run.count == 4
    page = exposition(service.totals(), {}, service.by_condition())
    labels = 'model="tiny",version="1",variant="a",power_mode="7W",temperature="hot",load="busy"'
    assert f"edgeopt_condition_run_seconds_count{{{labels}}} 1" in page
    clock.seconds = REPORT_S
    bodies = service.flush(lambda: True)
    assert {body["condition"]["power_mode"]: body["calls"] for body in bodies} == {"30W": 3, "7W": 1}
    merged = Sketch()
    for body in bodies:
        merged.merge(Sketch.from_json(body["run_ns"]))
    whole = Sketch()
    for nanoseconds in (1_000_000, 1_100_000, 1_200_000, 9_000_000):
        whole.add(nanoseconds)
    assert merged.bins == whole.bins


def test_a_board_says_its_condition_in_few_words(tmp_path: Path) -> None:
    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    seconds, asked = [0.0], []

    def ask_vendor(command: Any) -> str:
        asked.append(command)
        return "NV Power Mode: MAXN\n0\n"

    board = Surroundings(tmp_path, ask_vendor, lambda: seconds[0])
    assert board.look() == Condition("", "", "")
    put("etc/nvpmodel.conf", "")
    put("sys/class/thermal/thermal_zone0/temp", "65000")
    put("proc/stat", "cpu  0 0 0 0 0 0 0 0 0 0\n")
    seconds[0] += POWER_MODE_S
    assert board.look() == Condition("MAXN (nvpmodel 0)", "warm", "")
    put("proc/stat", "cpu  1000000 0 0 0 0 0 0 0 0 0\n")
    put("sys/class/thermal/thermal_zone0/temp", "85000")
    seconds[0] += 10
    assert board.look() == Condition("MAXN (nvpmodel 0)", "hot", "busy")
    seconds[0] += 10
    assert board.look().load == "idle"
    assert len(asked) == 1, "the vendor's program is asked once a minute"


def test_the_agents_page_counts_what_was_served(tmp_path: Path, publisher: Any) -> None:
    from edgeopt_agent.config import AgentConfig
    from edgeopt_agent.install import install
    from edgeopt_agent.serve.standalone import serve

    publisher.add("1")
    config = AgentConfig("d1", "host", str(tmp_path / "state"), str(publisher.root), {"kind": "folder"})
    install(config, publisher.repository, model="", version="", unsigned=False)
    stop = threading.Event()
    thread = threading.Thread(target=serve, args=(config, stop))
    thread.start()
    try:
        socket = config.socket_path
        for _ in range(200):
            if socket.exists():
                break
            threading.Event().wait(0.05)
        entry = {"name": "image", "datatype": "FP32", "shape": [1, 2, 4, 4], "data": [1.0] * 32}
        for _ in range(3):
            ask(socket, "POST", "/v2/models/tiny/infer", {"inputs": [entry]})
        page = _page(socket)
        assert 'edgeopt_run_seconds_count{model="tiny",version="1",variant="a"} 3' in page
        assert 'edgeopt_model_info{model="tiny",version="1"} 1' in page
    finally:
        stop.set()
        thread.join(20)


def _page(path: Path) -> str:
    import socket

    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        found = b""
        while piece := sock.recv(65536):
            found += piece
    head, _, body = found.partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0]
    assert b"text/plain; version=0.0.4" in head
    return body.decode()
