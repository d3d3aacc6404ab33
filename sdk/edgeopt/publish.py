# SPDX-License-Identifier: Apache-2.0
"""Publishing a package: check every byte, put it into the signed repository, never change what was published."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from edgeopt.keys import Ask, load_signer
from edgeopt_wire.archive import PackageReader
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.index import PackageIndex, index_of, target_path

DIRECTOR_SCHEMA = "edgeopt.director/1"


@dataclass(frozen=True)
class Published:
    """What stands in the repository now; `is_new` is false where the very same package stood there before."""

    index: PackageIndex
    target: str
    is_new: bool


def publish(
    package: Path, repository: Path, keys: Path, *, now: datetime, ask: Ask | None = None
) -> Published:
    """Verify `package` and publish it into the repository folder, which is made if it is not there.

    Raises:
        RecipeError: This version was published with other bytes.
        TrustError: The package is damaged.
        StoreError: A key is missing or readable by others, or the disk refused.
    """
    from edgeopt.repository import Repository

    with PackageReader(package) as reader:
        reader.verify()
        manifest = reader.manifest
    index = index_of(
        package,
        name=manifest.name,
        version=manifest.version,
        device=manifest.device,
        compatible=manifest.compatible,
    )
    roles = ("targets", "snapshot", "timestamp")
    signers = {role: load_signer(keys, role, ask) for role in roles}
    target = target_path(index.name, index.version, index.device)
    store = Repository(repository, signers, now)
    if not store.exists:
        signers["root"] = load_signer(keys, "root", ask)
        store.create(director_document(load_signer(keys, "director", ask)))
    if target in store.targets():
        _check_same(store.read_target(target), index, target)
        return Published(index, target, is_new=False)
    store.add({target: to_bytes(index)}, {index.sha256: package})
    return Published(index, target, is_new=True)


def director_document(signer: Any) -> dict[str, Any]:
    """The signed target that says whose `desired` documents devices follow."""
    key = signer.public_key
    return {"schema": DIRECTOR_SCHEMA, "threshold": 1, "keys": {key.keyid: key.to_dict()}}


def _check_same(raw: bytes, index: PackageIndex, target: str) -> None:
    known = from_bytes(PackageIndex, raw)
    if known.sha256 != index.sha256:
        raise RecipeError(
            f"{target} was published with other bytes (sha256 {known.sha256[:12]}, this one {index.sha256[:12]}); "
            "devices may run it already: give the package another version"
        )
