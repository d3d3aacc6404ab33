# SPDX-License-Identifier: Apache-2.0
"""What is on the disk of a device, what of it may go, and why the rest stays: `edgeopt-agent store`.

Rule: looking removes nothing and works beside a running agent; collecting needs the state directory for itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeopt_agent import quota
from edgeopt_agent.config import AgentConfig
from edgeopt_agent.housekeeping import SLOTS, Housekeeper, in_hand
from edgeopt_agent.machine import State
from edgeopt_agent.packages import StoredPackage
from edgeopt_agent.status import is_running
from edgeopt_agent.store import Store
from edgeopt_wire.errors import StoreError

SCHEMA = "edgeopt.store/1"


@dataclass(frozen=True)
class _Seen:
    """One look at a state directory. `unknown` maps models whose records cannot be used now to the reason."""

    store: Store
    keeper: Housekeeper
    states: Mapping[str, State]
    unknown: Mapping[str, str]
    packages: Mapping[str, StoredPackage]
    is_all: bool


def describe(config: AgentConfig) -> dict[str, Any]:
    """The inventory as one JSON-like document.

    Raises:
        StoreError: The state directory cannot be used.
    """
    return _document(config, _look(config))


def collect(config: AgentConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Remove every package that nothing needs; the inventory afterwards, with what was removed as `collected`.

    `dry_run` removes nothing: `collected` is what would be.

    Raises:
        StoreError: An agent is running, the state directory is another user's, or not all of it can be understood now.
            Nothing is removed then.
    """
    from edgeopt_agent.main import only_one

    if dry_run:
        seen = _look(config)
        chosen = _may_go(seen)
        return {
            **_document(config, seen),
            "collected": _collected(seen, chosen.digests, chosen.freed_bytes, is_dry=True),
        }
    store = Store(config.folder)
    _check_owner(store)
    with only_one(store):
        seen = _look(config)
        digests = _may_go(seen).digests
        freed = seen.keeper.collect(seen.states)
        return {
            **_document(config, _look(config)),
            "collected": _collected(seen, digests, freed, is_dry=False),
        }


def lines(document: Mapping[str, Any]) -> list[str]:
    """The inventory for people."""
    used, most, free = (_mb(document[key]) for key in ("used_bytes", "quota_bytes", "free_bytes"))
    running = "running" if document["running"] else "not running"
    found = [f"{used} of {most} used, {free} of disk free, agent {running}"]
    for model in document["models"]:
        found.append(f"{model['name']} {model['phase']} {model['error']}".rstrip())
        for slot in model["slots"]:
            whole = "" if slot["is_whole"] else ", not whole"
            found.append(f"  {slot['slot']} {slot['role']:9} {slot['version'] or '-'}{whole}")
    for entry in document["packages"]:
        why = "; ".join(entry["stays"]) or f"goes as number {entry['goes']} when room is needed"
        found.append(
            f"{entry['package_sha256'][:12]} {entry['name']} {entry['version']} {_mb(entry['size_bytes'])}, "
            f"{_mb(entry['own_bytes'])} of its own: {why}"
        )
    files = document["files"]
    found.append(
        f"{files['count']} files, {_mb(files['bytes'])}; {files['shared']} belong to several packages, which saves "
        f"{_mb(files['saved_bytes'])}; {len(files['orphans'])} to none"
    )
    if gone := document.get("collected"):
        word = "would go" if gone["dry_run"] else "went"
        found.append(f"{len(gone['packages'])} packages {word}, {_mb(gone['freed_bytes'])}")
    return found


def _look(config: AgentConfig) -> _Seen:
    store = Store(config.folder)
    states: dict[str, State] = {}
    unknown: dict[str, str] = {}
    for name in store.models():
        try:
            states[name] = store.open_state(name)
        except StoreError as error:
            unknown[name] = str(error)
    packages, is_all = store.packages.all()
    return _Seen(store, Housekeeper(store, config.disk_quota), states, unknown, packages, is_all)


def _may_go(seen: _Seen) -> quota.Eviction:
    """Everything that nothing needs, in the order in which it goes, and the files that no package names."""
    if not seen.is_all:
        return quota.Eviction((), 0)
    chosen = quota.choose(seen.packages, seen.keeper.kept(seen.states), sys.maxsize)
    on_disk = seen.store.packages.on_disk()
    return quota.Eviction(
        chosen.digests, chosen.freed_bytes + sum(on_disk[digest][0] for digest in _orphans(seen))
    )


