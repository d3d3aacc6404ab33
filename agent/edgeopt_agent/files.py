# SPDX-License-Identifier: Apache-2.0
"""Files that survive a power cut: written beside their place, flushed, renamed, the folder flushed."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from edgeopt_wire.errors import StoreError


def write_durably(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, wholly or not at all.

    Raises:
        StoreError: The disk refused; the old content is still there.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".half-", delete=False) as file:
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


def disk_error(what: str, error: OSError) -> StoreError:
    """Say what the disk refused and what helps."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(f"{what}: the disk is full; free some space, the agent tries again")
    if error.errno == errno.EROFS:
        return StoreError(f"{what}: the disk is read-only; mount the state directory writable")
    return StoreError(f"{what}: {error.strerror or error}")
