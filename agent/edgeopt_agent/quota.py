# SPDX-License-Identifier: Apache-2.0
"""How much of the disk models may take, and which packages go when they take more: the least recently used.

Rule: what is active, previous, wanted or on its way is never chosen, however much room is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from edgeopt_agent.packages import StoredPackage
from edgeopt_wire.errors import RecipeError

DEFAULT = "50%"
UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1}


def parse_size(text: str, what: str) -> int:
    """Bytes from a number with a unit, e.g. `2GB`, `500 MB`.

    Raises:
        RecipeError: It is none.
    """
    for unit, factor in UNITS.items():
        if text.endswith(unit):
            try:
                size = float(text.removesuffix(unit))
            except ValueError:
                break
            if 0 < size * factor < 2**63:
                return int(size * factor)
            break
    raise RecipeError(f"{what} is a size like 2GB or 500MB, found {text!r}")


def parse_quota(text: str, disk_bytes: int) -> int:
    """Bytes from `2GB`, or from a share of the disk, `50%`.

    Raises:
        RecipeError: It is none of them.
    """
    if not text.endswith("%"):
        return parse_size(text, "disk_quota (or a share of the disk like 50%)")
    try:
        share = float(text.removesuffix("%"))
    except ValueError:
        share = 0.0
    if not 0 < share <= 100:
        raise RecipeError(f"disk_quota is a share of the disk above 0% and at most 100%, found {text!r}")
    return int(disk_bytes * share / 100)


@dataclass(frozen=True)
class Eviction:
    """Packages in the order in which they go, and the bytes that this gives back."""

    digests: tuple[str, ...]
    freed_bytes: int


def choose(packages: Mapping[str, StoredPackage], kept: Collection[str], excess: int) -> Eviction:
    """The fewest of the least recently used packages that free `excess` bytes; all that may go if they free less."""
    left = dict(packages)
    gone: list[str] = []
    freed = 0
    for entry in sorted(packages.values(), key=lambda entry: entry.used):
        if freed >= excess:
            break
        if entry.sha256 not in kept:
            freed += own_bytes(entry, left)
            gone.append(entry.sha256)
            del left[entry.sha256]
    return Eviction(tuple(gone), freed)


def own_bytes(entry: StoredPackage, packages: Mapping[str, StoredPackage]) -> int:
    """Bytes of the files that no other of these packages has."""
    others = {
        file.sha256 for other in packages.values() if other.sha256 != entry.sha256 for file in other.files
    }
    return sum({f.sha256: f.size_bytes for f in entry.files if f.sha256 not in others}.values())
