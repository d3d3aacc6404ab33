# SPDX-License-Identifier: Apache-2.0
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from independent_client import client_reads
from securesystemslib.signer import Key
from tuf.api.metadata import Metadata

import edgeopt.repository as subject
from edgeopt.keys import create_keys, load_signer
from edgeopt.publish import publish
from edgeopt_wire.document import from_bytes
from edgeopt_wire.errors import EdgeoptError, RecipeError, TrustError
from edgeopt_wire.index import PackageIndex

MakePackage = Callable[..., Path]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_published_package_is_found_by_an_independent_client_that_knows_only_the_root(
    make_package: MakePackage, keys: Path, noon: datetime, tmp_path: Path
) -> None:
    package = make_package(weights=bytes(range(256)) * 1000)
    done = publish(package, tmp_path / "repo", keys, now=noon)
    assert done.is_new
    raw = client_reads(tmp_path / "repo", "models/tiny/1/host.json", tmp_path / "client", noon)
    index = from_bytes(PackageIndex, raw)
    assert index == done.index
    assert len(index.chunks) == -(-package.stat().st_size // 65536) > 1
    assert (tmp_path / "repo" / "blobs" / index.sha256).read_bytes() == package.read_bytes()


def test_director_target_holds_the_public_director_key_and_nothing_secret(
    make_package: MakePackage, keys: Path, noon: datetime, tmp_path: Path
) -> None:
    publish(make_package(), tmp_path / "repo", keys, now=noon)
    document = json.loads(client_reads(tmp_path / "repo", "fleet/director.json", tmp_path / "client", noon))
    director = load_signer(keys, "director").public_key
    ((keyid, public),) = document["keys"].items()
    assert (document["schema"], document["threshold"]) == ("edgeopt.director/1", 1)
    assert Key.from_dict(keyid, dict(public)) == director
    for content in tree(tmp_path / "repo").values():
        assert b"PRIVATE" not in content


def test_publishing_the_same_again_changes_no_byte(
    make_package: MakePackage, keys: Path, noon: datetime, tmp_path: Path
) -> None:
    package = make_package()
    publish(package, tmp_path / "repo", keys, now=noon)
    before = tree(tmp_path / "repo")
    again = publish(package, tmp_path / "repo", keys, now=noon + timedelta(hours=1))
    assert not again.is_new
    assert tree(tmp_path / "repo") == before


def test_other_bytes_under_a_published_version_are_refused(
    make_package: MakePackage, keys: Path, noon: datetime, tmp_path: Path
) -> None:
    publish(make_package(weights=b"one"), tmp_path / "repo", keys, now=noon)
    before = tree(tmp_path / "repo")
    with pytest.raises(RecipeError, match="give the package another version"):
        publish(make_package(weights=b"two"), tmp_path / "repo", keys, now=noon)
    assert tree(tmp_path / "repo") == before


def test_versions_and_devices_live_beside_each_other(
    make_package: MakePackage, keys: Path, noon: datetime, tmp_path: Path
) -> None:
    for version, device in (("1", "host"), ("2", "host"), ("1", "raspberry-pi-4")):
        publish(make_package(version=version, device=device), tmp_path / "repo", keys, now=noon)
    for target in ("models/tiny/1/host.json", "models/tiny/2/host.json", "models/tiny/1/raspberry-pi-4.json"):
        client_reads(tmp_path / "repo", target, tmp_path / "client", noon)


@pytest.mark.parametrize("position", [0.2, 0.5, 0.9])
def test_damaged_package_is_never_published(
    make_package: MakePackage, keys: Path, noon: datetime, tmp_path: Path, position: float
) -> None:
    package = make_package(weights=b"w" * 5000)
    raw = bytearray(package.read_bytes())
    raw[int(len(raw) * position)] ^= 1
    package.write_bytes(raw)
    with pytest.raises(TrustError):
        publish(package, tmp_path / "repo", keys, now=noon)
    assert not (tmp_path / "repo").exists()


class PowerCut(BaseException):
    """The machine stops here: nothing after it runs."""


def test_power_cut_at_any_write_leaves_the_old_repository_valid_and_the_next_publish_works(
    make_package: MakePackage, keys: Path, noon: datetime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_package(version="1"), make_package(version="2")
    real = Path.replace
    for cut_at in range(1, 20):
        repo = tmp_path / f"repo{cut_at}"
        publish(first, repo, keys, now=noon)
        renames = 0

        def replace(self: Path, target: Path, stop: int = cut_at) -> Path:
            nonlocal renames
            renames += 1
            if renames == stop:
                raise PowerCut
            return real(self, target)

        monkeypatch.setattr(Path, "replace", replace)
        try:
            publish(second, repo, keys, now=noon)
        except PowerCut:
            monkeypatch.setattr(Path, "replace", real)
            client_reads(repo, "models/tiny/1/host.json", tmp_path / f"client{cut_at}", noon)
            assert publish(second, repo, keys, now=noon).is_new
            client_reads(repo, "models/tiny/2/host.json", tmp_path / f"client{cut_at}", noon)
        else:
            monkeypatch.setattr(Path, "replace", real)
            assert cut_at == 7, "blob, delta, index, targets, snapshot, timestamp: six renames"
            return
    pytest.fail("publishing never finished")


def test_online_keys_alone_keep_the_repository_fresh(
    make_package: MakePackage, keys: Path, noon: datetime, tmp_path: Path
) -> None:
    repo = tmp_path / "repo"
    publish(make_package(), repo, keys, now=noon)
    online = {role: load_signer(keys, role) for role in ("snapshot", "timestamp")}
    assert not subject.Repository(repo, online, noon + timedelta(days=4)).freshen()
    later = noon + timedelta(days=6)
    assert subject.Repository(repo, online, later).freshen()
    client_reads(repo, "models/tiny/1/host.json", tmp_path / "client", noon + timedelta(days=10))
    timestamp: Any = Metadata.from_file(str(repo / "metadata" / "timestamp.json"))
    assert timestamp.signed.version == 3
    assert timestamp.signed.expires == later + subject.LIFETIMES["timestamp"]


def test_repository_that_nobody_freshened_is_refused_by_clients(
    make_package: MakePackage, keys: Path, noon: datetime, tmp_path: Path
) -> None:
    from tuf.api.exceptions import ExpiredMetadataError

    publish(make_package(), tmp_path / "repo", keys, now=noon)
    with pytest.raises(ExpiredMetadataError):
        client_reads(
            tmp_path / "repo", "models/tiny/1/host.json", tmp_path / "client", noon + timedelta(days=8)
        )


def test_keys_of_another_repository_cannot_spoil_this_one(
    make_package: MakePackage, keys: Path, noon: datetime, tmp_path: Path
) -> None:
    repo = tmp_path / "repo"
    publish(make_package(version="1"), repo, keys, now=noon)
    create_keys(tmp_path / "others")
    with pytest.raises(EdgeoptError):
        publish(make_package(version="2"), repo, tmp_path / "others", now=noon)
    client_reads(repo, "models/tiny/1/host.json", tmp_path / "client", noon)


def test_freshening_with_foreign_keys_cannot_spoil_the_repository(
    make_package: MakePackage, keys: Path, noon: datetime, tmp_path: Path
) -> None:
    repo = tmp_path / "repo"
    publish(make_package(), repo, keys, now=noon)
    create_keys(tmp_path / "others")
    online = {role: load_signer(tmp_path / "others", role) for role in ("snapshot", "timestamp")}
    with pytest.raises(EdgeoptError):
        subject.Repository(repo, online, noon + timedelta(days=6)).freshen()
    client_reads(repo, "models/tiny/1/host.json", tmp_path / "client", noon)
