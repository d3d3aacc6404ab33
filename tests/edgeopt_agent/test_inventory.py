# SPDX-License-Identifier: Apache-2.0
"""`edgeopt-agent store`: what is on the disk, what may go and why the rest stays; collecting takes that and no more."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from device_lives import live, make, serves

from edgeopt_agent.config import AgentConfig
from edgeopt_agent.housekeeping import Housekeeper
from edgeopt_agent.inventory import collect, describe, lines
from edgeopt_agent.main import only_one
from edgeopt_agent.store import Store
from edgeopt_wire.errors import StoreError

Publisher = Any


class Board:
    """A device on which three versions were installed one after the other."""

    def __init__(self, folder: Path, publisher: Publisher) -> None:
        self.state = folder / "state"
        self.config = AgentConfig(
            "d1",
            "host",
            str(self.state),
            str(publisher.root),
            {"kind": "folder", "path": str(publisher.repository)},
        )
        self.publisher = publisher
        for number, version in enumerate(("1", "2", "3"), 1):
            publisher.add(version, load_ns=number)
            self.live(number, version)
        self.store = Store(self.state)

    def live(self, revision: int, version: str) -> None:
        agent = make(self.state, self.publisher.root, self.publisher.repository)
        live(agent, self.publisher.desire(revision, version, rollout=version))
        assert serves(agent) == version

    def tree(self) -> dict[str, bytes]:
        """What is on the disk, but for the lock."""
        found = (path for path in self.state.rglob("*") if path.is_file() and path.name != "lock")
        return {path.relative_to(self.state).as_posix(): path.read_bytes() for path in found}

    def versions(self) -> list[str]:
        return sorted(entry["version"] for entry in describe(self.config)["packages"])


@pytest.fixture
def board(tmp_path: Path, publisher: Publisher) -> Board:
    return Board(tmp_path, publisher)


def test_it_says_what_is_there_what_may_go_and_why_the_rest_stays(board: Board) -> None:
    before = board.tree()
    found = describe(board.config)
    assert board.tree() == before
    assert (found["schema"], found["running"], found["excess_bytes"]) == ("edgeopt.store/1", False, 0)
    assert found["used_bytes"] == Housekeeper(board.store).used_bytes()
    packages = {entry["version"]: entry for entry in found["packages"]}
    assert {version: entry["stays"] for version, entry in packages.items()} == {
        "3": ["active in tiny", "wanted by tiny"],
        "2": ["previous in tiny"],
        "1": [],
    }
    assert {version: entry["goes"] for version, entry in packages.items()} == {"3": 0, "2": 0, "1": 1}
    slots = {slot["role"]: slot for slot in found["models"][0]["slots"]}
    assert [(slots[role]["version"], slots[role]["is_whole"]) for role in ("active", "previous")] == [
        ("3", True),
        ("2", True),
    ]
    text = "\n".join(lines(found))
    assert "tiny 1 0.0 MB, 0.0 MB of its own: goes as number 1 when room is needed" in text
    assert "active in tiny; wanted by tiny" in text


def test_references_are_those_of_the_disk(board: Board) -> None:
    found = describe(board.config)["files"]
    assert (found["orphans"], found["missing"]) == ([], [])
    for digest, entry in found["references"].items():
        path = board.state / "blobs" / digest
        same = [p for p in board.state.rglob("*") if p.is_file() and p.stat().st_ino == path.stat().st_ino]
        assert entry["names"] == len(same), "each name is the store's own, or a slot's"
        assert entry["packages"] in (1, 3), "the samples belong to all, the rest to one"
    assert found["shared"] == 2
    assert found["saved_bytes"] == 2 * sum(
        entry["size_bytes"] for entry in found["references"].values() if entry["packages"] == 3
    )


def test_dry_run_says_what_collecting_does_and_does_nothing(board: Board) -> None:
    (board.state / "blobs" / ("f" * 64)).write_bytes(bytes(1000))
    before = board.tree()
    said = collect(board.config, dry_run=True)["collected"]
    assert board.tree() == before
    done = collect(board.config)
    assert done["collected"] == {**said, "dry_run": False}
    assert [entry["version"] for entry in said["packages"]] == ["1"]
    assert said["freed_bytes"] > 1000
    assert "1 packages went" in lines(done)[-1]
    assert (board.versions(), done["files"]["orphans"]) == (["2", "3"], [])
    state = board.store.load_state("tiny")
    for entry in (state.active, state.previous):
        assert entry is not None
        assert board.store.packages.is_whole(entry.package_sha256)
        assert board.store.place("tiny", entry.slot, entry.package_sha256)
    again = collect(board.config)["collected"]
    assert (again["packages"], again["freed_bytes"]) == ([], 0)
    board.live(4, "1")


def test_running_agent_is_looked_at_and_not_collected_from(board: Board) -> None:
    before = board.tree()
    with only_one(board.store):
        assert describe(board.config)["packages"]
        assert collect(board.config, dry_run=True)["collected"]["packages"]
        with pytest.raises(StoreError, match="stop it first"):
            collect(board.config)
    assert board.tree() == before


def test_nothing_goes_that_a_newer_agent_may_need(board: Board) -> None:
    record = board.store._record("tiny")
    newest = record.load()
    assert newest is not None
    record.save({**newest[1], "schema": "edgeopt.state/2"})
    found = collect(board.config)
    assert board.versions() == ["1", "2", "3"]
    assert "the record of tiny cannot be used now" in found["packages"][-1]["stays"]
    assert "newer agent" in found["models"][0]["error"]
    for path in (board.state / "packages").iterdir():
        path.write_text(path.read_text().replace("stored-package/1", "stored-package/2"))
        break
    with pytest.raises(StoreError, match="nothing is removed"):
        collect(board.config)
    assert len(list((board.state / "packages").iterdir())) == 3


def test_other_users_state_is_not_written_to(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: board.state.stat().st_uid + 1)
    with pytest.raises(StoreError, match="sudo -u"):
        collect(board.config)
    assert board.versions() == ["1", "2", "3"]


@pytest.mark.flow
def test_command_line_says_it_to_people_and_programs(board: Board, tmp_path: Path) -> None:
    path = tmp_path / "agent.json"
    document = {
        "schema": "edgeopt.agent/1",
        "device": "d1",
        "device_class": "host",
        "state_dir": str(board.state),
        "root": board.config.root,
        "transport": dict(board.config.transport),
    }
    path.write_text(json.dumps(document))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from edgeopt_agent.cli import main; main()", "store"]
        return subprocess.run(
            [*command, "--config", str(path), *words], capture_output=True, text=True, timeout=60, check=False
        )

    assert run("--dry-run").returncode == 2
    assert "1 packages would go" in run("--collect", "--dry-run").stdout
    done = run("--collect", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["packages"]) == 2
