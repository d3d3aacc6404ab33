# SPDX-License-Identifier: Apache-2.0
"""Packages on the disk as the files that they are made of, each kept once under its digest.

    blobs/<sha256>           a file of any package, never changed; slots hold hard links to it
    packages/<sha256>.json   what a package is made of, and when it was last used

Rules:
- Packages, models and versions that have a file in common share it. References are counted by reading the records, so
  that no counter can be wrong after a power cut; what no record names is removed.
- A record is written when all its files are on the disk; a package without a record is not there.
- Use is counted, not timed: a board's clock may say anything.
- Where one record cannot be read now, or is a newer agent's, nothing is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeopt_agent.files import HALF, digest_of, disk_error, link_durably, sync_folder, write_durably
from edgeopt_agent.records import NewerRecordError, check_not_newer
from edgeopt_wire.archive import PackageReader, safe_path
from edgeopt_wire.document import from_bytes, from_json, parse_json, to_bytes
from edgeopt_wire.errors import DocumentError, StoreError
from edgeopt_wire.manifest import MANIFEST_PATH, Manifest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFile:
    """A file of a package."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class StoredPackage:
    """A package that is here. `used` grows with every use: the smallest was used least recently."""

    SCHEMA = "edgeopt.stored-package/1"

    name: str
    version: str
    sha256: str
    files: tuple[StoredFile, ...]
    used: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of its files, each counted once."""
        return sum({entry.sha256: entry.size_bytes for entry in self.files}.values())


class Packages:
    """The packages of one state directory."""

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / "blobs"
        self._records = folder / "packages"

    def all(self) -> tuple[dict[str, StoredPackage], bool]:
        """The packages by digest, and whether these are all: not where a record cannot be understood now."""
        found: dict[str, StoredPackage] = {}
        is_all = True
        for path in sorted(self._records.glob("*.json")):
            try:
                entry = _read(path)
                found[entry.sha256] = entry
            except (OSError, NewerRecordError) as error:
                _log.warning("%s cannot be read now: %s", path, error)
                is_all = False
            except DocumentError as error:
                _log.error("%s is damaged and forgotten: %s; its package is fetched again", path, error)
        return found, is_all

    def find(self, sha256: str) -> StoredPackage | None:
        """The package, if all its files seem to be there."""
        try:
            entry = _read(self._record(sha256))
            sizes = [self._blob(file).stat().st_size == file.size_bytes for file in entry.files]
        except (OSError, DocumentError, NewerRecordError):
            return None
        return entry if all(sizes) and entry.sha256 == sha256 else None

    def is_whole(self, sha256: str) -> bool:
        """Whether every byte of the package is there, read from the disk. One that is not is forgotten.

        Raises:
            StoreError: The disk refused.
        """
        entry = self.find(sha256)
        if entry is None:
            return False
        damaged = []
        for file in entry.files:
            try:
                if digest_of(self._blob(file)) != file.sha256:
                    damaged.append(file)
            except OSError as error:
                raise disk_error(f"cannot read {self._blob(file)}", error) from error
        for file in damaged:
            _log.error("%s of %s %s is damaged on the disk", file.path, entry.name, entry.version)
            self._blob(file).unlink(missing_ok=True)
        if damaged:
            self.forget([sha256])
        return not damaged

    def on_disk(self) -> dict[str, tuple[int, int]]:
        """Every file that is kept, by its digest: bytes, and how many names it has, slots' among them."""
        found: dict[str, tuple[int, int]] = {}
        for path in sorted(self._blobs.iterdir()):
            if path.name.startswith(HALF):
                continue
            with contextlib.suppress(FileNotFoundError):  # somebody else removed it
                seen = path.stat()
                found[path.name] = (seen.st_size, seen.st_nlink)
        return found

    def keep(self, package: Path, sha256: str) -> Manifest:
        """Take in a package file: each of its files once, then the record.

        Raises:
            DocumentError: The package is none.
            StoreError: The disk refused; what is complete of it stays until the next cleaning.
        """
        with PackageReader(package) as reader:
            manifest = reader.manifest
            files = []
            try:
                for entry in manifest.files:
                    file = StoredFile(entry.path, entry.sha256, entry.size_bytes)
                    if not self._has(file):
                        self._take(reader, entry.path)
                    files.append(file)
                files.insert(0, self._take(reader, MANIFEST_PATH))
                sync_folder(self._blobs)
            except OSError as error:
                raise disk_error(f"cannot keep {manifest.title}", error) from error
        self._write(StoredPackage(manifest.name, manifest.version, sha256, tuple(files)))
        return manifest

    def adopt(self, sha256: str, folder: Path) -> bool:
        """Take in an unpacked package whose slot was filled by an older agent, without a copy.

        False where a file is not what the manifest says, or the file system has no hard links.
        """
        try:
            raw = (folder / MANIFEST_PATH).read_bytes()
            manifest = from_bytes(Manifest, raw)
            head = StoredFile(MANIFEST_PATH, hashlib.sha256(raw).hexdigest(), len(raw))
            listed = [StoredFile(entry.path, entry.sha256, entry.size_bytes) for entry in manifest.files]
            for file in (head, *listed):
                self._adopt(file, folder / safe_path(file.path))
            sync_folder(self._blobs)
            self._write(StoredPackage(manifest.name, manifest.version, sha256, (head, *listed)))
        except (OSError, DocumentError, StoreError) as error:
            _log.warning("%s is not taken into the store: %s", folder, error)
            return False
        return True

    def fill(self, entry: StoredPackage, folder: Path) -> None:
        """Put a package's files into an empty folder, and note the use.

        Raises:
            StoreError: The disk refused.
        """
        try:
            for file in entry.files:
                link_durably(self._blob(file), folder / safe_path(file.path))
        except OSError as error:
            raise disk_error(f"cannot fill {folder}", error) from error
        self._write(entry)

    def fits(self, entry: StoredPackage, folder: Path) -> bool:
        """Whether a folder holds the package's files, read from the disk."""
        try:
            return all(digest_of(folder / file.path) == file.sha256 for file in entry.files)
        except OSError:
            return False

    def forget(self, digests: Iterable[str]) -> None:
        """Drop packages' records; their files go with the next `sweep`."""
        for sha256 in digests:
            self._record(sha256).unlink(missing_ok=True)

    def sweep(self) -> int:
        """Remove the files that no package names, and records of nothing; returns the bytes."""
        found, is_all = self.all()
        if not is_all:
            return 0
        named = {file.sha256 for entry in found.values() for file in entry.files}
        freed = 0
        for path in self._blobs.iterdir():
            if path.name not in named:
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
        for path in self._records.iterdir():
            if path.stem not in found:
                path.unlink(missing_ok=True)
        return freed

    def _has(self, file: StoredFile) -> bool:
        path = self._blob(file)
        return path.exists() and digest_of(path) == file.sha256

    def _take(self, reader: PackageReader, path: str) -> StoredFile:
        self._blobs.mkdir(exist_ok=True)
        half = self._blobs / f"{HALF}{os.getpid()}"
        try:
            reader.extract_file(path, half)
            file = StoredFile(path, digest_of(half), half.stat().st_size)
            half.replace(self._blob(file))
        finally:
            half.unlink(missing_ok=True)
        return file

    def _adopt(self, file: StoredFile, source: Path) -> None:
        blob = self._blob(file)
        blob.parent.mkdir(exist_ok=True)
        is_new = not blob.exists()
        if is_new:
            os.link(source, blob)  # tells whether the file system can, before anything is hashed
        if digest_of(source) != file.sha256:
            if is_new:
                blob.unlink(missing_ok=True)
            raise DocumentError(f"{source} is not what the manifest says")

    def _write(self, entry: StoredPackage) -> None:
        newest = max((other.used for other in self.all()[0].values()), default=0)
        write_durably(self._record(entry.sha256), to_bytes(replace(entry, used=newest + 1)))

    def _record(self, sha256: str) -> Path:
        return self._records / f"{sha256}.json"

    def _blob(self, file: StoredFile) -> Path:
        return self._blobs / file.sha256


def _read(path: Path) -> StoredPackage:
    raw = parse_json(path.read_bytes(), path.name)
    check_not_newer(raw, StoredPackage.SCHEMA, str(path))
    return from_json(StoredPackage, raw, path.name)
