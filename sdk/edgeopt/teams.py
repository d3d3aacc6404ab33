# SPDX-License-Identifier: Apache-2.0
"""Teams that sign their own models and no others: delegated targets roles of The Update Framework.

Rules:
- The targets key says which models are a team's: exact names, or a beginning with `*` at its end. Two teams' models do
  not overlap, so that who signs a model is never a matter of order.
- A team's key signs `N.<team>.json` and nothing else; it can neither hide others' packages nor move devices. What it
  signed counts once the snapshot lists it, which needs no secret of the team.
- What lies in the folder is believed by nobody before it is checked: signature, version, paths, date.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from edgeopt.repository import Repository
from edgeopt_wire.errors import RecipeError, StoreError, TrustError

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

_log = logging.getLogger(__name__)

RESERVED = ("root", "targets", "snapshot", "timestamp", "director", "builder", "mirrors")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_MODELS = re.compile(r"[a-z0-9][a-z0-9._-]*\*?|\*")


def delegate(repository: Repository, team: str, models: Sequence[str], signer: Signer) -> None:
    """Let a team sign its own models; called again, it replaces the team's key or its models.

    The repository's signers must hold the keys of targets, snapshot and timestamp.

    Raises:
        RecipeError: A name that cannot be, or models that are another team's.
        TrustError: A key is none of this repository's.
    """
    from tuf.api.metadata import (  # type: ignore[attr-defined]
        DelegatedRole,
        Delegations,
        Metadata,
        Targets,
    )

    check(team, models)
    with repository.held():
        repository.check_signers("targets", "snapshot", "timestamp")
        targets: Any = repository.newest("targets")
        if targets.signed.delegations is None:
            targets.signed.delegations = Delegations({}, {})
        delegations = targets.signed.delegations
        _refuse_overlap(delegations.roles, team, models)
        before = delegations.roles.pop(team, None)
        key = signer.public_key
        delegations.roles[team] = DelegatedRole(
            team, [key.keyid], 1, terminating=True, paths=[f"models/{name}/*/*" for name in models]
        )
        delegations.keys[key.keyid] = key
        _forget_unused(delegations)
        repository.put_targets(targets, {})
        own = repository.newest(team) if before is not None else _gone(repository, team)
        mine: Any = own or Metadata(Targets(expires=repository.expires("targets")))
        if own is not None:
            repository.put_targets(mine, {})
        role = delegations.roles[team]
        mine.signed.targets = {p: i for p, i in mine.signed.targets.items() if role.is_delegated_path(p)}
        repository.write_role(team, mine, (signer,))
        repository.write_role("targets", targets)
        repository.sign_snapshot(
            {"targets.json": targets.signed.version, f"{team}.json": mine.signed.version}
        )


def revoke(repository: Repository, team: str) -> None:
    """Take a team's models from it: what it signed counts no more, and what devices run goes on.

    Raises:
        RecipeError: There is no such team.
        TrustError: A key is none of this repository's.
    """
    with repository.held():
        repository.check_signers("targets", "snapshot", "timestamp")
        targets: Any = repository.newest("targets")
        known = _teams(targets)
        if team not in known:
            raise RecipeError(f"there is no team {team!r}; known are: {', '.join(sorted(known)) or 'none'}")
        del targets.signed.delegations.roles[team]
        _forget_unused(targets.signed.delegations)
        repository.put_targets(targets, {})
        repository.write_role("targets", targets)
        repository.sign_snapshot({"targets.json": targets.signed.version})


def add_as_team(repository: Repository, team: str, signer: Signer, additions: Mapping[str, bytes]) -> bool:
    """Sign targets as a team; say whether devices see them already, or wait for the holder of the snapshot key.

    Raises:
        RecipeError: There is no such team, or a path is not of its models.
        TrustError: The key is not the team's.
    """
    with repository.held():
        targets: Any = repository.newest("targets")
        role = _teams(targets).get(team)
        if role is None:
            raise RecipeError(
                f"{repository.folder} knows no team {team!r}; make it with `edgeopt keys delegate`"
            )
        if signer.public_key.keyid not in role.keyids:
            raise TrustError(
                f"the key {signer.public_key.keyid[:12]} is not the one of team {team}, {role.keyids[0][:12]}"
            )
        for path in additions:
            if not role.is_delegated_path(path):
                raise RecipeError(f"team {team} may sign {', '.join(role.paths)}, and not {path}")
        metadata = newest_of_team(repository, targets, team)
        repository.put_targets(metadata, additions)
        repository.write_role(team, metadata, (signer,))
        if not {"snapshot", "timestamp"} <= set(repository.signers):
            return False
        repository.check_signers("snapshot", "timestamp")
        repository.sign_snapshot(pending(repository))
        return True


def pending(repository: Repository) -> dict[str, int]:
    """What teams have signed beyond what the snapshot lists, checked: file name -> version."""
    targets: Any = repository.newest("targets")
    snapshot: Any = repository.newest("snapshot")
    found = {}
    for team in _teams(targets):
        newest: Any = newest_of_team(repository, targets, team)
        listed = snapshot.signed.meta.get(f"{team}.json")
        if listed is not None and newest.signed.version > listed.version:
            found[f"{team}.json"] = int(newest.signed.version)
    return found


def team_targets(repository: Repository) -> dict[str, Any]:
    """Every target that a team signed within its models and the snapshot lists: path -> python-tuf's `TargetFile`."""
    targets: Any = repository.newest("targets")
    found: dict[str, Any] = {}
    for team, role in _teams(targets).items():
        metadata: Any = repository.newest(team)
        found.update(
            {path: info for path, info in metadata.signed.targets.items() if role.is_delegated_path(path)}
        )
    return found


