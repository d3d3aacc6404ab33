# SPDX-License-Identifier: Apache-2.0
"""Replaced keys, thresholds and teams, judged by python-tuf's own client that knows the first root only."""

import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from independent_client import client_reads
from tuf.api.metadata import Metadata

from edgeopt import teams
from edgeopt.keys import create_keys, find_signer, load_signer
from edgeopt.publish import publish
from edgeopt.repository import Repository
from edgeopt.repository_files import locked
from edgeopt.rotate import RotationRequest, rotate
from edgeopt_wire.errors import EdgeoptError, RecipeError, StoreError, TrustError

MakePackage = Callable[..., Path]
TINY1 = "models/tiny/1/host.json"


def online(keys: Path) -> dict[str, Any]:
    return {role: load_signer(keys, role) for role in ("snapshot", "timestamp")}


def split(keys: Path, *names: str) -> Path:
    """Carry some keys to a folder of their own."""
    folder = keys.parent / "-".join(("only", *names))
    folder.mkdir(mode=0o700)
    for name in names:
        (keys / f"{name}.pem").rename(folder / f"{name}.pem")
    return folder


def test_root_of_three_keys_needs_two_of_them_in_whatever_folders(
    make_package: MakePackage, noon: datetime, tmp_path: Path
) -> None:
    keys, repo = tmp_path / "keys", tmp_path / "repo"
    create_keys(keys, root_keys=3)
    publish(make_package(), repo, keys, now=noon)
    a, b, c = (split(keys, name) for name in ("root", "root-2", "root-3"))
    root: Any = Metadata.from_file(str(repo / "metadata/1.root.json"))
    assert (root.signed.roles["root"].threshold, len(root.signed.roles["root"].keyids)) == (2, 3)
    with pytest.raises(TrustError, match="2 of the 3 root keys must sign, 1 of them"):
        rotate(RotationRequest(repo, (b, keys)), now=noon)
    done = rotate(RotationRequest(repo, (a, c, keys)), now=noon + timedelta(days=300))
    assert (done.root_version, done.root_threshold) == (2, 2)
    assert done.root_expires == noon + timedelta(days=665)


def test_lost_root_key_is_replaced_by_the_two_that_are_left(
    make_package: MakePackage, noon: datetime, tmp_path: Path
) -> None:
    keys, repo = tmp_path / "keys", tmp_path / "repo"
    create_keys(keys, root_keys=3)
    publish(make_package(), repo, keys, now=noon)
    (keys / "root-2.pem").unlink()
    done = rotate(RotationRequest(repo, (keys,), tmp_path / "new", ("root",)), now=noon)
    assert len(done.replaced["root"]) == 3
    assert set(done.replaced["root"]) == set(done.root_keys)
    client_reads(repo, TINY1, tmp_path / "client", noon)
    with pytest.raises(TrustError, match="2 of the 3"):
        rotate(RotationRequest(repo, (keys,)), now=noon)
    rotate(RotationRequest(repo, (tmp_path / "new",)), now=noon)
    client_reads(repo, TINY1, tmp_path / "client", noon)


@pytest.mark.parametrize(
    "roles",
    [
        ("timestamp",),
        ("snapshot", "timestamp"),
        ("targets",),
        ("director",),
        ("root",),
        ("root", "targets", "snapshot", "timestamp", "director"),
    ],
)
def test_rotated_keys_are_followed_by_old_and_new_clients_and_the_old_key_counts_no_more(
    make_package: MakePackage, noon: datetime, tmp_path: Path, roles: tuple[str, ...]
) -> None:
    keys, new, repo = tmp_path / "keys", tmp_path / "new", tmp_path / "repo"
    create_keys(keys)
    publish(make_package(), repo, keys, now=noon)
    client_reads(repo, TINY1, tmp_path / "old-client", noon)
    done = rotate(RotationRequest(repo, (keys,), new, roles), now=noon)
    assert set(done.replaced) == set(roles)
    assert done.root_version == (1 if roles == ("director",) else 2)
    publish(make_package(version="2"), repo, (new, keys), now=noon)
    first = (repo / "metadata/1.root.json").read_bytes()
    for client in ("old-client", "new-client"):
        assert client_reads(repo, "models/tiny/2/host.json", tmp_path / client, noon, first)
    director = client_reads(repo, "fleet/director.json", tmp_path / "old-client", noon, first)
    expected = find_signer((new, keys) if "director" in roles else (keys,), "director").public_key.keyid
    assert expected.encode() in director
    if {"targets", "snapshot", "timestamp"} & set(roles):
        with pytest.raises(EdgeoptError):
            publish(make_package(version="3"), repo, keys, now=noon)


