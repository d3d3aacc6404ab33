# SPDX-License-Identifier: Apache-2.0
"""What the published repository offers, and its bytes for devices that ask: metadata pages and chunks of packages.

Rules:
- A name from a device is a relative path below `metadata/` or `targets/`, or it does not exist.
- "There is none" is an answer of its own: a device that asks for the next root must not wait for a time-out.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from edgeopt_wire.document import from_bytes
from edgeopt_wire.errors import RecipeError, StoreError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.messages import MAX_META_PAGE_BYTES, MetaReply, MetaRequest, Pull

SERVED = ("metadata/", "targets/")
MAX_NAME = 400
"""The longest target: names of 100 characters for model, version and device, a SHA-256, and what joins them."""
MAX_CHUNKS_A_PULL = 256
"""A device owns its window; a request for more than this is cut, and it asks again."""


@dataclass(frozen=True)
class Entry:
    """One published package: its target path and its index."""

    target: str
    index: PackageIndex

    def fits(self, device_class: str) -> bool:
        """Whether devices of this class may run it."""
        return device_class == self.index.device or device_class in self.index.compatible.device_classes


class Catalog:
    """A view on a repository folder that another process may publish into at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: tuple[bytes, list[Entry]] = (b"", [])

    def entries(self) -> list[Entry]:
        """Every published package, in the order of target paths.

        Raises:
            StoreError: The repository cannot be read.
        """
        stamp = self._stamp()
        if stamp and stamp == self._read[0]:
            return list(self._read[1])
        found = self._read_entries()
        self._read = (stamp, found)
        return list(found)

    def _stamp(self) -> bytes:
        """What changes whenever something is published; empty where there is nothing."""
        try:
            return (self.folder / "metadata" / "timestamp.json").read_bytes()
        except OSError:
            return b""

    def _read_entries(self) -> list[Entry]:
        found = []
        for path, info in sorted(self._targets().items()):
            if path.startswith("models/"):
                folder, _, name = path.rpartition("/")
                file = self.folder / "targets" / folder / f"{info['hashes']['sha256']}.{name}"
                try:
                    found.append(Entry(path, from_bytes(PackageIndex, file.read_bytes())))
                except OSError as error:
                    raise StoreError(
                        f"the repository lists {path}, and {file} cannot be read: {error}"
                    ) from error
        return found

    def find(self, model: str, version: str) -> list[Entry]:
        """The packages of one version of a model, one for each device class.

        Raises:
            RecipeError: There is none; the message lists what is published.
        """
        entries = self.entries()
        found = [entry for entry in entries if (entry.index.name, entry.index.version) == (model, version)]
        if not found:
            known = sorted({f"{entry.index.name} {entry.index.version}" for entry in entries})
            raise RecipeError(
                f"{model} {version} is not published; published are: {', '.join(known) or 'none'}. "
                "Publish it with `edgeopt publish`"
            )
        return found

    def index_of_target(self, target: str) -> PackageIndex | None:
        """The index at a target path, or None."""
        return next((entry.index for entry in self.entries() if entry.target == target), None)

    def answer(self, request: MetaRequest) -> MetaReply:
        """A page of a metadata or target file, or an explicit "there is none"."""
        nothing = MetaReply(request.id, found=False)
        if not _is_served(request.name) or request.offset < 0:
            return nothing
        path = self.folder / request.name
        if not path.is_file():
            return nothing
        with path.open("rb") as file:
            total = path.stat().st_size
            file.seek(request.offset)
            page = file.read(MAX_META_PAGE_BYTES)
        return MetaReply(request.id, True, request.offset, total, base64.b64encode(page).decode("ascii"))

    def chunks(self, pull: Pull, index: PackageIndex) -> Iterator[tuple[int, bytes]]:
        """The asked-for chunks of a package as (number, bytes), at most `MAX_CHUNKS_A_PULL`.

        Raises:
            StoreError: The blob cannot be read.
        """
        sent = 0
        for first, count in pull.runs:
            for number in range(first, min(first + count, len(index.chunks))):
                if sent == MAX_CHUNKS_A_PULL:
                    return
                yield number, self.chunk(index, number)
                sent += 1

    def chunk(self, index: PackageIndex, number: int) -> bytes:
        """One chunk of a package.

        Raises:
            StoreError: The blob cannot be read.
        """
        try:
            with (self.folder / "blobs" / index.sha256).open("rb", buffering=0) as file:
                file.seek(number * index.chunk_bytes)
                return file.read(index.chunk_length(number))
        except OSError as error:
            raise StoreError(f"cannot read the package {index.sha256[:12]}: {error.strerror}") from error

    def _targets(self) -> dict[str, Any]:
        metadata = self.folder / "metadata"
        try:
            timestamp = json.loads((metadata / "timestamp.json").read_bytes())
            snapshot_version = timestamp["signed"]["meta"]["snapshot.json"]["version"]
            snapshot = json.loads((metadata / f"{snapshot_version}.snapshot.json").read_bytes())
            listed = snapshot["signed"]["meta"]

            def role(name: str) -> dict[str, Any]:
                path = metadata / f"{listed[f'{name}.json']['version']}.{name}.json"
                signed: dict[str, Any] = json.loads(path.read_bytes())["signed"]
                return signed

            targets = role("targets")
            found: dict[str, Any] = {}
            for team in targets.get("delegations", {}).get("roles", ()):
                mine = role(team["name"])["targets"]
                found.update({path: info for path, info in mine.items() if _is_of(team["paths"], path)})
            found.update(targets["targets"])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"the repository {self.folder} cannot be read: {error}") from error
        return found


def _is_of(patterns: Iterable[str], path: str) -> bool:
    """Whether a path is among a team's, part by part, as devices judge it."""
    parts = path.split("/")
    for pattern in patterns:
        wanted = pattern.split("/")
        if len(wanted) == len(parts) and all(fnmatchcase(p, w) for p, w in zip(parts, wanted, strict=True)):
            return True
    return False


def _is_served(name: str) -> bool:
    """Whether a device may ask for this path: the characters of a package's paths, in a folder that is served."""
    is_plain = all(c.isascii() and (c.isalnum() or c in "._-/") for c in name)
    has_odd_part = any(part in ("", ".", "..") for part in name.split("/"))
    return is_plain and not has_odd_part and len(name) <= MAX_NAME and name.startswith(SERVED)
