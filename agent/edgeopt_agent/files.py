# SPDX-License-Identifier: Apache-2.0
"""Files that survive a power cut: written beside their place, flushed, renamed, the folder flushed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from edgeopt_wire.errors import StoreError

HALF = ".half-"
"""Begins the name of what is not complete; a start removes what a power cut left of it."""


def write_durably(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, wholly or not at all.

    Raises:
        StoreError: The disk refused; the old content is still there.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=HALF, delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise disk_error(f"cannot write {path}", error) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush the entries of a folder and of all folders in it."""
    for path, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(path))


def digest_of(path: Path) -> str:
    """SHA-256 of what the disk holds: cached pages are dropped first where the system lets us.

    Raises:
        OSError: The disk refused.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        with contextlib.suppress(OSError):  # a file system without pages to drop
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := file.read(1024 * 1024):
            digest.update(piece)
    return digest.hexdigest()


def link_durably(source: Path, target: Path) -> None:
    """Let `target` be the same file as `source`; a flushed copy where the file system has no hard links.

    The folder of `target` is not flushed: the caller does that once for many.

    Raises:
        OSError: The disk refused.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as content, target.open("wb") as file:
            shutil.copyfileobj(content, file, 1024 * 1024)
            file.flush()
            os.fsync(file.fileno())


def discard_folder(folder: Path) -> None:
    """Remove a folder so that a power cut leaves all of it under its name, or nothing.

    Raises:
        OSError: The disk refused.
    """
    if not folder.exists():
        return
    gone = folder.with_name(f"{HALF}{folder.name}")
    if gone.exists():
        shutil.rmtree(gone)
    folder.rename(gone)
    sync_folder(folder.parent)
    shutil.rmtree(gone, ignore_errors=True)


def remove_half(folder: Path) -> None:
    """Remove what a power cut left half written in a folder and in those below; never raises."""
    for path in list(folder.rglob(f"{HALF}*")):
        with contextlib.suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def disk_error(what: str, error: OSError) -> StoreError:
    """Say what the disk refused and what helps."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(f"{what}: the disk is full; free some space, the agent tries again")
    if error.errno == errno.EROFS:
        return StoreError(f"{what}: the disk is read-only; mount the state directory writable")
    return StoreError(f"{what}: {error.strerror or error}")