def newest_of_team(repository: Repository, targets: Any, team: str) -> Any:
    """The team's newest metadata that holds: what the snapshot lists, or a later version that it signed since."""
    metadata: Any = repository.newest(team)
    while (following := _following(repository, targets, team, metadata.signed.version + 1)) is not None:
        metadata = following
    return metadata


def _following(repository: Repository, targets: Any, team: str, version: int) -> Any:
    from tuf.api.exceptions import RepositoryError

    try:
        metadata: Any = repository.read_role(team, version)
    except StoreError:
        return None
    role = targets.signed.delegations.roles[team]
    try:
        targets.signed.verify_delegate(team, metadata.signed_bytes, metadata.signatures)
    except RepositoryError as error:
        _log.warning("%d.%s.json is not signed by the team and does not count: %s", version, team, error)
        return None
    foreign = [path for path in metadata.signed.targets if not role.is_delegated_path(path)]
    if metadata.signed.type != "targets" or metadata.signed.version != version or foreign:
        _log.warning("%d.%s.json does not count: it signs %s", version, team, foreign or "another version")
        return None
    return metadata


def _teams(targets: Any) -> dict[str, Any]:
    delegations = targets.signed.delegations
    return dict(delegations.roles or {}) if delegations is not None else {}


def _gone(repository: Repository, team: str) -> Any:
    """What a team signed before it was revoked, whose version must not fall; its targets do not come back."""
    snapshot: Any = repository.newest("snapshot")
    if f"{team}.json" not in snapshot.signed.meta:
        return None
    metadata: Any = repository.newest(team)
    metadata.signed.targets = {}
    return metadata


def _forget_unused(delegations: Any) -> None:
    used = {keyid for role in delegations.roles.values() for keyid in role.keyids}
    for keyid in set(delegations.keys) - used:
        del delegations.keys[keyid]


def check(team: str, models: Sequence[str]) -> None:
    """Refuse names that cannot be a team's or its models'.

    Raises:
        RecipeError: They cannot.
    """
    if not _NAME.fullmatch(team) or team in RESERVED:
        raise RecipeError(f"a team's name must match {_NAME.pattern} and be none of {', '.join(RESERVED)}")
    for name in models:
        if not _MODELS.fullmatch(name):
            raise RecipeError(
                f"models are named exactly, or by a beginning with * at its end; found {name!r}"
            )
    if not models:
        raise RecipeError(f"say which models team {team} may sign, with --models")


def _refuse_overlap(roles: Mapping[str, Any], team: str, models: Sequence[str]) -> None:
    for other, path in _patterns(roles):
        if other == team:
            continue
        for name in models:
            if fnmatchcase(name.rstrip("*"), path) or fnmatchcase(path.rstrip("*"), name):
                raise RecipeError(
                    f"the models {name!r} overlap with {path!r} of team {other}; divide them first"
                )


def _patterns(roles: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, role in roles.items():
        for path in role.paths:
            yield name, path.split("/")[1]