def test_rotation_that_was_cut_anywhere_is_finished_by_the_same_command(
    make_package: MakePackage, noon: datetime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PowerCut(BaseException):
        pass

    package = make_package()
    real = Path.replace
    for cut in range(1, 20):
        keys, new, repo = (tmp_path / f"{name}{cut}" for name in ("keys", "new", "repo"))
        create_keys(keys)
        publish(package, repo, keys, now=noon)
        count = 0

        def replace(self: Path, target: Path, stop: int = cut) -> Path:
            nonlocal count
            count += 1
            if count == stop:
                raise PowerCut
            return real(self, target)

        request = RotationRequest(repo, (keys,), new, ("targets", "snapshot", "timestamp", "director"))
        monkeypatch.setattr(Path, "replace", replace)
        try:
            rotate(request, now=noon)
        except PowerCut:
            monkeypatch.setattr(Path, "replace", real)
            client_reads(repo, TINY1, tmp_path / f"client{cut}", noon)
            rotate(request, now=noon)
            client_reads(repo, TINY1, tmp_path / f"client{cut}", noon)
        else:
            monkeypatch.setattr(Path, "replace", real)
            assert cut == 6, "director, targets, snapshot, timestamp, root: five renames"
            return
    pytest.fail("the rotation never finished")


def test_what_cannot_be_is_refused_with_what_can(tmp_path: Path, noon: datetime) -> None:
    with pytest.raises(RecipeError, match="known are: root"):
        RotationRequest(tmp_path, (tmp_path,), tmp_path, ("mirrors",))
    with pytest.raises(RecipeError, match="--new"):
        RotationRequest(tmp_path, (tmp_path,), None, ("root",))
    with pytest.raises(RecipeError, match="rotation of root"):
        RotationRequest(tmp_path, (tmp_path,), tmp_path, ("timestamp",), root_keys=3)
    with pytest.raises(StoreError, match="is no repository"):
        rotate(RotationRequest(tmp_path, (tmp_path,)), now=noon)


@pytest.fixture
def shared(make_package: MakePackage, noon: datetime, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A repository, its owner's keys, and the key of team vision for the models vision-*."""
    keys, team, repo = tmp_path / "keys", tmp_path / "vision", tmp_path / "repo"
    create_keys(keys)
    publish(make_package(), repo, keys, now=noon)
    signers = {role: load_signer(keys, role) for role in ("targets", "snapshot", "timestamp")}
    from edgeopt.keys import create_key

    teams.delegate(
        Repository(repo, signers, noon), "vision", ("vision-*", "cats"), create_key(team, "vision")
    )
    return repo, keys, team


def test_team_signs_its_models_and_the_online_keys_show_them(
    shared: tuple[Path, Path, Path], make_package: MakePackage, noon: datetime, tmp_path: Path
) -> None:
    repo, keys, team = shared
    path = "models/vision-a/1/host.json"
    done = publish(make_package(name="vision-a"), repo, team, now=noon, team="vision")
    assert done.waits
    assert path not in Repository(repo, {}, noon).targets()
    with pytest.raises(AssertionError, match="not listed"):
        client_reads(repo, path, tmp_path / "client", noon)
    assert Repository(repo, online(keys), noon).freshen()
    assert not Repository(repo, online(keys), noon).freshen(), "nothing is new"
    assert client_reads(repo, path, tmp_path / "client", noon)
    assert path in Repository(repo, {}, noon).targets()
    again = publish(make_package(name="vision-a"), repo, (team, keys), now=noon, team="vision")
    assert not again.is_new
    second = publish(make_package(name="cats"), repo, (team, keys), now=noon, team="vision")
    assert not second.waits
    assert client_reads(repo, "models/cats/1/host.json", tmp_path / "client", noon)


@pytest.mark.parametrize("name", ["tiny", "visio", "vision", "cats2"])
def test_team_cannot_publish_anothers_model(
    shared: tuple[Path, Path, Path], make_package: MakePackage, noon: datetime, name: str
) -> None:
    repo, _, team = shared
    with pytest.raises(RecipeError, match=r"may sign models/vision-\*"):
        publish(make_package(name=name, version="9"), repo, team, now=noon, team="vision")


def test_what_a_team_signed_for_anothers_model_is_neither_taken_up_nor_believed(
    shared: tuple[Path, Path, Path], make_package: MakePackage, noon: datetime, tmp_path: Path
) -> None:
    """A team that writes the repository's files itself, with its own key and none of our checks."""
    repo, keys, team = shared
    store = Repository(repo, {**online(keys), "vision": load_signer(team, "vision")}, noon)
    mine: Any = store.newest("vision")
    store.put_targets(mine, {"models/tiny/9/host.json": b"a lie"})
    store.write_role("vision", mine)
    assert not store.freshen()
    store.sign_snapshot({"vision.json": mine.signed.version})  # an owner's mistake
    with pytest.raises(AssertionError, match="not listed"):
        client_reads(repo, "models/tiny/9/host.json", tmp_path / "client", noon)
    assert "models/tiny/9/host.json" not in store.targets()


def test_garbage_in_the_teams_place_is_written_over(
    shared: tuple[Path, Path, Path], make_package: MakePackage, noon: datetime, tmp_path: Path
) -> None:
    repo, keys, team = shared
    version = Repository(repo, {}, noon).newest("vision").signed.version
    thief = tmp_path / "thief"
    create_keys(thief)
    forged: Any = Repository(repo, {"vision": load_signer(thief, "targets")}, noon).newest("vision")
    forged.signed.version += 1
    Repository(repo, {"vision": load_signer(thief, "targets")}, noon).write_role("vision", forged)
    assert not Repository(repo, online(keys), noon).freshen()
    publish(make_package(name="cats"), repo, (team, keys), now=noon, team="vision")
    assert Repository(repo, {}, noon).newest("vision").signed.version == version + 1
    assert client_reads(repo, "models/cats/1/host.json", tmp_path / "client", noon)


def test_teams_key_is_replaced_and_revoked(
    shared: tuple[Path, Path, Path], make_package: MakePackage, noon: datetime, tmp_path: Path
) -> None:
    from edgeopt.keys import create_key

    repo, keys, team = shared
    publish(make_package(name="cats"), repo, (team, keys), now=noon, team="vision")
    signers = {role: load_signer(keys, role) for role in ("targets", "snapshot", "timestamp")}
    store = Repository(repo, signers, noon)
    teams.delegate(store, "vision", ("cats",), create_key(tmp_path / "vision-2", "vision"))
    with pytest.raises(TrustError, match="not the one of team vision"):
        publish(make_package(name="cats", version="2"), repo, team, now=noon, team="vision")
    publish(
        make_package(name="cats", version="2"), repo, (tmp_path / "vision-2", keys), now=noon, team="vision"
    )
    for version in "12":
        assert client_reads(repo, f"models/cats/{version}/host.json", tmp_path / "client", noon)
    teams.revoke(store, "vision")
    with pytest.raises(AssertionError, match="not listed"):
        client_reads(repo, "models/cats/1/host.json", tmp_path / "client", noon)
    with pytest.raises(RecipeError, match="no team"):
        teams.revoke(store, "vision")
    teams.delegate(store, "vision", ("cats",), create_key(tmp_path / "vision-3", "vision"))
    client_reads(repo, TINY1, tmp_path / "client", noon)
    assert "models/cats/1/host.json" not in store.targets(), "what was revoked does not come back"


@pytest.mark.parametrize(
    ("team", "models", "said"),
    [
        ("root", ("a",), "a team's name"),
        ("Vision", ("a",), "a team's name"),
        ("sound", (), "--models"),
        ("sound", ("a?",), "named exactly"),
        ("sound", ("*-a",), "named exactly"),
        ("sound", ("vision-big-*",), "overlap"),
        ("sound", ("v*",), "overlap"),
        ("sound", ("cats",), "overlap"),
        ("sound", ("*",), "overlap"),
    ],
)
def test_delegation_that_cannot_be_is_refused(
    shared: tuple[Path, Path, Path], noon: datetime, team: str, models: tuple[str, ...], said: str
) -> None:
    repo, keys, vision = shared
    signers = {role: load_signer(keys, role) for role in ("targets", "snapshot", "timestamp")}
    with pytest.raises(RecipeError, match=said):
        teams.delegate(Repository(repo, signers, noon), team, models, load_signer(vision, "vision"))


def test_publication_and_re_signing_at_the_same_moment_lose_nothing(
    make_package: MakePackage, noon: datetime, tmp_path: Path
) -> None:
    keys, repo = tmp_path / "keys", tmp_path / "repo"
    create_keys(keys)
    packages = [make_package(version=str(n)) for n in range(1, 9)]
    publish(packages[0], repo, keys, now=noon)
    failed: list[BaseException] = []
    done = threading.Event()

    def re_sign() -> None:
        days = 6
        while not done.is_set():
            try:
                Repository(repo, online(keys), noon + timedelta(days=days)).freshen()
            except EdgeoptError as error:
                failed.append(error)
            days += 6

    thread = threading.Thread(target=re_sign)
    thread.start()
    for package in packages[1:]:
        publish(package, repo, keys, now=noon)
    done.set()
    thread.join()
    assert not failed
    later = noon + timedelta(days=6)
    Repository(repo, online(keys), later).freshen()
    for version in range(1, 9):
        assert client_reads(repo, f"models/tiny/{version}/host.json", tmp_path / "client", noon)


def test_repository_that_somebody_holds_for_too_long_is_said(tmp_path: Path) -> None:
    with locked(tmp_path):
        started = time.monotonic()
        with pytest.raises(StoreError, match="another process has been writing"), locked(tmp_path, 0.2):
            pass
        assert time.monotonic() - started < 5
    with locked(tmp_path, 0.2):
        pass