def _document(config: AgentConfig, seen: _Seen) -> dict[str, Any]:
    reasons, goes = seen.keeper.reasons(seen.states), list(_may_go(seen).digests)
    newest_first = sorted(seen.packages.values(), key=lambda entry: -entry.used)
    return {
        "schema": SCHEMA,
        "state_dir": str(seen.store.folder),
        "running": is_running(config),
        "quota_bytes": seen.keeper.quota_bytes(),
        "used_bytes": seen.keeper.used_bytes(),
        "free_bytes": seen.store.free_bytes(),
        "excess_bytes": max(0, seen.keeper.excess(0)),
        "models": [_model(seen, name) for name in seen.store.models()],
        "packages": [
            {
                "name": entry.name,
                "version": entry.version,
                "package_sha256": entry.sha256,
                "size_bytes": entry.size_bytes,
                "own_bytes": quota.own_bytes(entry, seen.packages),
                "files": len(entry.files),
                "used": entry.used,
                "stays": reasons.get(
                    entry.sha256, [] if seen.is_all else ["not all records can be read now"]
                ),
                "goes": goes.index(entry.sha256) + 1 if entry.sha256 in goes else 0,
            }
            for entry in newest_first
        ],
        "files": _files(seen),
        "incoming": _incoming(seen.store),
    }


def _incoming(store: Store) -> list[dict[str, Any]]:
    found = []
    for path in sorted((store.folder / "incoming").iterdir()):
        if "." in path.name:
            continue
        with contextlib.suppress(FileNotFoundError):  # a running agent is done with it
            size = path.stat().st_size
            found.append(
                {"package_sha256": path.name, "size_bytes": size, "chunks": store.arrived(path.name)}
            )
    return found


def _model(seen: _Seen, name: str) -> dict[str, Any]:
    state = seen.states.get(name) or seen.store.load_state(name)
    entries = ((state.active, "active"), (state.previous, "previous"), (in_hand(state), "candidate"))
    roles = {entry.slot: (entry, role) for entry, role in reversed(entries) if entry is not None}
    slots = []
    for slot in SLOTS:
        entry, role = roles.get(slot, (None, "empty"))
        if entry is None and seen.store.slot(name, slot).exists():
            role = "unused"
        slots.append(
            {
                "slot": slot,
                "role": role,
                "version": entry.version if entry else "",
                "package_sha256": entry.package_sha256 if entry else "",
                "is_whole": entry is None or seen.store.is_whole(name, slot, entry.package_sha256),
            }
        )
    return {
        "name": name,
        "phase": state.phase.value,
        "error": seen.unknown.get(name, state.error),
        "slots": slots,
    }


def _files(seen: _Seen) -> dict[str, Any]:
    named = Counter(sha for entry in seen.packages.values() for sha in {file.sha256 for file in entry.files})
    on_disk = seen.store.packages.on_disk()
    return {
        "count": len(on_disk),
        "bytes": sum(size for size, _ in on_disk.values()),
        "shared": sum(named[digest] > 1 for digest in on_disk),
        "saved_bytes": sum(
            size * (named[digest] - 1) for digest, (size, _) in on_disk.items() if named[digest]
        ),
        "orphans": _orphans(seen),
        "missing": sorted(named.keys() - on_disk.keys()),
        "references": {
            digest: {"size_bytes": size, "packages": named[digest], "names": names}
            for digest, (size, names) in on_disk.items()
        },
    }


def _orphans(seen: _Seen) -> list[str]:
    """Files that no package names; none is called so where not all records can be understood now."""
    named = {file.sha256 for entry in seen.packages.values() for file in entry.files}
    return sorted(seen.store.packages.on_disk().keys() - named) if seen.is_all else []


def _collected(seen: _Seen, digests: tuple[str, ...], freed: int, *, is_dry: bool) -> dict[str, Any]:
    gone = [seen.packages[digest] for digest in digests]
    return {
        "dry_run": is_dry,
        "packages": [
            {"name": entry.name, "version": entry.version, "package_sha256": entry.sha256} for entry in gone
        ],
        "freed_bytes": freed,
    }


def _check_owner(store: Store) -> None:
    """See that what is written here can be read by the agent.

    Raises:
        StoreError: The state directory is another user's.
    """
    owner = store.folder.stat().st_uid
    if owner != os.geteuid():
        raise StoreError(
            f"{store.folder} belongs to the user with id {owner}, whose agent could not read what is written here; "
            f"run this as that user, e.g. with sudo -u '#{owner}'"
        )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
