# SPDX-License-Identifier: Apache-2.0
"""How a package came to be: stated in it, repeatable, checked offline, and impossible to carry to another package."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from publishing import write_package
from securesystemslib.dsse import Envelope

from edgeopt.cli.inspect import command as inspect_command
from edgeopt.cli.verify import command as verify_command
from edgeopt.keys import create_keys, load_signer
from edgeopt.provenance import (
    BUILD_TYPE,
    PAYLOAD_TYPE,
    PREDICATE_TYPE,
    PROVENANCE_PATH,
    STATEMENT_TYPE,
    envelope,
    load_builder,
    read_provenance,
)
from edgeopt.recipe import Recipe
from edgeopt_wire.archive import PackageReader, write_archive
from edgeopt_wire.document import canonical_bytes, to_bytes
from edgeopt_wire.errors import StoreError, TrustError
from edgeopt_wire.manifest import FileEntry, Manifest, Provenance

Make = Callable[..., Path]
RECIPE = Recipe(labels="/data/secret/labels.txt", precisions=("int8",))
KNOWN = Provenance("a1" * 32, RECIPE.digest(), "c3" * 32, "", {"edgeopt": "0.1.0", "onnx": "1.23.2"})


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("builder") / "keys"
    create_keys(folder)
    return folder


@pytest.fixture
def make(tmp_path: Path, keys: Path) -> Make:
    """Pack a null model with its statement; `spoil` may change the envelope or the manifest after it was made."""

    def build(
        name: str = "a",
        *,
        sign: bool = True,
        gain: float = 1.0,
        spoil: Callable[[bytes], bytes] = lambda raw: raw,
        spoil_manifest: Callable[[Manifest], Manifest] = lambda manifest: manifest,
    ) -> Path:
        stage = tmp_path / f"stage-{name}"
        manifest = replace(write_package(stage, {"a": {"gain": gain}}), provenance=KNOWN)
        raw = spoil(envelope(manifest, RECIPE, load_signer(keys, "builder") if sign else None))
        entry = FileEntry(PROVENANCE_PATH, len(raw), hashlib.sha256(raw).hexdigest())
        files = tuple(sorted((*manifest.files, entry), key=lambda e: e.path))
        members: dict[str, Any] = {e.path: stage / e.path for e in manifest.files}
        packed = to_bytes(spoil_manifest(replace(manifest, files=files)))
        path = tmp_path / f"{name}.edgeopt"
        with path.open("w+b") as file:
            write_archive(file, {**members, PROVENANCE_PATH: raw, "manifest.json": packed})
        return path

    return build


def read(package: Path, *builders: Path) -> Any:
    with PackageReader(package) as reader:
        reader.verify()
        return read_provenance(reader, [load_builder(path) for path in builders])


def test_statement_has_the_form_of_in_toto_and_slsa(make: Make, keys: Path) -> None:
    with PackageReader(make()) as reader:
        raw, manifest = reader.read(PROVENANCE_PATH), reader.manifest
    found = Envelope.from_dict(json.loads(raw))
    statement = json.loads(found.payload)
    assert (found.payload_type, statement["_type"]) == (PAYLOAD_TYPE, STATEMENT_TYPE)
    assert statement["predicateType"] == PREDICATE_TYPE
    assert set(statement) == {"_type", "subject", "predicateType", "predicate"}
    build, run = (statement["predicate"][key] for key in ("buildDefinition", "runDetails"))
    assert build["buildType"] == BUILD_TYPE
    assert build["externalParameters"]["recipe"]["precisions"] == ["int8"]
    assert {"uri": "pkg:pypi/onnx@1.23.2"} in build["resolvedDependencies"]
    assert {"name": "source model", "digest": {"sha256": "a1" * 32}} in build["resolvedDependencies"]
    assert run["builder"]["id"].endswith(load_signer(keys, "builder").public_key.keyid)
    subjects = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
    assert {e.path: e.sha256 for e in manifest.files if e.path != PROVENANCE_PATH}.items() <= subjects.items()


def test_two_equal_builds_are_the_same_bytes_signature_included(make: Make) -> None:
    assert make("a").read_bytes() == make("b").read_bytes()


def test_folders_of_the_builders_machine_are_nobodys_business(make: Make) -> None:
    assert b"secret" not in json.dumps(dict(read(make()).statement)).encode()
    assert read(make("b")).statement["predicate"]["buildDefinition"]["externalParameters"]["recipe"][
        "labels"
    ] == ("labels.txt")


def test_builder_that_signed_is_verified_and_another_one_is_not(
    make: Make, keys: Path, tmp_path: Path
) -> None:
    keyid = load_signer(keys, "builder").public_key.keyid
    assert read(make(), keys).verified == (keyid,)
    create_keys(tmp_path / "others")
    assert read(make("b"), tmp_path / "others", keys / "builder.pub").verified == (keyid,)
    with pytest.raises(TrustError, match=f"signed by {keyid[:12]}, and by none of the builders"):
        read(make("c"), tmp_path / "others")


def test_unsigned_statement_is_read_and_passes_for_nobodys(make: Make, keys: Path) -> None:
    package = make(sign=False)
    found = read(package)
    assert (found.signed_by, found.verified, found.builder) == ((), (), "urn:edgeopt:builder:unsigned")
    with pytest.raises(TrustError, match="signed by nobody"):
        read(package, keys)


def test_statement_of_another_package_is_refused(make: Make, keys: Path) -> None:
    with PackageReader(make("one", gain=2.0)) as reader:
        other = reader.read(PROVENANCE_PATH)
    with pytest.raises(TrustError, match="speaks of another"):
        read(make("two", gain=1.0, spoil=lambda raw: other), keys)


def test_changed_manifest_is_refused(make: Make, keys: Path) -> None:
    package = make(spoil_manifest=lambda manifest: replace(manifest, version="99"))
    with pytest.raises(TrustError, match=r"another 'manifest\.json"):
        read(package, keys)


def payload_changed(raw: bytes) -> bytes:
    """Another builder's name in a statement whose signature stays."""
    document = json.loads(raw)
    found = Envelope.from_dict(document)
    payload = found.payload.replace(b"onnx@1.23.2", b"onnx@1.23.9")
    assert payload != found.payload
    return canonical_bytes({**Envelope(payload, PAYLOAD_TYPE, found.signatures).to_dict()})


