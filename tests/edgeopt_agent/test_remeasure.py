# SPDX-License-Identifier: Apache-2.0
"""A device whose power mode or runtime changed measures again, and another variant serves where that is faster now."""

import queue
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_lives import HOUR_S, quick_probe, wish
from publishing import write_package

from edgeopt_agent import installer as installer_module
from edgeopt_agent.config import AgentConfig
from edgeopt_agent.loop import Agent
from edgeopt_agent.machine import Event, Installed, Kind, State
from edgeopt_agent.main import make_agent
from edgeopt_agent.remeasure import changes, conditions
from edgeopt_agent.store import Store
from edgeopt_agent.transitions import step
from edgeopt_agent.transports import Inbox
from edgeopt_agent.transports.memory import MemoryTransport
from edgeopt_wire.messages import Phase

Publisher = Any
Start = Callable[[], Agent]


class Board:
    """What a real probe says, with the times of another board: a variant's own under each power mode."""

    def __init__(self) -> None:
        self.mode = "30W"
        self.times = {"30W": {"fast": 1e6, "frugal": 3e6}, "7W": {"fast": 9e6, "frugal": 4e6}}
        self.broken: set[str] = set()
        self.probed: list[str] = []

    def probe(self, request: Any) -> Any:
        self.probed.append(request.variant)
        found = quick_probe(request)
        if request.variant in self.broken:
            return replace(found, golden_ok=False)
        time = round(self.times[self.mode][request.variant])
        return replace(
            found, timing=type(found.timing).of([time] * 10, warmup=1, load_ns=1, first_inference_ns=1)
        )

    def conditions(self, runtimes: Any) -> str:
        return conditions(runtimes) + f"; power mode {self.mode}"


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    made = Board()
    monkeypatch.setattr(installer_module, "conditions", made.conditions)
    return made


@pytest.fixture
def start(tmp_path: Path, publisher: Publisher, board: Board) -> Start:
    from edgeopt.publish import publish
    from edgeopt_wire.archive import write_archive

    work = tmp_path / "package"
    work.mkdir()
    write_package(work, {"fast": {}, "frugal": {}})
    path = tmp_path / "tiny-1-host.edgeopt"
    with path.open("w+b") as file:
        write_archive(file, {p.relative_to(work).as_posix(): p for p in work.rglob("*") if p.is_file()})
    publish(path, publisher.repository, publisher.keys, now=publisher.now)

    def make() -> Agent:
        inbox: Inbox = queue.Queue()
        config = AgentConfig("d1", "host", str(tmp_path / "state"), str(publisher.root), {"kind": "folder"})
        transport = MemoryTransport(inbox, publisher.files(), publisher.blobs())
        agent = make_agent(config, Store(config.folder), transport, inbox)
        agent.installer.probe = board.probe
        seconds = [0.0]
        agent._monotonic = lambda: seconds[0]
        agent.start()
        wish(agent, publisher.desire(1, "1"), seconds)
        for _ in range(3):
            seconds[0] += HOUR_S
            agent.tick()
        return agent

    return make


def _variant(agent: Agent) -> str:
    active = agent.states["tiny"].active
    assert active is not None
    loaded, _ = agent.models.infer("tiny", {"image": np.ones((1, 2, 4, 4), np.float32)})
    assert loaded.variant.id == active.variant, "what serves is what is reported"
    return active.variant


def test_another_power_mode_brings_the_variant_that_is_faster_there(start: Start, board: Board) -> None:
    assert _variant(start()) == "fast"
    assert board.probed == ["fast", "frugal"]
    assert _variant(start()) == "fast"
    assert board.probed == ["fast", "frugal"], "nothing changed, nothing is measured"
    board.mode = "7W"
    agent = start()
    assert _variant(agent) == "frugal"
    assert agent.states["tiny"].phase in (Phase.COMMITTED, Phase.IDLE)
    assert _variant(start()) == "frugal"
    assert len(board.probed) == 4


def test_what_no_longer_runs_right_serves_on_and_is_told_once(start: Start, board: Board) -> None:
    start()
    board.mode, board.broken = "7W", {"fast", "frugal"}
    agent = start()
    assert _variant(agent) == "fast"
    assert "no variant runs right" in agent.states["tiny"].error
    count = len(board.probed)
    start()
    assert len(board.probed) == count


def test_a_state_of_an_older_agent_learns_its_conditions_without_measuring(
    start: Start, board: Board
) -> None:
    agent = start()
    state = agent.states["tiny"]
    assert state.active is not None
    agent.store.save_state(replace(state, active=replace(state.active, measured_under="")))
    count = len(board.probed)
    active = start().states["tiny"].active
    assert active is not None
    assert "power mode 30W" in active.measured_under
    assert len(board.probed) == count


def test_a_measurement_of_another_package_changes_nothing() -> None:
    active = Installed("A", "1", "a" * 64, "x", "then")
    state = State("tiny", Phase.COMMITTED, active=active)
    other = replace(active, package_sha256="b" * 64, variant="y")
    assert step(state, Event(Kind.MEASURED, installed=other)) == (state, ())
    working = replace(state, phase=Phase.PROBING)
    assert step(working, Event(Kind.MEASURED, installed=replace(active, variant="y"))) == (working, ())


def test_conditions_name_the_runtime_libraries_and_what_changed() -> None:
    found = conditions(["onnxruntime", "null"])
    assert "onnxruntime 1." in found
    assert changes("a 1; b 2", "a 2; b 2") == "a 2 instead of a 1"
