# SPDX-License-Identifier: Apache-2.0
"""Whom a device believes: real keys, a real repository, and everything that somebody in between may try."""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from edgeopt_agent.trust import Trust, read_root
from edgeopt_agent.trusted_time import BUILT_AT, TrustedClock
from edgeopt_wire.document import format_moment
from edgeopt_wire.errors import StoreError, TransportError, TrustError
from edgeopt_wire.messages import MAX_DESIRED_BYTES

Publisher = Any
TARGET = "models/tiny/1/host.json"


class Device:
    """A device's trust whose view of the repository, and whose clock, can be changed."""

    def __init__(self, folder: Path, publisher: Publisher) -> None:
        folder.mkdir()
        self.files: dict[str, bytes] = publisher.files()
        self.now: datetime = publisher.now
        self.asked: list[str] = []
        self.trust = Trust(folder, publisher.root.read_bytes(), self.fetch, TrustedClock(lambda: self.now))

    def fetch(self, name: str, max_bytes: int = 0) -> bytes | None:
        self.asked.append(name)
        return self.files.get(name)


@pytest.fixture
def device(tmp_path: Path, publisher: Publisher) -> Device:
    publisher.add("1")
    return Device(tmp_path / "device", publisher)


def test_published_index_is_found(device: Device) -> None:
    index = device.trust.find_index(TARGET)
    assert (index.name, index.version, index.device) == ("tiny", "1", "host")


def test_target_that_nobody_signed_is_refused(device: Device) -> None:
    with pytest.raises(TrustError, match="lists no"):
        device.trust.find_index("models/tiny/9/host.json")


@pytest.mark.parametrize("what", ["timestamp.json", "snapshot.json", "targets.json", "host.json"])
def test_flipped_byte_anywhere_in_the_chain_is_a_lie(device: Device, what: str) -> None:
    for name in [name for name in device.files if name.endswith(what)]:
        changed = device.files[name].replace(b'"version":', b'"verSion":').replace(b'"tiny"', b'"tinY"')
        assert changed != device.files[name]
        device.files[name] = changed
    with pytest.raises(TrustError):
        device.trust.find_index(TARGET)


def test_repository_of_somebody_else_is_a_lie(
    device: Device, tmp_path: Path, make_publisher: Callable[..., Publisher]
) -> None:
    thief = make_publisher(tmp_path / "thief")
    thief.add("1")
    device.files = thief.files()
    with pytest.raises(TrustError):
        device.trust.find_index(TARGET)


def test_metadata_that_goes_back_is_refused(device: Device, publisher: Publisher) -> None:
    old = dict(device.files)
    publisher.add("2")
    device.files = publisher.files()
    device.trust.find_index("models/tiny/2/host.json")
    device.files = old
    with pytest.raises(TrustError):
        device.trust.find_index(TARGET)


def test_expired_metadata_waits_for_fresh_metadata(device: Device) -> None:
    device.now += timedelta(days=8)
    with pytest.raises(TransportError, match="expired"):
        device.trust.find_index(TARGET)


def test_network_that_is_away_is_no_lie(device: Device) -> None:
    def away(_: str, limit: int) -> bytes | None:
        raise TransportError("no network")

    device.trust._fetch = away
    with pytest.raises(TransportError, match="no network"):
        device.trust.find_index(TARGET)


def test_warm_refresh_asks_for_two_files_before_the_target(device: Device) -> None:
    device.trust.find_index(TARGET)
    device.asked.clear()
    device.trust.find_index(TARGET)
    assert device.asked[:2] == ["metadata/2.root.json", "metadata/timestamp.json"]
    assert len(device.asked) == 3


def test_director_is_heard(device: Device, publisher: Publisher) -> None:
    desired = device.trust.open_desired(publisher.desire(3, "1"), "d1")
    assert (desired.revision, desired.models[0].version) == (3, "1")


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp", "root"])
def test_only_the_director_may_desire(device: Device, publisher: Publisher, role: str) -> None:
    with pytest.raises(TrustError, match="director"):
        device.trust.open_desired(publisher.desire(1, "1", role=role), "d1")


def test_desired_document_of_another_device_is_refused(device: Device, publisher: Publisher) -> None:
    with pytest.raises(TrustError, match="is for d2, this device is d1"):
        device.trust.open_desired(publisher.desire(1, "1", device="d2"), "d1")


def test_expired_desired_document_is_refused(device: Device, publisher: Publisher) -> None:
    device.now += timedelta(hours=2)
    with pytest.raises(TransportError, match="expired"):
        device.trust.open_desired(publisher.desire(1, "1", lifetime=timedelta(hours=1)), "d1")


def test_other_signed_payload_is_not_taken_for_a_wish(device: Device, publisher: Publisher) -> None:
    with pytest.raises(TrustError, match=r"expected application/vnd\.edgeopt\.desired"):
        device.trust.open_desired(publisher.desire(1, "1", payload_type="text/plain"), "d1")


def test_changed_payload_breaks_the_signature(device: Device, publisher: Publisher) -> None:
    one, other = json.loads(publisher.desire(1, "1")), json.loads(publisher.desire(2, "1"))
    one["payload"] = other["payload"]
    with pytest.raises(TrustError):
        device.trust.open_desired(json.dumps(one).encode(), "d1")


@pytest.mark.parametrize(
    "garbage", [b"", b"{}", b"[]", b"\xff\xfe", b'{"payload": 3}', b"x" * (MAX_DESIRED_BYTES + 1)]
)
def test_garbage_is_refused_with_our_own_error(device: Device, garbage: bytes) -> None:
    with pytest.raises(TrustError):
        device.trust.open_desired(garbage, "d1")


def test_clock_never_runs_behind_what_was_seen_signed(publisher: Publisher) -> None:
    in_1970 = datetime.fromtimestamp(0, tz=publisher.now.tzinfo)
    seen = format_moment(publisher.now)
    assert TrustedClock(lambda: in_1970).now() == BUILT_AT
    assert TrustedClock(lambda: in_1970, lambda: seen).now() == publisher.now


def test_root_that_is_missing_or_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="enrol the device again"):
        read_root(tmp_path / "root.json")
    (tmp_path / "root.json").write_text('{"signed": {"_type": "targets"}}')
    with pytest.raises(TrustError, match="no root of trust"):
        read_root(tmp_path / "root.json")
