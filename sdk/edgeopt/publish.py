# SPDX-License-Identifier: Apache-2.0
"""Publishing a package: check every byte, put it into the signed repository, never change what was published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from edgeopt.delta.publishing import published_deltas
from edgeopt.keys import Ask, find_signer, key_path, root_signers
from edgeopt.needs import needs
from edgeopt_wire.archive import PackageReader
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import RecipeError, StoreError
from edgeopt_wire.index import PackageIndex, index_of, target_path

DELTAS = 3
"""Versions back that deltas are made from: who is further behind pulls the package."""

DIRECTOR_SCHEMA = "edgeopt.director/1"
ONLINE = ("snapshot", "timestamp")


@dataclass(frozen=True)
class Published:
    """What stands in the repository now; `is_new` is false where the very same package stood there before.

    `waits`: a team signed it, and devices see it when the snapshot is signed next (`edgeopt fleet up` does within a
    minute).
    """

    index: PackageIndex
    target: str
    is_new: bool
    waits: bool = False


def publish(
    package: Path,
    repository: Path,
    keys: Path | Sequence[Path],
    *,
    now: datetime,
    ask: Ask | None = None,
    team: str = "",
    deltas: int = DELTAS,
) -> Published:
    """Verify `package` and publish it into the repository folder, which is made if it is not there.

    `keys` are folders of signing keys, the first that has one counts. A `team` signs its own models with its own key;
    where the snapshot and timestamp keys are not at hand, the package waits for whoever has them. `deltas` is from how
    many earlier versions of the model devices may come by what differs.

    Raises:
        RecipeError: This version was published with other bytes, or is not the team's.
        TrustError: The package is damaged.
        StoreError: A key is missing or readable by others, or the disk refused.
    """
    from edgeopt.repository import Repository

    with PackageReader(package) as reader:
        digest = reader.verify()
        manifest = reader.manifest
    index = index_of(
        package,
        name=manifest.name,
        version=manifest.version,
        device=manifest.device,
        compatible=needs(manifest, package, digest),
    )
    folders = (keys,) if isinstance(keys, Path) else tuple(keys)
    target = target_path(index.name, index.version, index.device)
    if team:
        return _publish_as_team(
            Repository(repository, {}, now), folders, team, index, package, ask=ask, deltas=deltas
        )
    roles = ("targets", "snapshot", "timestamp")
    store = Repository(repository, {role: find_signer(folders, role, (), ask) for role in roles}, now)
    first = None if store.exists else _first_keys(folders, ask)
    with store.held():
        if store.exists:
            named = store.newest("root").signed.roles
            store.signers = {role: find_signer(folders, role, named[role].keyids, ask) for role in roles}
        elif first:
            store.create(director_document(first[0]), first[1])
        if target in store.targets():
            _check_same(store.read_target(target), index, target)
            return Published(index, target, is_new=False)
        with published_deltas(store, index, package, deltas) as (listed, blobs):
            store.add({target: to_bytes(listed)}, {index.sha256: package, **blobs})
    return Published(listed, target, is_new=True)


def _first_keys(folders: Sequence[Path], ask: Ask | None) -> tuple[Any, tuple[Any, ...]]:
    """The director's key and every root key: what only the first publication needs."""
    find_signer(folders, "root", (), ask)
    return find_signer(folders, "director", (), ask), root_signers(folders, ask)


def _publish_as_team(
    store: Any,
    folders: Sequence[Path],
    team: str,
    index: PackageIndex,
    package: Path,
    *,
    ask: Ask | None,
    deltas: int,
) -> Published:
    from edgeopt.teams import add_as_team, newest_of_team

    if not store.exists:
        raise StoreError(f"{store.folder} is no repository; its owner publishes first")
    target = target_path(index.name, index.version, index.device)
    signer = find_signer(folders, team, (), ask)
    with store.held():
        named = store.newest("root").signed.roles
        if all(any(key_path(folder, role).exists() for folder in folders) for role in ONLINE):
            store.signers = {role: find_signer(folders, role, named[role].keyids, ask) for role in ONLINE}
        targets = store.newest("targets")
        known = targets.signed.delegations.roles if targets.signed.delegations else {}
        signed = {**newest_of_team(store, targets, team).signed.targets} if team in known else {}
        if target in signed:
            _check_same(store.read_small(target, signed[target].hashes["sha256"]), index, target)
            return Published(index, target, is_new=False)
        with published_deltas(store, index, package, deltas) as (listed, blobs):
            store.keep_blobs({index.sha256: package, **blobs})
            shown = add_as_team(store, team, signer, {target: to_bytes(listed)})
    return Published(listed, target, is_new=True, waits=not shown)


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
