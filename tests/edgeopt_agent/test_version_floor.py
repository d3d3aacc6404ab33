# SPDX-License-Identifier: Apache-2.0
"""What a device knows of the newest signed versions is torn, gone or unreadable: old metadata never comes in silently."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.dsse import Envelope

from edgeopt.keys import load_signer
from edgeopt_agent.director import read_director
from edgeopt_agent.machine import Installed, State
from edgeopt_agent.past import Past, past_of
from edgeopt_agent.store import DeviceRecord, Store
from edgeopt_agent.trust import Trust
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_agent.version_floor import FloorLostError
from edgeopt_wire.document import canonical_bytes, to_bytes
from edgeopt_wire.errors import ForgedError, StoreError
from edgeopt_wire.messages import TIME_TYPE, SignedTime

Publisher = Any
FIRST, SECOND = "models/tiny/1/host.json", "models/tiny/2/host.json"
COPIES = ("floor/versions-0.json", "floor/versions-1.json", "versions.floor")


class Device:
    """Trust that saw version 2 of a repository, and the same repository as it was with version 1."""

    def __init__(self, folder: Path, publisher: Publisher) -> None:
        self.folder = folder / "metadata"
        self.folder.mkdir()
        self.publisher = publisher
        self.tells_time = False
        self.signer = "director"
        self.now: datetime = publisher.now
        self.complaints: list[str] = []
        self.past = Past()
        publisher.add("1")
        self.old: dict[str, bytes] = publisher.files()
        publisher.add("2")
        self.new: dict[str, bytes] = publisher.files()
        self.files = self.new
        self.boot()
        self.first = self.trust.find_index(FIRST).sha256
        self.second = self.trust.find_index(SECOND).sha256
        director = next(raw for name, raw in self.new.items() if "director" in name)
        self.keys = frozenset(read_director(director).keys)

    def boot(self) -> None:
        self.trust = Trust(
            self.folder,
            self.publisher.root.read_bytes(),
            self.fetch,
            TrustedClock(lambda: self.now),
            past=lambda: self.past,
            complain=self.complaints.append,
        )

    def fetch(self, name: str, _limit: int = 0) -> bytes | None:
        if not name.startswith("time/"):
            return self.files.get(name)
        if not self.tells_time:
            return None
        body = to_bytes(SignedTime(name.removeprefix("time/"), self.now))
        envelope = Envelope(body, TIME_TYPE, {})
        envelope.sign(load_signer(self.publisher.keys, self.signer))
        return json.dumps(envelope.to_dict()).encode()

    def lose(self, *names: str, how: bytes | None = b"\0torn") -> None:
        """Tear copies of the floor, or remove them, and python-tuf's own files with them."""
        for name in names:
            if how is None:
                (self.folder / name).unlink()
            else:
                (self.folder / name).write_bytes(how)
        for path in self.folder.glob("*.json"):
            path.unlink()

    def is_told_old(self) -> bool:
        """Whether the floor alone refuses the old repository because it is older than what was seen."""
        self.lose()
        self.files = self.old
        self.boot()
        with pytest.raises(ForgedError, match="went back"):
            self.trust.find_index(FIRST)
        return not self.complaints


@pytest.fixture
def device(tmp_path: Path, publisher: Publisher) -> Device:
    return Device(tmp_path, publisher)


@pytest.mark.parametrize("how", [b"\0torn", b"", b"{}", None], ids=["torn", "empty", "other", "gone"])
@pytest.mark.parametrize("left", COPIES)
def test_one_copy_that_is_left_is_enough(device: Device, left: str, how: bytes | None) -> None:
    device.lose(*(name for name in COPIES if name != left), how=how)
    assert device.is_told_old()


def test_floor_of_one_file_is_taken_over_and_kept_for_older_agents(device: Device) -> None:
    raw = (device.folder / "versions.floor").read_bytes()
    assert json.loads(raw).keys() == {"root", "timestamp", "snapshot"}, "the form that older agents read"
    device.lose("floor/versions-0.json", "floor/versions-1.json", how=None)
    device.boot()
    device.trust.find_index(SECOND)
    assert all((device.folder / name).is_file() for name in COPIES)
    device.lose("versions.floor", how=None)
    assert device.is_told_old()


def test_floor_that_an_older_agent_raised_meanwhile_counts(device: Device) -> None:
    path = device.folder / "versions.floor"
    roles = json.loads(path.read_bytes())
    roles["timestamp"]["meta"]["timestamp"] += 1
    device.lose("versions.floor", how=canonical_bytes(roles))
    device.boot()
    with pytest.raises(ForgedError, match="timestamp went back"):
        device.trust.find_index(SECOND)


