# SPDX-License-Identifier: Apache-2.0
"""What a device that lost its floor of versions still knows of its past, and what proves that a repository is not older.

Either is a proof, and both are told as an alarm:
- The repository lists every release that serves here, with the same bytes: it is not older than the newest of them.
- The control plane answers this device's question for the time, with a key that could direct this device before, and
  what the repository signed last has not ended at that moment. A new device knows no more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgeopt_agent.director import DIRECTOR_TARGET, read_director
from edgeopt_wire.document import from_bytes
from edgeopt_wire.errors import EdgeoptError, StoreError, TrustError
from edgeopt_wire.index import PackageIndex, target_path

if TYPE_CHECKING:
    from edgeopt_agent.signed_view import SignedView
    from edgeopt_agent.store import Store

BY_HAND = "by hand"
"""The target of a package that an operator vouched for; no repository lists it."""


@dataclass(frozen=True)
class Past:
    """`releases` maps the targets of what serves here to the package's digest, `director` who could direct this device.

    `has_lived`: it followed some repository before.
    """

    releases: Mapping[str, str] = field(default_factory=dict)
    director: frozenset[str] = frozenset()
    has_lived: bool = False


def past_of(store: Store) -> Past:
    """What a state directory says.

    Raises:
        StoreError: A record cannot be read now.
    """
    releases: dict[str, str] = {}
    has_lived = False
    for name in store.models():
        state = store.load_state(name)
        active = state.active
        if active is None or (state.desired is not None and state.desired.target == BY_HAND):
            continue
        has_lived = True
        try:
            device = store.manifest(name, active.slot).device
        except StoreError:  # a slot that is damaged proves nothing
            continue
        releases[target_path(name, active.version, device)] = active.package_sha256
    director = frozenset(store.load_device().director)
    return Past(releases, director, has_lived or bool(director))


def why_unproven(view: SignedView, past: Past, ask: Callable[[SignedView], bool]) -> str:
    """Why nothing proves that a repository is not older than what this device saw; empty where something does.

    `ask` asks the director that the repository names for the time, and says whether it answered.
    """
    listed = _why_unlisted(view, past.releases)
    if not listed:
        return ""
    try:
        keys = frozenset(read_director(view.read(DIRECTOR_TARGET)).keys)
        if not keys <= past.director:
            return f"{listed}; its director is not who directed this device before"
        return "" if ask(view) else f"{listed}; nobody answers what time it is"
    except EdgeoptError as error:
        return f"{listed}; {error}"


def _why_unlisted(view: SignedView, releases: Mapping[str, str]) -> str:
    if not releases:
        return "nothing that is installed here was signed by it"
    for target, sha256 in releases.items():
        try:
            found = from_bytes(PackageIndex, view.read(target)).sha256
        except TrustError as error:
            return f"{target} serves here, and {error}"
        if found != sha256:
            return f"{target} serves here with other bytes than it lists"
    return ""
