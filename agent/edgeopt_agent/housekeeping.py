# SPDX-License-Identifier: Apache-2.0
"""What stays on the disk and what goes: slots and packages that states name stay, the rest goes when room is needed.

Rules:
- Packages that nothing names stay as long as they fit into the quota: going back to one costs no download.
- What is active, previous, wanted or on its way stays, and so does everything of a model whose record cannot be read.
- Room is made before it is taken; where that is not possible nothing is removed, and the error says what is missing.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from edgeopt_agent import quota
from edgeopt_agent.files import discard_folder
from edgeopt_agent.incoming import SPARE_BYTES
from edgeopt_agent.machine import WORK, Installed, State
from edgeopt_agent.store import Store
from edgeopt_wire.errors import StoreError

_log = logging.getLogger(__name__)

SLOTS = ("A", "B")


class Housekeeper:
    """Keeps one state directory tidy. `disk_quota` is what `quota.parse_quota` reads."""

    def __init__(self, store: Store, disk_quota: str = quota.DEFAULT) -> None:
        self._store = store
        self._disk_quota = disk_quota
        self._odd: set[str] = set()

    def clean(self, states: Mapping[str, State]) -> None:
        """Bring the disk to what the states name, within the quota. What the disk refuses is left for the next time."""
        try:
            if not set(self._store.models()) - set(states):
                self._clean_incoming(states)
            for model in self._store.models():
                if model in states:
                    self._clean_slots(states[model])
            self.evict(quota.choose(self._store.packages.all()[0], self.kept(states), self.excess(0)).digests)
        except (OSError, StoreError) as error:
            _log.warning("the state directory is not tidy yet: %s", error)

    def kept(self, states: Mapping[str, State]) -> set[str]:
        """Digests of the packages that never go: active, previous, wanted, on their way, or of a model not in `states`."""
        return set(self.reasons(states))

    def reasons(self, states: Mapping[str, State]) -> dict[str, list[str]]:
        """Why packages never go, by their digests; one that is not named may go when room is needed."""
        found: dict[str, list[str]] = {}
        wanted: dict[tuple[str, str], str] = {}
        for name, state in states.items():
            named = ((state.active, "active"), (state.previous, "previous"), (in_hand(state), "on its way"))
            for entry, why in named:
                if entry is not None:
                    found.setdefault(entry.package_sha256, []).append(f"{why} in {name}")
            if state.desired is not None:
                wanted[state.desired.name, state.desired.version] = f"wanted by {name}"
        unknown = set(self._store.models()) - set(states)
        for package in self._store.packages.all()[0].values():
            if (package.name, package.version) in wanted:
                found.setdefault(package.sha256, []).append(wanted[package.name, package.version])
            if package.name in unknown:
                found.setdefault(package.sha256, []).append(
                    f"the record of {package.name} cannot be used now"
                )
        return found

    def excess(self, need_bytes: int) -> int:
        """Bytes by which the quota or the disk is too small for `need_bytes` more; below 1 if they fit."""
        beyond = self.used_bytes() + need_bytes - self.quota_bytes()
        return max(beyond, need_bytes + SPARE_BYTES - self._store.free_bytes()) if need_bytes else beyond

    def make_room(self, need_bytes: int, states: Mapping[str, State]) -> None:
        """See that `need_bytes` more fit, removing packages that nothing needs, the least recently used first.

        Raises:
            StoreError: They do not fit; nothing is removed then.
        """
        excess = self.excess(need_bytes)
        if excess <= 0:
            return
        eviction = quota.choose(self._store.packages.all()[0], self.kept(states), excess)
        if eviction.freed_bytes < excess:
            raise StoreError(
                f"{need_bytes / 1e6:.1f} MB more are needed; models take {self.used_bytes() / 1e6:.1f} MB of "
                f"disk_quota {self.quota_bytes() / 1e6:.1f} MB, {self._store.free_bytes() / 1e6:.1f} MB of disk are free, and "
                f"{eviction.freed_bytes / 1e6:.1f} MB may go; raise disk_quota or free some space, the agent tries again"
            )
        self.evict(eviction.digests)

    def evict(self, digests: tuple[str, ...]) -> int:
        """Remove packages, and every file that no package names; returns the bytes."""
        if digests:
            _log.info("%d packages go: %s", len(digests), ", ".join(digest[:12] for digest in digests))
        self._store.packages.forget(digests)
        return self._store.packages.sweep()

    def collect(self, states: Mapping[str, State]) -> int:
        """Remove every package that nothing needs, and whatever else is of no use; returns the bytes that this gave back.

        Raises:
            StoreError: Not all packages can be understood now; nothing is removed then.
        """
        packages, is_all = self._store.packages.all()
        if not is_all:
            raise StoreError(
                "a package's record cannot be read now, or a newer agent wrote it; nothing is removed, the log says which"
            )
        before = self.used_bytes()
        self._store.recover()
        self.clean(states)
        self.evict(quota.choose(packages, self.kept(states), sys.maxsize).digests)
        return before - self.used_bytes()

    def quota_bytes(self) -> int:
        """What models may take of the disk."""
        return quota.parse_quota(self._disk_quota, shutil.disk_usage(self._store.folder).total)

    def used_bytes(self) -> int:
        """What models take of the disk: arriving, stored and in slots; a file with several names counts once."""
        sizes: dict[tuple[int, int], int] = {}
        for top in ("models", "incoming", "blobs"):
            for folder, _, names in os.walk(self._store.folder / top):
                for name in names:
                    try:
                        found = (Path(folder) / name).lstat()
                    except OSError:
                        continue
                    sizes[found.st_dev, found.st_ino] = found.st_size
        return sum(sizes.values())

    def _clean_incoming(self, states: Mapping[str, State]) -> None:
        coming = {entry.package_sha256 for entry in map(in_hand, states.values()) if entry is not None}
        for path in (self._store.folder / "incoming").iterdir():
            if path.name.partition(".")[0] not in coming:
                path.unlink(missing_ok=True)

    def _clean_slots(self, state: State) -> None:
        now = in_hand(state)
        kept = {entry.slot for entry in (state.active, state.previous, now) if entry is not None}
        for slot in SLOTS:
            if slot not in kept and self._store.slot(state.model, slot).exists():
                discard_folder(self._store.slot(state.model, slot))
        for entry in (state.active, state.previous):
            if entry is not None:
                self._adopt(state.model, entry)
        previous = state.previous
        if previous is None or (now is not None and now.slot == previous.slot):
            return
        if not self._store.is_whole(state.model, previous.slot, previous.package_sha256):
            self._store.place(state.model, previous.slot, previous.package_sha256)

    def _adopt(self, model: str, entry: Installed) -> None:
        """A slot that an agent without a store filled is taken into the store."""
        digest = entry.package_sha256
        if digest in self._odd or not self._store.is_whole(model, entry.slot, digest):
            return
        if self._store.packages.find(digest) is None and not self._store.packages.adopt(
            digest, self._store.slot(model, entry.slot)
        ):
            self._odd.add(digest)  # it is not hashed again and again


def in_hand(state: State) -> Installed | None:
    """The candidate, while work on it goes on."""
    return state.candidate if state.phase in WORK else None
