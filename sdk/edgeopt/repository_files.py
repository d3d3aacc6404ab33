# SPDX-License-Identifier: Apache-2.0
"""A repository's files: written beside their place, flushed and renamed, by one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeopt_wire.errors import StoreError

LOCK_TIMEOUT_S = 60.0
"""Copying a large package into a slow folder takes this long at most while others wait."""

_EVERY_S = 0.05


@contextmanager
def locked(folder: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the repository: a publication and the fleet's re-signing would otherwise write the same version twice.

    The kernel frees the lock when its process ends, however it ends.

    Raises:
        StoreError: Somebody else holds it for too long, or the disk refused.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreError(f"cannot lock {folder}: {error.strerror}") from error
    try:
        _take(descriptor, folder, timeout_s)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= end:
                raise StoreError(
                    f"another process has been writing {folder} for {timeout_s:.0f} s; wait for it to end and try again"
                ) from error
            time.sleep(_EVERY_S)
        except OSError as error:
            raise StoreError(f"cannot lock {folder}: {error.strerror}; it must be on a local disk") from error
        else:
            return


def copy_file(source: Path, target: Path) -> None:
    """Copy a file into its place unless it is there: blobs are named by their content.

    Raises:
        StoreError: The disk refused.
    """
    if target.exists():
        return
    try:
        with _beside(target) as (file, temporary):
            with source.open("rb") as opened:
                shutil.copyfileobj(opened, file)
            _settle(file, temporary, target)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror}") from error


def write_file(target: Path, content: bytes) -> None:
    """Replace a file wholly or not at all.

    Raises:
        StoreError: The disk refused.
    """
    try:
        with _beside(target) as (file, temporary):
            file.write(content)
            _settle(file, temporary, target)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror}") from error


@contextmanager
def _beside(target: Path) -> Iterator[tuple[tempfile._TemporaryFileWrapper[bytes], Path]]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".half-", delete=False) as file:
        yield file, Path(file.name)


def _settle(file: tempfile._TemporaryFileWrapper[bytes], temporary: Path, target: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    temporary.chmod(0o644)
    temporary.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
