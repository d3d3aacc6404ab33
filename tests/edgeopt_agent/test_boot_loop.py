# SPDX-License-Identifier: Apache-2.0
"""An active model that takes the agent along while it is loaded, at every start: three times, and then never again."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from device_lives import live, make, serves

from edgeopt_agent.config import load_config
from edgeopt_agent.loads import MAX_DEATHS, Loads
from edgeopt_agent.loop import Agent
from edgeopt_agent.machine import Installed, State
from edgeopt_agent.serve.models import Models
from edgeopt_agent.serve.standalone import load_models
from edgeopt_agent.status import describe
from edgeopt_agent.store import Store
from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.messages import DesiredModel, Phase

Publisher = Any
DIED = 7
"""The status that the null runtime ends the process with."""


class Board:
    """A device on which version 1, then version 2 was installed; each start is a process of its own."""

    def __init__(self, folder: Path, publisher: Publisher) -> None:
        self.publisher = publisher
        self.state = folder / "state"
        self.revision = 0
        for version in ("1", "2"):
            publisher.add(version)

    def agent(self) -> Agent:
        return make(self.state, self.publisher.root, self.publisher.repository)

    def wish(self, version: str, rollout: str = "", *, again: bool = False) -> Agent:
        """A life that hears a wish; `again`: the one that the broker retained."""
        self.revision += not again
        agent = self.agent()
        live(agent, self.publisher.desire(self.revision, version, rollout=rollout))
        return agent

    def start(self) -> int:
        """A start and nothing more; its exit status."""
        child = os.fork()
        if not child:
            try:
                self.agent().start()
                os._exit(0)
            finally:
                os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def known(self) -> State:
        return Store(self.state).load_state("tiny")

    def spoil(self, installed: Installed | None, failure: str = "exit") -> None:
        """From now on the runtime does not survive this package, as after an update of the library."""
        assert installed is not None
        file = Store(self.state).slot("tiny", installed.slot) / "variants/a.json"
        file.unlink()  # its other names keep what they have
        file.write_bytes(
            canonical_bytes({"schema": "edgeopt.null-model/1", "failure": failure, "fail_after": -1})
        )

    def die(self) -> None:
        """As many starts as it takes."""
        assert [self.start() for _ in range(MAX_DEATHS)] == [DIED] * MAX_DEATHS


@pytest.fixture
def board(tmp_path: Path, publisher: Publisher) -> Board:
    return Board(tmp_path, publisher)


def test_previous_package_serves_after_three_starts_that_died_and_no_start_is_lost_again(
    board: Board,
) -> None:
    board.wish("1", "first")
    assert serves(board.wish("2", "second")) == "2"
    deadly = board.known().active
    assert deadly is not None
    board.spoil(deadly)
    board.die()
    assert [board.start() for _ in range(3)] == [0, 0, 0]
    state = board.known()
    assert (state.phase, state.active and state.active.version) == (Phase.ROLLED_BACK, "1")
    assert (
        "3 starts of the agent died while they loaded version 2 (a)" in state.refused[deadly.package_sha256]
    )
    assert serves(board.wish("2", "second", again=True)) == "1", "the same wish does not bring it back"
    assert serves(board.wish("2", "third")) == "2", "another rollout does, from what is on the disk"


def test_without_a_previous_package_the_others_serve_and_it_is_reported_degraded(
    board: Board, make_package: Callable[..., Any], tmp_path: Path
) -> None:
    board.wish("1", "first")
    store = Store(board.state)
    make_package(store.slot("other", "A"), {"a": {}}, name="other")
    (store.slot("other", "A") / ".whole").write_text("1" * 64)
    store.save_state(State("other", Phase.COMMITTED, active=Installed("A", "1", "1" * 64, "a")))
    board.spoil(board.known().active)
    board.die()
    assert [board.start() for _ in range(MAX_DEATHS + 1)] == [0] * (MAX_DEATHS + 1)
    agent = board.agent()
    live(agent, board.publisher.desire(board.revision, "1", rollout="first"))
    assert agent.models.names() == ["other"]
    assert not agent.models.is_ready
    told = agent.reported()
    assert "3 starts of the agent died" in told.facts["degraded"]["tiny"]
    assert "3 starts of the agent died" in {model.name: model for model in told.models}["tiny"].error
    document = {
        "schema": "edgeopt.agent/1",
        "device": "d1",
        "device_class": "host",
        "state_dir": str(board.state),
        "root": str(board.publisher.root),
        "transport": {"kind": "folder", "path": str(board.publisher.repository)},
    }
    (tmp_path / "agent.json").write_text(json.dumps(document))
    assert "not loaded any more" in describe(load_config(tmp_path / "agent.json"))["degraded"]["tiny"]
    alone = Models(store)
    assert load_models(store, alone) == ["other"]
    assert "died" in alone.absent()["tiny"][1]


def test_model_that_was_mended_serves_with_another_rollout(board: Board) -> None:
    board.wish("1", "first")
    active = board.known().active
    assert active is not None
    board.spoil(active)
    board.die()
    assert serves(board.wish("1", "first", again=True)) is None
    shutil.rmtree(Store(board.state).slot("tiny", active.slot))
    assert Store(board.state).place("tiny", active.slot, active.package_sha256)
    assert serves(board.wish("1", "first", again=True)) is None, "nobody said that it was mended"
    agent = board.wish("1", "second")
    assert (serves(agent), agent.worker.unserved) == ("1", {})
    assert board.start() == 0
    assert not Loads(board.state).deaths("tiny", active)


def test_new_version_is_installed_while_the_old_one_cannot_be_loaded(board: Board) -> None:
    board.wish("1", "first")
    board.spoil(board.known().active)
    board.die()
    agent = board.wish("2", "second")
    assert (serves(agent), agent.worker.unserved) == ("2", {})
    assert board.start() == 0


def test_previous_package_that_is_not_whole_is_not_gone_back_to(board: Board) -> None:
    board.wish("1", "first")
    board.wish("2", "second")
    state = board.known()
    store = Store(board.state)
    assert state.previous is not None
    board.spoil(state.active)
    board.spoil(state.previous)
    entry = store.packages.find(state.previous.package_sha256)
    assert entry is not None
    variant = next(file for file in entry.files if file.path == "variants/a.json")
    (board.state / "blobs" / variant.sha256).unlink()
    board.die()
    assert board.start() == 0
    agent = board.wish("2", "second", again=True)
    assert (agent.models.names(), list(agent.worker.unserved)) == ([], ["tiny"])
    assert board.known().active == state.active


@pytest.mark.parametrize("phase", [Phase.DOWNLOADING, Phase.STAGED, Phase.TRIAL])
def test_deadly_package_in_the_middle_of_a_deployment_makes_room_for_it(board: Board, phase: Phase) -> None:
    board.wish("1", "first")
    board.wish("2", "second")
    board.publisher.add("3")
    state = board.known()
    wanted = DesiredModel("tiny", "3", "models/tiny/3/host.json", "third")
    candidate = Installed(state.free_slot, "3", "3" * 64, "a")
    Store(board.state).save_state(
        replace(state, phase=phase, candidate=candidate, desired=wanted, attempts=1)
    )
    board.spoil(state.active)
    board.die()
    assert board.start() == 0
    after = board.known()
    assert (after.phase, after.active and after.active.version) == (Phase.RESOLVING, "1")
    assert serves(board.wish("3", "third")) == "3"
    done = board.known()
    assert done.active is not None
    assert done.previous is not None
    assert (done.previous.version, done.active.slot != done.previous.slot) == ("1", True)


def test_error_while_loading_is_no_death(board: Board) -> None:
    board.wish("1", "first")
    board.spoil(board.known().active, "raise")
    assert [board.start() for _ in range(MAX_DEATHS + 2)] == [0] * (MAX_DEATHS + 2)
    agent = board.wish("1", "first", again=True)
    assert "fails on purpose" in agent.models.absent()["tiny"][1]
    assert agent.worker.unserved == {}


def test_count_that_cannot_be_written_or_read_stops_nothing(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.wish("1", "first")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    agent = board.agent()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        agent.worker.start()
        assert agent.models.names() == ["tiny"]
    (board.state / "models/tiny/loads.json").write_bytes(b"\0torn")
    assert board.start() == 0
    assert not (board.state / "models/tiny/loads.json").exists()


@pytest.mark.flow
def test_agent_that_segfaults_at_each_start_comes_up_by_itself(board: Board, tmp_path: Path) -> None:
    """As its manager sees it: `edgeopt-agent run` ends three times by a signal, and works from then on."""
    board.wish("1", "first")
    board.wish("2", "second")
    board.spoil(board.known().active, "segfault")
    document = {
        "schema": "edgeopt.agent/1",
        "device": "d1",
        "device_class": "host",
        "state_dir": str(board.state),
        "root": str(board.publisher.root),
        "transport": {"kind": "folder", "path": str(board.publisher.repository)},
    }
    (tmp_path / "agent.json").write_text(json.dumps(document))
    command = [sys.executable, "-c", "from edgeopt_agent.cli import main; main()", "run", "--once"]
    ends = [
        subprocess.run(
            [*command, "--config", str(tmp_path / "agent.json")], capture_output=True, timeout=60, check=False
        ).returncode
        for _ in range(MAX_DEATHS + 1)
    ]
    assert ends == [-11] * MAX_DEATHS + [0]
    active = board.known().active
    assert active is not None
    assert active.version == "1"
