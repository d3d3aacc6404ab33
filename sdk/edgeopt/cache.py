# SPDX-License-Identifier: Apache-2.0
"""Finished stages of earlier builds, so that a second build of the same thing starts where the first one was.

Rules:
- An entry's key is everything that its content depends on, tool versions included; its name is the key's digest.
- An entry appears whole or not at all: it is written beside its place, flushed, then renamed.
- Only deterministic work is kept. Measurements are not: they are taken again every time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.errors import StoreError

FORMAT = 1
"""Raised when the meaning of an entry changes, so that old entries are never read."""

ABANDONED_AFTER_S = 24 * 3600
"""A half-written entry this old has no living writer."""


class Cache:
    """A folder of finished stages; `None` as folder keeps nothing (`--no-cache`)."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder / f"v{FORMAT}" if folder else None

    def stage(self, key: Mapping[str, Any], make: Callable[[Path], None], scratch: Path) -> tuple[Path, bool]:
        """Return the folder of the stage `key` and whether it was there; `make` fills a new one.

        Without a cache folder the stage is made below `scratch`, which the caller owns.

        Raises:
            StoreError: The disk refused.
        """
        digest = hashlib.sha256(canonical_bytes(key)).hexdigest()
        home = self.folder or scratch
        entry = home / digest
        if entry.is_dir():
            os.utime(entry)
            return entry, True
        try:
            home.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".half-", dir=home))
        except OSError as error:
            raise StoreError(
                f"cannot write the build cache {home}: {error.strerror}; use --no-cache"
            ) from error
        try:
            make(temporary)
            _flush(temporary)
            temporary.rename(entry)
        except OSError as error:
            if entry.is_dir():  # another build finished the same stage first
                return entry, True
            raise StoreError(
                f"cannot write the build cache {home}: {error.strerror}; free some space"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return entry, False

    def partial(self, key: Mapping[str, Any], scratch: Path) -> Path:
        """Where the stage `key` may keep what it has so far, so that a killed build goes on there; swept when old."""
        digest = hashlib.sha256(canonical_bytes(key)).hexdigest()
        return (self.folder or scratch) / f".half-{digest}.npz"

    def keep(self, name: str, scratch: Path) -> Path:
        """A folder of long work that keeps its own state there; without a cache it is below `scratch`."""
        folder = (self.folder or scratch) / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def sweep(self, now: float | None = None) -> None:
        """Remove what killed builds left half-written."""
        if self.folder is None or not self.folder.is_dir():
            return
        limit = (time.time() if now is None else now) - ABANDONED_AFTER_S
        for entry in self.folder.glob(".half-*"):
            if entry.stat().st_mtime < limit:
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)


def default_folder() -> Path:
    """`$EDGEOPT_CACHE`, else `$XDG_CACHE_HOME/edgeopt`, else `~/.cache/edgeopt`."""
    if explicit := os.environ.get("EDGEOPT_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgeopt"


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
