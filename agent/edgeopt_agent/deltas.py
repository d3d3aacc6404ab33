# SPDX-License-Identifier: Apache-2.0
"""Getting a package as what differs from one that this device has: base rebuilt from its slot, delta applied.

Rules:
- A delta is a way to the package's bytes, never more: they are hashed like bytes that came as chunks.
- Whatever is wrong with a delta (no room, not offered, damaged, another base), the package itself is pulled instead.
- A delta that is cut off goes on where it was, like a package.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeopt_agent.machine import Installed, State
from edgeopt_agent.store import Incoming, Store
from edgeopt_wire.archive import write_archive
from edgeopt_wire.delta import apply_delta
from edgeopt_wire.errors import DocumentError, NotOfferedError, StoreError
from edgeopt_wire.index import PackageIndex, deltas_of
from edgeopt_wire.manifest import MANIFEST_PATH

_log = logging.getLogger(__name__)

Fill = Callable[[Incoming], None]
"""Pulls what is missing of a blob; raises `TransportError` where that must wait."""


@dataclass(frozen=True)
class Way:
    """A delta and the package here that it starts from."""

    delta: PackageIndex
    base: Installed


def find_way(index: PackageIndex, state: State, store: Store) -> Way | None:
    """The smallest delta from a package that is whole in a slot of this model and will not be overwritten."""
    deltas = deltas_of(index)
    ways = [
        Way(deltas[entry.package_sha256], entry)
        for entry in (state.active, state.previous)
        if entry is not None
        and entry.package_sha256 in deltas
        and store.is_whole(state.model, entry.slot, entry.package_sha256)
    ]
    return min(ways, key=lambda way: way.delta.size_bytes, default=None)


def pull_by_delta(way: Way, index: PackageIndex, store: Store, fill: Fill) -> bool:
    """Make the package of `index` arrive by a delta; False where it must come as itself.

    Raises:
        TransportError: The other side is away; the delta goes on later.
    """
    arriving = store.incoming_delta(index, way.delta)
    try:
        arriving.reserve(beside=way.delta.size_bytes + index.size_bytes)
        fill(arriving)
        _apply(way, index, store, arriving)
    except (DocumentError, NotOfferedError, StoreError, OSError) as error:
        _log.warning(
            "%s %s comes whole, not as a delta of %s: %s", index.name, index.version, way.base.version, error
        )
        arriving.discard()
        return False
    arriving.discard()
    saved = index.size_bytes - way.delta.size_bytes
    _log.info("%s %s came as a delta, %.1f MB less", index.name, index.version, saved / 1e6)
    return True


def _apply(way: Way, index: PackageIndex, store: Store, arriving: Incoming) -> None:
    whole = store.incoming(index)
    base = arriving.path.with_name(f"{index.sha256}.base")
    try:
        _rebuild(store, index.name, way.base, base)
        with arriving.path.open("rb") as delta, base.open("rb") as old, whole.path.open("r+b") as made:
            apply_delta(delta, old, made, (index.sha256, index.size_bytes))
        whole.checkpoint(set(range(len(index.chunks))))
    finally:
        base.unlink(missing_ok=True)


def _rebuild(store: Store, model: str, installed: Installed, target: Path) -> None:
    """The bytes of an installed package, from its slot: packages are deterministic."""
    slot = store.slot(model, installed.slot)
    manifest = store.manifest(model, installed.slot)
    members = [MANIFEST_PATH, *(entry.path for entry in manifest.files)]
    with target.open("w+b") as file:
        write_archive(file, {name: slot / name for name in members})
