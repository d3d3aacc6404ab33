# SPDX-License-Identifier: Apache-2.0
"""How a package came to be, as a statement that anybody can check offline: in-toto, SLSA provenance, in a DSSE envelope.

Rules:
- The statement stands in the package (`provenance.intoto.json`). Its subjects are every other file by its SHA-256 and
  the manifest without the statement's own line, so that nothing of the package is left out.
- It repeats: no moment, no host, no path, and Ed25519 signatures of the same bytes by the same key are the same. Two
  equal builds by one builder are the same package.
- Who may build is for whoever checks to say: a builder's public key. A statement that nobody signed says so.

Sources: in-toto Attestation Framework, Statement v1; SLSA provenance v1 (buildDefinition, runDetails); DSSE.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from edgeopt.recipe import Recipe
from edgeopt_wire.archive import PackageReader
from edgeopt_wire.document import canonical_bytes, parse_json, to_bytes, to_json
from edgeopt_wire.errors import DocumentError, StoreError, TrustError
from edgeopt_wire.manifest import Manifest

if TYPE_CHECKING:
    from securesystemslib.signer import Key, Signer

PROVENANCE_PATH = "provenance.intoto.json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:edgeopt:build:1"
UNSIGNED_BUILDER = "urn:edgeopt:builder:unsigned"
MAX_PROVENANCE_BYTES = 128 * 1024
"""Room that is asked for on devices: a statement has about 120 bytes for each of at most 1,000 files."""

MANIFEST_SUBJECT = "manifest.json, without the line of provenance.intoto.json"


@dataclass(frozen=True)
class Provenance:
    """A statement that was read: who signed it (key ids), and what it says. `verified` by which of the keys given."""

    statement: Mapping[str, Any]
    signed_by: tuple[str, ...]
    verified: tuple[str, ...] = ()

    @property
    def builder(self) -> str:
        """The builder's id."""
        return str(self.statement["predicate"]["runDetails"]["builder"]["id"])


def envelope(manifest: Manifest, recipe: Recipe, signer: Signer | None = None) -> bytes:
    """The bytes of the statement about a package whose manifest lists every file but the statement, signed if wanted."""
    from securesystemslib.dsse import Envelope

    payload = canonical_bytes(_statement(manifest, recipe, signer.public_key.keyid if signer else ""))
    found = Envelope(payload, PAYLOAD_TYPE, {})
    if signer is not None:
        found.sign(signer)
    return canonical_bytes(found.to_dict())


def read_provenance(package: PackageReader, builders: Sequence[Key] = ()) -> Provenance | None:
    """Read a package's statement, None if it has none; with `builders`, one of these keys must have signed it.

    Raises:
        TrustError: It does not speak of this package, or none of the builders signed it.
    """
    if PROVENANCE_PATH not in {entry.path for entry in package.manifest.files}:
        if builders:
            raise TrustError(f"{package.path} has no statement of provenance; build it with --sign-with")
        return None
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import FormatError, VerificationError

    raw = package.read(PROVENANCE_PATH)
    try:
        found = Envelope.from_dict(parse_json(raw, PROVENANCE_PATH))
        statement = parse_json(found.payload, "statement of provenance")
        _check_form(found.payload_type, statement)
        _check_subjects(package.manifest, statement)
        accepted = {}
        for key in builders:
            try:
                accepted.update(found.verify([key], 1))
            except VerificationError:
                continue
    except (KeyError, ValueError, TypeError, AttributeError, FormatError) as error:
        raise TrustError(f"{package.path}: its statement of provenance cannot be read: {error}") from error
    if builders and not accepted:
        signers = ", ".join(keyid[:12] for keyid in found.signatures) or "nobody"
        raise TrustError(
            f"{package.path}: its provenance is signed by {signers}, and by none of the builders that were given"
        )
    return Provenance(statement, tuple(found.signatures), tuple(accepted))


def load_builder(path: Path) -> Key:
    """Read a builder's public key, as `edgeopt keys create` wrote it (`builder.pub`).

    Raises:
        StoreError: It cannot be read.
        TrustError: It is none.
    """
    from securesystemslib.exceptions import FormatError
    from securesystemslib.signer import Key

    file = path / "builder.pub" if path.is_dir() else path
    try:
        document = json.loads(file.read_bytes())
        return Key.from_dict(document.pop("keyid"), document)
    except OSError as error:
        raise StoreError(f"cannot read the builder's public key {file}: {error.strerror}") from error
    except (KeyError, ValueError, TypeError, AttributeError, FormatError) as error:
        raise TrustError(f"{file} is no public key of a builder: {error}") from error


def _statement(manifest: Manifest, recipe: Recipe, keyid: str) -> dict[str, Any]:
    known = manifest.provenance
    materials = {
        "source model": known.source_sha256,
        "calibration data": known.calibration_sha256,
        "evaluation data": known.evaluation_sha256,
    }
    return {
        "_type": STATEMENT_TYPE,
        "subject": _subjects(manifest),
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "model": manifest.name,
                    "version": manifest.version,
                    "device": manifest.device,
                    "recipe": _without_folders(to_json(recipe)),
                    "recipe_sha256": known.recipe_sha256,
                },
                "resolvedDependencies": [
                    *({"name": n, "digest": {"sha256": d}} for n, d in materials.items() if d),
                    *(
                        {"uri": f"pkg:pypi/{tool}@{quote(version)}"}
                        for tool, version in sorted(known.tools.items())
                    ),
                ],
            },
            "runDetails": {
                "builder": {
                    "id": f"urn:edgeopt:builder:{keyid}" if keyid else UNSIGNED_BUILDER,
                    "version": {"edgeopt": known.tools.get("edgeopt", "")},
                }
            },
        },
    }


def _subjects(manifest: Manifest) -> list[dict[str, Any]]:
    others = tuple(entry for entry in manifest.files if entry.path != PROVENANCE_PATH)
    rest = hashlib.sha256(to_bytes(replace(manifest, files=others))).hexdigest()
    found = [{"name": entry.path, "digest": {"sha256": entry.sha256}} for entry in others]
    return [*found, {"name": MANIFEST_SUBJECT, "digest": {"sha256": rest}}]


def _check_form(payload_type: str, statement: Mapping[str, Any]) -> None:
    said = (payload_type, statement["_type"], statement["predicateType"])
    definition = statement["predicate"]["buildDefinition"]
    if said != (PAYLOAD_TYPE, STATEMENT_TYPE, PREDICATE_TYPE) or definition["buildType"] != BUILD_TYPE:
        raise DocumentError(f"{', '.join(map(str, said))} with build type {definition['buildType']!r}")
    str(statement["predicate"]["runDetails"]["builder"]["id"])


def _check_subjects(manifest: Manifest, statement: Mapping[str, Any]) -> None:
    said = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
    true = {entry["name"]: entry["digest"]["sha256"] for entry in _subjects(manifest)}
    if said != true:
        odd = sorted(name for name in said.keys() | true.keys() if said.get(name) != true.get(name))
        raise DocumentError(f"it speaks of another {odd[0]!r} than this package has")


def _without_folders(recipe: Any) -> Any:
    """The recipe's values; files by their names, since a builder's folders are nobody's business."""
    if isinstance(recipe, dict):
        return {key: _without_folders(value) for key, value in recipe.items()}
    if isinstance(recipe, list):
        return [_without_folders(value) for value in recipe]
    return PurePath(recipe).name if isinstance(recipe, str) and "/" in recipe else recipe
