# SPDX-License-Identifier: Apache-2.0
"""What a device keeps survives power cuts, full disks and flipped bits, or says so."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgeopt_agent.housekeeping import Housekeeper
from edgeopt_agent.machine import Installed, State
from edgeopt_agent.store import Store
from edgeopt_wire.archive import write_archive
from edgeopt_wire.errors import StoreError, TrustError
from edgeopt_wire.index import PackageIndex, index_of
from edgeopt_wire.manifest import Manifest
from edgeopt_wire.messages import Phase

MakePackage = Callable[..., Manifest]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


@pytest.fixture
def package(tmp_path: Path, make_package: MakePackage) -> tuple[PackageIndex, bytes]:
    folder = tmp_path / "package"
    manifest = make_package(folder, {"a": {"weights": [1.0] * 2000}, "b": {}})
    path = tmp_path / "tiny.edgeopt"
    members = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    with path.open("w+b") as file:
        write_archive(file, members)
    index = index_of(
        path, name="tiny", version="1", device="host", compatible=manifest.compatible, chunk_bytes=1024
    )
    return index, path.read_bytes()


def put_all(store: Store, index: PackageIndex, raw: bytes) -> None:
    incoming = store.incoming(index)
    incoming.reserve()
    for number in range(len(index.chunks)):
        assert incoming.put(number, raw[number * index.chunk_bytes :][: index.chunk_bytes])
    incoming.checkpoint(set(range(len(index.chunks))))


def fill(store: Store, index: PackageIndex, slot: str) -> None:
    assert store.stage(index)
    assert store.place(index.name, slot, index.sha256)


def test_state_comes_back_after_a_start(store: Store) -> None:
    state = State("tiny", Phase.COMMITTED, active=Installed("A", "1", "1" * 64, "fp32"))
    store.save_state(state)
    assert Store(store.folder).load_state("tiny") == state


def test_damaged_record_falls_back_to_the_copy_before_it(store: Store) -> None:
    first, second = State("tiny", attempts=1), State("tiny", attempts=2)
    store.save_state(first)
    store.save_state(second)
    newest = store.folder / "models/tiny/state-0.json"
    assert json.loads(newest.read_bytes())["generation"] == 2
    newest.write_bytes(newest.read_bytes().replace(b'"attempts":2', b'"attempts":3'))
    assert store.load_state("tiny") == first
    assert newest.with_name("state-0.json.bad").exists()


def test_record_that_is_garbage_twice_is_a_fresh_start_and_not_a_crash(store: Store) -> None:
    store.save_state(State("tiny", attempts=1))
    for number in (0, 1):
        (store.folder / f"models/tiny/state-{number}.json").write_bytes(b"\0\xff{")
    assert store.load_state("tiny") == State("tiny")


def test_record_that_the_disk_refuses_to_read_now_is_neither_moved_nor_written_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = State("tiny", Phase.COMMITTED, active=Installed("A", "1", "0" * 64, "a"))
    store.save_state(saved)
    real = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name.startswith("state-"):
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        assert "cannot read" in store.load_state("tiny").error
        with pytest.raises(StoreError, match="cannot read"):
            store.save_state(State("tiny"))
    assert store.load_state("tiny") == saved


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_power_cut_while_saving_keeps_the_old_or_the_new_record(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    old = State("tiny", attempts=1)
    store.save_state(old)
    new = replace(old, attempts=2)

    def cut(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "power is gone")

    target = "os.fsync" if call == "fsync" else "pathlib.Path.replace"
    with monkeypatch.context() as patch:
        patch.setattr(target, cut)
        with pytest.raises(StoreError):
            store.save_state(new)
    assert Store(store.folder).load_state("tiny") in (old, new)
    assert not list(store.folder.rglob(".half-*"))


def test_chunk_that_is_not_what_was_signed_is_not_kept(
    store: Store, package: tuple[PackageIndex, bytes]
) -> None:
    index, raw = package
    incoming = store.incoming(index)
    incoming.reserve()
    chunk = bytearray(raw[:1024])
    chunk[100] ^= 1
    assert not incoming.put(0, bytes(chunk))
    assert not incoming.put(0, raw[:1023])
    assert not incoming.put(len(index.chunks), raw[:1024])
    assert not incoming.put(-1, raw[:1024])
    assert incoming.missing() == list(range(len(index.chunks)))


def test_download_goes_on_where_the_power_cut_ended_it(
    store: Store, package: tuple[PackageIndex, bytes]
) -> None:
    index, raw = package
    incoming = store.incoming(index)
    incoming.reserve()
    for number in (0, 1, 2):
        incoming.put(number, raw[number * 1024 :][:1024])
    incoming.checkpoint({0, 1})
    assert Store(store.folder).incoming(index).missing() == list(range(2, len(index.chunks)))


def test_bit_that_flips_on_the_disk_costs_one_chunk(
    store: Store, package: tuple[PackageIndex, bytes]
) -> None:
    index, raw = package
    put_all(store, index, raw)
    path = store.folder / "incoming" / index.sha256
    with path.open("r+b") as file:
        file.seek(1024 * 2 + 5)
        file.write(bytes([raw[1024 * 2 + 5] ^ 1]))
    assert store.incoming(index).missing() == [2]


def test_full_disk_is_known_before_the_first_byte_and_says_how_much(
    store: Store, package: tuple[PackageIndex, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, _ = package
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"needs 8\.\d MB of disk, 1\.0 MB are free"):
        store.incoming(index).reserve()
    assert not (store.folder / "incoming" / index.sha256).exists()


def test_disk_that_fills_while_room_is_taken_says_so(
    store: Store, package: tuple[PackageIndex, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="the disk is full"):
        store.incoming(package[0]).reserve()


def test_staged_slot_holds_the_package_and_is_whole(
    store: Store, package: tuple[PackageIndex, bytes]
) -> None:
    index, raw = package
    put_all(store, index, raw)
    fill(store, index, "A")
    manifest = store.manifest("tiny", "A")
    assert store.is_whole("tiny", "A", index.sha256)
    for entry in manifest.files:
        content = (store.slot("tiny", "A") / entry.path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry.sha256


def test_power_cut_while_unpacking_leaves_a_slot_that_is_not_whole(
    store: Store, package: tuple[PackageIndex, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, raw = package
    put_all(store, index, raw)
    fill(store, index, "A")
    (store.slot("tiny", "A") / "manifest.json").unlink()

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgeopt_agent.packages.link_durably", cut)
        with pytest.raises(KeyboardInterrupt):
            store.place("tiny", "A", index.sha256)
    assert not store.is_whole("tiny", "A", index.sha256)
    assert store.place("tiny", "A", index.sha256)
    assert store.is_whole("tiny", "A", index.sha256)


def test_index_that_lies_about_the_whole_is_refused(
    store: Store, package: tuple[PackageIndex, bytes]
) -> None:
    index, raw = package
    lie = replace(index, sha256="0" * 64)
    put_all(store, lie, raw)
    with pytest.raises(TrustError):
        store.stage(lie)
    assert store.packages.find(lie.sha256) is None


def test_index_of_another_version_is_refused(store: Store, package: tuple[PackageIndex, bytes]) -> None:
    index, raw = package
    other = replace(index, version="9")
    put_all(store, other, raw)
    with pytest.raises(TrustError, match="promises tiny 9"):
        store.stage(other)


def test_cleaning_never_touches_what_is_active_previous_or_on_its_way(
    store: Store, package: tuple[PackageIndex, bytes]
) -> None:
    index, raw = package
    put_all(store, index, raw)
    fill(store, index, "A")
    (store.folder / "incoming" / ("9" * 64)).write_bytes(b"rubbish")
    candidate = Installed("B", "2", index.sha256)
    state = State("tiny", Phase.VERIFYING, active=Installed("A", "1", index.sha256), candidate=candidate)
    store.save_state(state)
    Housekeeper(store).clean({"tiny": state})
    assert store.is_whole("tiny", "A", index.sha256)
    assert [path.name for path in (store.folder / "incoming").glob("*") if path.suffix == ""] == [
        index.sha256
    ]


def test_model_name_cannot_leave_the_state_directory(store: Store) -> None:
    with pytest.raises((ValueError, TrustError)):
        store.slot("../../etc", "A")


def test_state_directory_that_cannot_be_made_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot use the state directory"):
        Store(tmp_path / "file" / "state")
