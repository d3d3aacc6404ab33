# SPDX-License-Identifier: Apache-2.0
import stat
from pathlib import Path

import pytest

from edgeopt.keys import BUILDER, PASSPHRASE_VARIABLE, ROLES, create_keys, key_path, load_signer
from edgeopt_wire.errors import RecipeError, StoreError, TrustError


@pytest.fixture(autouse=True)
def no_passphrase_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)


def test_each_role_has_its_own_key_that_only_its_owner_may_read(tmp_path: Path) -> None:
    made = create_keys(tmp_path / "keys")
    assert set(made) == {*ROLES, BUILDER}
    assert len(set(made.values())) == len(ROLES) + 1
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    for role in ROLES:
        assert stat.S_IMODE(key_path(tmp_path / "keys", role).stat().st_mode) == 0o600
        assert load_signer(tmp_path / "keys", role).public_key.keyid == made[role]


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    create_keys(tmp_path)
    before = {role: key_path(tmp_path, role).read_bytes() for role in ROLES}
    with pytest.raises(RecipeError, match="is there already"):
        create_keys(tmp_path)
    assert {role: key_path(tmp_path, role).read_bytes() for role in ROLES} == before


def test_one_old_key_is_enough_to_make_none(tmp_path: Path) -> None:
    key_path(tmp_path, "snapshot").write_bytes(b"an old key")
    with pytest.raises(RecipeError, match=r"snapshot\.pem"):
        create_keys(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot.pem"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_key_that_others_may_read_is_refused_with_the_command_that_mends_it(
    tmp_path: Path, mode: int
) -> None:
    create_keys(tmp_path)
    path = key_path(tmp_path, "targets")
    path.chmod(mode)
    with pytest.raises(StoreError, match=f"{mode:04o}.*chmod 600 {path}"):
        load_signer(tmp_path, "targets")
    path.chmod(0o600)
    load_signer(tmp_path, "targets")


def test_missing_key_says_how_to_make_keys(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"edgeopt keys create {tmp_path}"):
        load_signer(tmp_path, "root")


def test_passphrase_comes_from_the_environment_or_from_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = create_keys(tmp_path, "correct horse")
    assert b"ENCRYPTED" in key_path(tmp_path, "root").read_bytes()
    asked = load_signer(tmp_path, "root", lambda path: "correct horse")
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "correct horse")
    assert load_signer(tmp_path, "root").public_key.keyid == asked.public_key.keyid == made["root"]


def test_no_passphrase_and_nobody_to_ask_names_the_variable(tmp_path: Path) -> None:
    create_keys(tmp_path, "secret")
    with pytest.raises(TrustError, match=PASSPHRASE_VARIABLE):
        load_signer(tmp_path, "root")


def test_wrong_passphrase_is_no_traceback(tmp_path: Path) -> None:
    create_keys(tmp_path, "secret")
    with pytest.raises(TrustError, match="wrong passphrase"):
        load_signer(tmp_path, "root", lambda path: "guess")


def test_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    create_keys(tmp_path)
    key_path(tmp_path, "root").write_bytes(b"not a key")
    with pytest.raises(TrustError, match=r"root\.pem cannot be opened"):
        load_signer(tmp_path, "root")