def test_changed_statement_breaks_its_signature(make: Make, keys: Path) -> None:
    with pytest.raises(TrustError, match="none of the builders"):
        read(make(spoil=payload_changed), keys)


@pytest.mark.parametrize(
    "garbage",
    [
        b"{}",
        b"[]",
        b"\xff",
        b'{"payload": "e30=", "payloadType": "x", "signatures": []}',
        b'{"payload": "!", "payloadType": "application/vnd.in-toto+json", "signatures": []}',
    ],
)
def test_garbage_is_refused_with_our_own_error(make: Make, garbage: bytes) -> None:
    with pytest.raises(TrustError):
        read(make(spoil=lambda raw: garbage))


def test_package_without_a_statement_says_so_and_is_refused_where_one_is_asked_for(
    tmp_path: Path, keys: Path
) -> None:
    stage = tmp_path / "old"
    manifest = write_package(stage, {"a": {}})
    package = tmp_path / "old.edgeopt"
    with package.open("w+b") as file:
        write_archive(
            file, {"manifest.json": to_bytes(manifest), **{e.path: stage / e.path for e in manifest.files}}
        )
    assert read(package) is None
    with pytest.raises(TrustError, match="--sign-with"):
        read(package, keys)


def test_builder_key_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"builder\.pub"):
        load_builder(tmp_path)
    (tmp_path / "builder.pub").write_text('{"keyid": "x"}')
    with pytest.raises(TrustError, match="no public key"):
        load_builder(tmp_path)


def test_verify_and_inspect_say_who_signed(make: Make, keys: Path) -> None:
    package = str(make())
    keyid = load_signer(keys, "builder").public_key.keyid
    run = CliRunner()
    said = run.invoke(verify_command, [package, "--builder", str(keys), "--json"])
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["provenance"]["verified_by"] == [keyid]
    shown = run.invoke(inspect_command, [package])
    assert "says that" in shown.stdout
    assert "edgeopt verify --builder" in shown.stdout
    assert json.loads(run.invoke(inspect_command, [package, "--json"]).stdout)["provenance"]["signed_by"] == [
        keyid
    ]
