# SPDX-License-Identifier: Apache-2.0
"""What stays on the disk and what goes, and records that are lost, torn, or of a newer agent."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgeopt_agent.housekeeping import Housekeeper
from edgeopt_agent.machine import Installed, State
from edgeopt_agent.quota import parse_quota
from edgeopt_agent.records import NewerRecordError
from edgeopt_agent.store import DeviceRecord, Store
from edgeopt_wire.archive import write_archive
from edgeopt_wire.errors import RecipeError, StoreError
from edgeopt_wire.index import PackageIndex, index_of
from edgeopt_wire.manifest import Manifest
from edgeopt_wire.messages import Phase

MakePackage = Callable[..., Manifest]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


@pytest.fixture
def stage(store: Store, tmp_path: Path, make_package: MakePackage) -> Callable[[str], PackageIndex]:
    def make(version: str) -> PackageIndex:
        folder, path = tmp_path / version, tmp_path / f"{version}.edgeopt"
        content = {"weights": [float(version)] * 20_000}
        manifest = make_package(folder, {"a": content}, version=version)
        members = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        with path.open("w+b") as file:
            write_archive(file, members)
        index = index_of(path, name="tiny", version=version, device="host", compatible=manifest.compatible)
        (store.folder / "incoming" / index.sha256).write_bytes(path.read_bytes())
        assert store.stage(index)
        assert store.place("tiny", "A", index.sha256)
        store.incoming(index).discard()
        return index

    return make


def test_least_recently_used_goes_first_and_what_is_named_never(
    store: Store, stage: Callable[[str], PackageIndex]
) -> None:
    indexes = [stage(version) for version in ("1", "2", "3", "4")]
    digests = [index.sha256 for index in indexes]
    state = State(
        "tiny",
        Phase.COMMITTED,
        active=Installed("A", "4", digests[3]),
        previous=Installed("B", "1", digests[0]),
    )
    store.save_state(state)
    used = Housekeeper(store).used_bytes()
    keeper = Housekeeper(store, f"{used}B")
    keeper.make_room(1000, {"tiny": state})
    assert [store.packages.find(digest) is not None for digest in digests] == [True, False, True, True]
    with pytest.raises(StoreError, match="raise disk_quota or free some space"):
        keeper.make_room(used, {"tiny": state})
    assert store.packages.find(digests[2]) is not None, "nothing goes where it does not help"
    Housekeeper(store, "1B").clean({"tiny": state})
    assert [store.packages.find(digest) is not None for digest in digests] == [True, False, False, True]
    assert store.is_whole("tiny", "B", digests[0]), "the previous package is in its slot again"
    named = {file.sha256 for entry in store.packages.all()[0].values() for file in entry.files}
    assert {path.name for path in (store.folder / "blobs").iterdir()} == named


def test_slots_share_their_files_with_the_store(store: Store, stage: Callable[[str], PackageIndex]) -> None:
    index = stage("1")
    assert Housekeeper(store).used_bytes() < 1.2 * index.size_bytes


def test_nothing_of_a_model_whose_record_is_unknown_goes(
    store: Store, stage: Callable[[str], PackageIndex]
) -> None:
    index = stage("1")
    Housekeeper(store, "1B").clean({})
    assert store.is_whole("tiny", "A", index.sha256)
    assert store.packages.find(index.sha256) is not None


def test_device_record_that_lost_either_copy_is_the_same(store: Store) -> None:
    record = DeviceRecord(revision=7, newest_moment="2026-11-25T00:00:00Z")
    for name in ("device-0.json", "device-1.json"):
        store.save_device(record)
        (store.folder / name).write_bytes(b"\0torn")
        assert Store(store.folder).load_device() == record


def test_device_record_that_is_lost_is_told_and_never_falls_below_what_models_know(store: Store) -> None:
    store.save_device(DeviceRecord(revision=9))
    store.save_state(replace(State("tiny"), revision=7))
    for path in store.folder.glob("device*.json"):
        path.write_bytes(b"\0torn")
    fresh = Store(store.folder)
    assert fresh.load_device().revision == 7
    assert "is lost" in fresh.complaints[0]


def test_record_of_a_newer_agent_is_left_and_what_it_says_is_active_is_known(store: Store) -> None:
    active = Installed("A", "1", "1" * 64, "fp32")
    store.save_state(State("tiny", Phase.COMMITTED, active=active))
    record = store._record("tiny")
    body = {"schema": "edgeopt.state/2", "active": {**json.loads(json.dumps(vars(active)))}, "new": [1]}
    record.save(body)
    before = [path.read_bytes() for path in record.paths if path.exists()]
    with pytest.raises(NewerRecordError, match="install the newer agent again"):
        store.open_state("tiny")
    with pytest.raises(NewerRecordError):
        store.save_state(State("tiny"))
    assert store.load_state("tiny").active == active
    assert [path.read_bytes() for path in record.paths if path.exists()] == before


@pytest.mark.parametrize(("text", "found"), [("50%", 500), ("2kB", 2000), ("100%", 1000)])
def test_quota_is_a_share_or_a_size(text: str, found: int) -> None:
    assert parse_quota(text, 1000) == found


@pytest.mark.parametrize("text", ["", "50", "0%", "101%", "-1GB", "muchGB", "nan%", "1e300GB"])
def test_quota_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_quota(text, 1000)
