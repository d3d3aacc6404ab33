# SPDX-License-Identifier: Apache-2.0
"""Bit rot of a package that was whole once: which files of a slot changed, and getting back no more than what is bad.

Rules:
- What the disk holds is compared with the digests of the package that was verified; nothing else tells a disk that
  forgets from a runtime that changed.
- To repair, the package is written again from the slot as it is. Chunks that are not what the signed index says (those
  with a bad byte, and those with the checksums of its file) are pulled, and the package is hashed as if it had come whole.
- Files are replaced one by one, each wholly or not at all: what serves from the slot goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from edgeopt_agent.files import disk_error, sync_folder
from edgeopt_agent.machine import Installed
from edgeopt_agent.store import Incoming, Store
from edgeopt_wire.archive import Content, write_archive
from edgeopt_wire.errors import StoreError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.manifest import MANIFEST_PATH

_log = logging.getLogger(__name__)

_PIECE_BYTES = 1024 * 1024

Fill = Callable[[Incoming], None]
"""Pulls what is missing of a package; raises `TransportError` where that must wait."""


def digest_on_disk(path: Path) -> str:
    """SHA-256 of what the disk holds, not of what the system remembers of it; empty where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            with contextlib.suppress(OSError):  # a file system without pages to drop
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    except OSError:  # it is gone, or the disk cannot read it any more
        return ""
    return digest.hexdigest()


def find_rot(store: Store, model: str, installed: Installed, manifest_sha256: str = "") -> tuple[str, ...]:
    """Paths of a slot's files that are not what they were.

    `manifest_sha256` was the manifest's digest (empty: nobody knows). A manifest that changed tells nothing of the rest.
    """
    folder = store.slot(model, installed.slot)
    if manifest_sha256 and digest_on_disk(folder / MANIFEST_PATH) != manifest_sha256:
        return (MANIFEST_PATH,)
    files = store.manifest(model, installed.slot).files
    return tuple(entry.path for entry in files if digest_on_disk(folder / entry.path) != entry.sha256)


def repair(
    store: Store,
    model: str,
    installed: Installed,
    index: PackageIndex,
    fill: Fill,
    *,
    manifest_sha256: str = "",
) -> int:
    """Get a slot's files back to what `index` says; returns how many chunks were pulled. May be called again.

    Raises:
        TransportError: The other side is away; what came is kept.
        StoreError: The disk refused, or the index is of another package.
    """
    if index.sha256 != installed.package_sha256:
        raise StoreError(
            f"{model} {installed.version}: the index is of another package; publish a new version"
        )
    folder = store.slot(model, installed.slot)
    incoming = store.incoming(index)
    if not incoming.path.exists():
        incoming.reserve()
        is_known = not manifest_sha256 or digest_on_disk(folder / MANIFEST_PATH) == manifest_sha256
        if is_known:
            _write_again(store, model, installed, incoming)
    missing = len(incoming.missing())
    fill(incoming)
    if digest_on_disk(incoming.path) != index.sha256:
        incoming.discard()
        raise StoreError(
            f"{model} {installed.version} was damaged again while it was repaired; check the disk"
        )
    try:
        _put_back(incoming.path, folder)
        _keep_again(store, model, installed)
    except OSError as error:
        raise disk_error(f"cannot repair {folder}", error) from error
    incoming.discard()
    _log.info("%s %s is whole again: %d chunks were pulled", model, installed.version, missing)
    return missing


def _write_again(store: Store, model: str, installed: Installed, incoming: Incoming) -> None:
    """The package from the files that are there, with zeros for what is not; note the chunks that are right."""
    folder = store.slot(model, installed.slot)
    files = store.manifest(model, installed.slot).files
    index = incoming.index
    members: dict[str, Content] = {MANIFEST_PATH: folder / MANIFEST_PATH}
    members |= {entry.path: _content(folder / entry.path, entry.size_bytes) for entry in files}
    with incoming.path.open("w+b") as target:
        write_archive(target, members)
        target.truncate(index.size_bytes)
        target.seek(0)
        pieces = (target.read(index.chunk_length(number)) for number in range(len(index.chunks)))
        there = {
            number
            for number, piece in enumerate(pieces)
            if hashlib.sha256(piece).hexdigest() == index.chunks[number]
        }
    incoming.checkpoint(there)


def _content(path: Path, size_bytes: int) -> Content:
    """A file to copy; bytes of the right length where it is shorter, longer, gone or unreadable."""
    try:
        if digest_on_disk(path) and path.stat().st_size == size_bytes:
            return path
        return path.read_bytes()[:size_bytes].ljust(size_bytes, b"\0")
    except OSError:
        return bytes(size_bytes)


def _put_back(package: Path, folder: Path) -> None:
    """Replace what differs; the package was hashed."""
    with zipfile.ZipFile(package) as archive:
        for info in archive.infolist():
            with archive.open(info) as member:
                right = hashlib.sha256()
                while piece := member.read(_PIECE_BYTES):
                    right.update(piece)
            if digest_on_disk(folder / info.filename) != right.hexdigest():
                with archive.open(info) as member:
                    _replace(folder / info.filename, member)


def _keep_again(store: Store, model: str, installed: Installed) -> None:
    """The store's files, to which the slot's were links, are what the slot's are again."""
    folder = store.slot(model, installed.slot)
    files = store.manifest(model, installed.slot).files
    for digest in (digest_on_disk(folder / MANIFEST_PATH), *(entry.sha256 for entry in files)):
        kept = store.folder / "blobs" / digest
        if kept.exists() and digest_on_disk(kept) != digest:
            kept.unlink()
    store.packages.adopt(installed.package_sha256, folder)


def _replace(target: Path, content: IO[bytes]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".half-", delete=False) as file:
        try:
            while piece := content.read(_PIECE_BYTES):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    sync_folder(target.parent)
