# SPDX-License-Identifier: Apache-2.0
"""A whole agent on the disk of another version of it: an older one's is taken over, a newer one's is left as it is.

The records are those that older agents wrote with their own code (`tests/golden/agent_records`); the slots are filled as
those agents filled them, by copies, with no store beside them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_lives import live, make, serves

from edgeopt_agent.housekeeping import Housekeeper
from edgeopt_agent.loop import Agent
from edgeopt_agent.machine import Installed, State
from edgeopt_agent.store import Store
from edgeopt_agent.trust import Trust
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.messages import Phase

Publisher = Any
RECORDS = Path(__file__).resolve().parents[1] / "golden" / "agent_records"
COMMITS = sorted(path.name for path in RECORDS.iterdir() if (path / "device.json").is_file())
OLD, NEWEST = "1" * 64, "2" * 64
"""The digests of versions 1 and 2 in those records."""


class Board:
    """The disk of an older agent that runs version 2 in slot B and ran version 1 in slot A."""

    def __init__(
        self, folder: Path, publisher: Publisher, commit: str, make_package: Callable[..., Any]
    ) -> None:
        self.publisher = publisher
        publisher.add("3")
        self.state = folder / "state"
        self.model = self.state / "models" / "tiny"
        for slot, version, digest in (("A", "1", OLD), ("B", "2", NEWEST)):
            make_package(self.model / slot, {"a": {"load_ns": int(version)}}, version=version)
            (self.model / slot / ".whole").write_text(digest)
        for name in ("state-0.json", "state-1.json"):
            shutil.copy(RECORDS / commit / name, self.model / name)
        shutil.copy(RECORDS / commit / "device.json", self.state)
        self._look_as_of_old()

    def _look_as_of_old(self) -> None:
        """Verified metadata with the floor in one file, as older agents kept it."""
        folder, files = self.state / "metadata", self.publisher.files()
        folder.mkdir()
        clock = TrustedClock(lambda: self.publisher.now)
        Trust(folder, self.publisher.root.read_bytes(), lambda name, _: files.get(name), clock).refresh()
        shutil.rmtree(folder / "floor")
        assert (folder / "versions.floor").is_file()

    def live(self, version: str, rollout: str) -> Agent:
        agent = make(self.state, self.publisher.root, self.publisher.repository)
        live(agent, self.publisher.desire(8, version, rollout=rollout))
        return agent

    def files(self, slot: str) -> list[Path]:
        found = (path for path in (self.model / slot).rglob("*") if path.is_file())
        return sorted(path for path in found if path.name != ".whole")


@pytest.fixture(params=COMMITS)
def board(
    request: pytest.FixtureRequest, tmp_path: Path, publisher: Publisher, make_package: Callable[..., Any]
) -> Board:
    return Board(tmp_path, publisher, request.param, make_package)


def test_old_slot_serves_and_is_taken_into_the_store_by_its_own_files(board: Board) -> None:
    inodes = {path: path.stat().st_ino for slot in ("A", "B") for path in board.files(slot)}
    agent = board.live("2", "first")
    assert serves(agent) == "2"
    assert agent.states["tiny"].phase is Phase.COMMITTED
    assert {path: path.stat().st_ino for path in inodes} == inodes, "nothing was written again"
    for slot, digest in (("A", OLD), ("B", NEWEST)):
        entry = agent.store.packages.find(digest)
        assert entry is not None
        assert agent.store.packages.is_whole(digest)
        assert {file.path for file in entry.files} == {
            path.relative_to(board.model / slot).as_posix() for path in board.files(slot)
        }
        for file in entry.files:  # what both versions have is kept once, by the name that B has for it
            blob = board.state / "blobs" / file.sha256
            assert any(
                (board.model / name / file.path).samefile(blob)
                for name in ("B", slot)
                if (board.model / name / file.path).is_file()
            )
    whole = {path.stat().st_ino: path.stat().st_size for path in inodes}
    records = sum(path.stat().st_size for path in board.model.glob("*.json"))
    assert Housekeeper(agent.store).used_bytes() == sum(whole.values()) + records + 2 * len(OLD)
    assert (board.state / "metadata/floor/versions-0.json").is_file()
    assert agent.store.complaints == []


def test_next_version_is_installed_beside_it_and_a_restart_finds_both(board: Board) -> None:
    assert serves(board.live("3", "next")) == "3"
    again = board.live("3", "next")
    assert serves(again) == "3"
    state = again.store.open_state("tiny")
    assert state.active is not None
    assert state.previous is not None
    assert (state.active.slot, state.previous.version, state.previous.slot) == ("A", "2", "B")
    assert again.store.place("tiny", "B", NEWEST)
    assert again.store.packages.find(OLD) is not None, "it stays until room is needed"


def test_trial_that_an_older_agent_had_begun_is_finished(board: Board) -> None:
    (board.model / "state-0.json").write_bytes(b"\0torn")
    assert Store(board.state).load_state("tiny").phase is Phase.TRIAL
    agent = board.live("2", "first")
    assert serves(agent) == "2"
    state = agent.store.open_state("tiny")
    assert (state.phase, state.previous and state.previous.version) == (Phase.COMMITTED, "1")


def test_old_slot_that_is_damaged_serves_and_is_not_taken_in(board: Board) -> None:
    sample = board.model / "B" / "golden/inputs/0.npy"
    sample.write_bytes(sample.read_bytes()[:-1] + b"\xff")
    agent = make(board.state, board.publisher.root, board.publisher.repository)
    agent.start()
    image = np.ones((1, 2, 4, 4), np.float32)
    assert agent.models.infer("tiny", {"image": image})[0].manifest.version == "2"
    assert agent.store.packages.find(NEWEST) is None
    assert agent.store.packages.find(OLD) is not None


def test_newer_agents_model_serves_on_and_its_record_stays_byte_for_byte(
    board: Board, make_package: Callable[..., Any]
) -> None:
    store = Store(board.state)
    record = store._record("tiny")
    newest = record.load()
    assert newest is not None
    record.save({**newest[1], "schema": "edgeopt.state/2", "phase": "dreaming", "new": {"deep": [1]}})
    make_package(store.slot("other", "A"), {"a": {}}, name="other")
    (store.slot("other", "A") / ".whole").write_text("9" * 64)
    store.save_state(State("other", Phase.COMMITTED, active=Installed("A", "1", "9" * 64, "a")))
    before = {path: path.read_bytes() for path in sorted(board.model.rglob("*")) if path.is_file()}
    for _ in range(2):
        agent = board.live("3", "next")
        assert serves(agent) == "2"
        assert agent.models.names() == ["other", "tiny"]
        told = {model.name: model for model in agent.reported().models}
        assert (told["tiny"].phase, told["tiny"].version) == (Phase.FAILED, "2")
        assert "install the newer agent again" in told["tiny"].error
        assert {
            path: path.read_bytes() for path in sorted(board.model.rglob("*")) if path.is_file()
        } == before
    assert agent.store.packages.find("9" * 64) is not None, "what is this agent's is looked after as ever"


def test_newer_agents_device_record_stays_and_nothing_new_is_obeyed(board: Board) -> None:
    document = json.loads((board.state / "device.json").read_bytes())
    raw = canonical_bytes({**document, "schema": "edgeopt.device-record/2", "new": 1})
    (board.state / "device.json").write_bytes(raw)
    agent = board.live("3", "next")
    assert serves(agent) == "2"
    assert "newer agent" in agent.unread_because
    assert (board.state / "device.json").read_bytes() == raw
