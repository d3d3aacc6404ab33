# SPDX-License-Identifier: Apache-2.0
"""Records that older agents wrote, with their own code (`tests/golden/agent_records/write.py`), are understood by this one."""

import shutil
from pathlib import Path

import pytest

from edgeopt_agent.store import Store
from edgeopt_wire.messages import Phase

RECORDS = Path(__file__).resolve().parents[1] / "golden" / "agent_records"
COMMITS = sorted(path.name for path in RECORDS.iterdir() if (path / "device.json").is_file())


@pytest.fixture(params=COMMITS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    store = Store(tmp_path)
    (tmp_path / "models/tiny").mkdir()
    for name in ("state-0.json", "state-1.json"):
        shutil.copy(RECORDS / request.param / name, tmp_path / "models/tiny" / name)
    shutil.copy(RECORDS / request.param / "device.json", tmp_path)
    return store


def test_there_are_records_of_every_form() -> None:
    assert len(COMMITS) == 3


def test_state_of_an_older_agent_is_known_and_kept(store: Store) -> None:
    state = store.open_state("tiny")
    assert state.active is not None
    assert state.previous is not None
    assert (state.phase, state.active.version, state.previous.version) == (Phase.COMMITTED, "2", "1")
    assert (state.active.slot, state.active.variant, state.refused) == ("B", "a", {"3" * 64: "wrong outputs"})
    store.save_state(state)
    assert Store(store.folder).open_state("tiny") == state


def test_older_agents_copy_before_the_newest_counts_where_that_is_torn(store: Store) -> None:
    (store.folder / "models/tiny/state-0.json").write_bytes(b"\0")
    state = store.open_state("tiny")
    assert state.active is not None
    assert (state.phase, state.active.version) == (Phase.TRIAL, "1")


def test_device_record_of_an_older_agent_keeps_its_floor(store: Store) -> None:
    record = store.load_device()
    assert (record.revision, record.newest_moment) == (7, "2026-11-25T10:00:00Z")
    store.save_device(record)
    for path in (store.folder / "device.json", store.folder / "device-0.json"):
        path.write_bytes(b"\0")
    assert Store(store.folder).load_device() == record
