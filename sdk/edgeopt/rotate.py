# SPDX-License-Identifier: Apache-2.0
"""Replacing signing keys: after a theft, a loss, or because a year is over. Devices follow without being touched.

Rules:
- Every root is signed by a majority of the keys of the one before and of its own (The Update Framework, 6.1), so that a
  device that slept through several rotations walks the chain.
- New keys are made before the repository is touched, and in another folder: what is interrupted is begun again with the
  same command, and takes the keys that are there.
- What a new key signs is signed by the old one as well where it is at hand, and the root comes last: a device that asks
  in between believes either.
- A thief may have signed versions, revisions or moments far ahead. Where the keys of timestamp and snapshot, or of the
  director, are replaced, devices count again from what the owner signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.keys import ROLES, Ask, ensure_key, find_signer, root_signers
from edgeopt.publish import director_document
from edgeopt.repository import DIRECTOR_TARGET, Repository, majority
from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.errors import RecipeError, StoreError, TrustError

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

ONLINE = ("snapshot", "timestamp")


@dataclass(frozen=True)
class Rotation:
    """What a rotation left: the root's version and end, and the ids of the new keys by role."""

    root_version: int
    root_expires: datetime
    root_threshold: int
    root_keys: tuple[str, ...]
    replaced: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class RotationRequest:
    """Which roles get new keys. None of them: the same keys sign the next root for another year.

    `keys` are the folders that hold the old keys, each searched for what it has; `new` gets the new ones. `root_keys` is
    how many root keys there are from now on (0: as many as before).
    """

    repository: Path
    keys: tuple[Path, ...]
    new: Path | None = None
    roles: tuple[str, ...] = ()
    root_keys: int = 0
    passphrase: str = ""

    def __post_init__(self) -> None:
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown:
            raise RecipeError(f"{unknown[0]!r} is no role; known are: {', '.join(ROLES)}")
        if self.roles and self.new is None:
            raise RecipeError("say with --new in which folder the new keys are to be made")
        if self.root_keys and "root" not in self.roles:
            raise RecipeError("--root-keys is for a rotation of root")


def rotate(request: RotationRequest, *, now: datetime, ask: Ask | None = None) -> Rotation:
    """Replace keys and sign what they sign again; needs a majority of the root keys.

    A rotation of the director alone needs the keys of targets, snapshot and timestamp, and no root key.

    Raises:
        RecipeError: The request cannot be.
        TrustError: Too few root keys are there, or a key is none of this repository's.
        StoreError: A key or the repository cannot be read or written.
    """
    folders = ((request.new,) if request.new else ()) + request.keys
    repository = Repository(request.repository, {}, now)
    if not repository.exists:
        raise StoreError(f"{request.repository} is no repository; publish a package first")
    with repository.held():
        root: Any = repository.newest("root")
        old_roots = _old_roots(root, request, ask) if set(request.roles) != {"director"} else ()
        fresh = _new_signers(root, request)
        signed = {"targets", "director", *ONLINE} & set(request.roles)
        if signed:
            repository.signers = _signers(root, fresh, folders, signed, ask)
            _sign_again(repository, root, request, fresh, ask)
        if old_roots:
            _next_root(repository, root, fresh, old_roots)
        roles = root.signed.roles["root"]
        return Rotation(
            root.signed.version,
            root.signed.expires,
            roles.threshold,
            tuple(roles.keyids),
            {role: tuple(s.public_key.keyid for s in made) for role, made in fresh.items()},
        )


def _old_roots(root: Any, request: RotationRequest, ask: Ask | None) -> tuple[Signer, ...]:
    known = root.signed.roles["root"]
    found = {
        signer.public_key.keyid: signer
        for signer in root_signers(request.keys, ask)
        if signer.public_key.keyid in known.keyids
    }
    if len(found) < known.threshold:
        listed = ", ".join(str(folder) for folder in request.keys)
        raise TrustError(
            f"{known.threshold} of the {len(known.keyids)} root keys must sign, {len(found)} of them are in {listed}; "
            "give every folder that has one with another --keys"
        )
    return tuple(found.values())


def _new_signers(root: Any, request: RotationRequest) -> dict[str, tuple[Signer, ...]]:
    fresh: dict[str, tuple[Signer, ...]] = {}
    for role in request.roles:
        assert request.new is not None, "the request was checked"
        count = (request.root_keys or len(root.signed.roles["root"].keyids)) if role == "root" else 1
        fresh[role] = tuple(
            ensure_key(request.new, role, number, request.passphrase) for number in range(1, count + 1)
        )
    return fresh


def _signers(
    root: Any,
    fresh: dict[str, tuple[Signer, ...]],
    folders: Sequence[Path],
    signed: set[str],
    ask: Ask | None,
) -> dict[str, Signer]:
    """Who signs from now on: the new key of a role, else the one that the root names."""
    needed = [*ONLINE, *(["targets"] if signed & {"targets", "director"} else [])]
    found = {}
    for role in needed:
        named = root.signed.roles[role].keyids
        found[role] = fresh[role][0] if role in fresh else find_signer(folders, role, named, ask)
    return found


def _sign_again(
    repository: Repository,
    root: Any,
    request: RotationRequest,
    fresh: dict[str, tuple[Signer, ...]],
    ask: Ask | None,
) -> None:
    """Targets where they or the director changed, then snapshot and timestamp, by new and old keys."""
    old: dict[str, list[Signer]] = {}
    for role in ("targets", *ONLINE):
        if role in fresh:
            try:
                old[role] = [find_signer(request.keys, role, root.signed.roles[role].keyids, ask)]
            except StoreError:
                old[role] = []  # lost: devices that have not seen the new root yet ask again a moment later
    versions = {}
    if "targets" in repository.signers:
        targets: Any = repository.newest("targets")
        news = {}
        if "director" in fresh:
            news[DIRECTOR_TARGET] = canonical_bytes(director_document(fresh["director"][0]))
        repository.put_targets(targets, news)
        repository.write_role("targets", targets, (repository.signers["targets"], *old.get("targets", ())))
        versions["targets.json"] = targets.signed.version
    repository.sign_snapshot(versions, old)


def _next_root(
    repository: Repository, root: Any, fresh: dict[str, tuple[Signer, ...]], old_roots: Sequence[Signer]
) -> None:
    for role, made in fresh.items():
        if role == "director":
            continue
        for keyid in list(root.signed.roles[role].keyids):
            root.signed.revoke_key(keyid, role)
        for signer in made:
            root.signed.add_key(signer.public_key, role)
    if "root" in fresh:
        root.signed.roles["root"].threshold = majority(len(fresh["root"]))
    root.signed.version += 1
    root.signed.expires = repository.expires("root")
    mine = fresh.get("root", ())
    known = {signer.public_key.keyid for signer in mine}
    others = [signer for signer in old_roots if signer.public_key.keyid not in known]
    repository.write_role("root", root, (*mine, *others))