@pytest.mark.parametrize("name", COPIES)
def test_copy_that_the_disk_does_not_read_now_stops_what_is_new_until_it_does(
    device: Device, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path == device.folder / name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    before = (device.folder / name).read_bytes()
    device.boot()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        with pytest.raises(StoreError, match="cannot read"):
            device.trust.find_index(SECOND)
    assert (device.folder / name).read_bytes() == before
    device.trust.find_index(SECOND)


def test_record_of_a_newer_agent_is_left_as_it_is(device: Device) -> None:
    paths = [device.folder / name for name in COPIES[:2]]
    text = paths[0].read_text().replace("version-floor/1", "version-floor/2")
    body = json.loads(text)["floor"]
    digest = hashlib.sha256(canonical_bytes([9, body])).hexdigest()
    for path in paths:
        path.write_bytes(canonical_bytes({"generation": 9, "floor": body, "sha256": digest}))
    before = [path.read_bytes() for path in paths]
    device.boot()
    with pytest.raises(StoreError, match="newer agent"):
        device.trust.find_index(SECOND)
    assert [path.read_bytes() for path in paths] == before


def test_all_is_lost_and_signed_files_that_are_whole_say_it_again(device: Device) -> None:
    kept = {name: (device.folder / name).read_bytes() for name in ("timestamp.json", "snapshot.json")}
    device.lose(*COPIES)
    for name, raw in kept.items():
        (device.folder / name).write_bytes(raw)
    device.past = Past({FIRST: device.first}, has_lived=True)
    device.boot()
    device.trust.find_index(SECOND)
    assert device.is_told_old()


def lost(device: Device) -> Device:
    """A device that runs version 2 and lost the floor and python-tuf's files."""
    device.lose(*COPIES)
    device.past = Past({SECOND: device.second}, device.keys, has_lived=True)
    device.boot()
    return device


def test_all_is_lost_and_an_old_repository_is_refused_however_often_it_comes(device: Device) -> None:
    lost(device).files = device.old
    for _ in range(3):
        device.boot()
        with pytest.raises(FloorLostError, match="nothing new is installed until"):
            device.trust.find_index(FIRST)
    assert not any((device.folder / name).exists() for name in COPIES)
    device.files = device.new
    assert device.trust.find_index(SECOND).sha256 == device.second
    assert "is proven not to be older" in device.complaints[0]
    device.complaints.clear()
    assert device.is_told_old(), "and from then on there is a floor"


def test_all_is_lost_and_the_same_release_with_other_bytes_proves_nothing(device: Device) -> None:
    lost(device).past = Past({SECOND: "9" * 64}, has_lived=True)
    with pytest.raises(FloorLostError, match="other bytes"):
        device.trust.find_index(SECOND)


def test_all_is_lost_and_the_signed_time_of_a_director_who_is_known_is_a_proof(device: Device) -> None:
    lost(device).past = Past({"models/tiny/0/host.json": "9" * 64}, device.keys, has_lived=True)
    with pytest.raises(FloorLostError, match="nobody answers what time it is"):
        device.trust.find_index(SECOND)
    device.tells_time = True
    device.signer = "timestamp"
    with pytest.raises(FloorLostError, match="not signed by"):
        device.trust.find_index(SECOND)
    device.signer = "director"
    device.past = Past(device.past.releases, frozenset({"0" * 64}), has_lived=True)
    with pytest.raises(FloorLostError, match="not who directed this device before"):
        device.trust.find_index(SECOND)
    device.past = Past(device.past.releases, device.keys, has_lived=True)
    assert device.trust.find_index(SECOND).sha256 == device.second
    assert len(device.complaints) == 1


def test_device_with_nothing_on_it_begins_anew_and_says_so(device: Device) -> None:
    device.lose(*COPIES)
    device.past = Past()
    device.boot()
    device.trust.find_index(SECOND)
    assert "nothing is installed here" in device.complaints[0]


def test_power_cut_at_any_write_never_makes_old_metadata_a_proof(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old repository comes after the loss, and the power goes before the device has judged it."""
    real = os.fsync
    for cut in range(1, 12):
        lost_now = [name for name in COPIES if (device.folder / name).exists()]
        device.lose(*lost_now)
        device.past = Past({SECOND: device.second}, device.keys, has_lived=True)
        device.files = device.old
        left = [cut]

        def fails(descriptor: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise KeyboardInterrupt
            real(descriptor)

        device.boot()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails)
            with pytest.raises((KeyboardInterrupt, FloorLostError)):
                device.trust.find_index(FIRST)
        device.boot()
        with pytest.raises(FloorLostError):
            device.trust.find_index(FIRST)


def test_past_is_what_serves_and_who_directed(
    tmp_path: Path, publisher: Publisher, make_package: Callable[..., Any]
) -> None:
    store = Store(tmp_path / "state")
    assert past_of(store) == Past()
    make_package(store.slot("tiny", "A"), {"a": {}}, version="2")
    store.save_state(State("tiny", active=Installed("A", "2", "2" * 64, "a")))
    store.save_device(DeviceRecord(revision=3, director=("k",)))
    assert past_of(store) == Past({SECOND: "2" * 64}, frozenset({"k"}), has_lived=True)
