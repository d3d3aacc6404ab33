# SPDX-License-Identifier: Apache-2.0
"""One file per device class: from a folder of model files to a package, and back to something that can be opened.

Rules:
- The folder that is measured is the folder that is packed: same files, same manifest form, same code as on a device.
- A package appears whole or not at all (written beside its place, flushed, renamed).
- Measurements do not stand in the package, because two builds of the same inputs must be the same bytes; they lie
  beside it as `<package>.report.json`, tied to it by its digest.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeopt_wire.archive import Content, PackageReader, write_archive
from edgeopt_wire.document import to_bytes
from edgeopt_wire.errors import StoreError
from edgeopt_wire.manifest import MANIFEST_PATH, FileEntry, Manifest

SUFFIX = ".edgeopt"
GOLDEN_INPUTS = "golden/inputs"


def file_entries(folder: Path, paths: Iterable[str]) -> tuple[FileEntry, ...]:
    """List files below `folder` with their sizes and digests, sorted by path."""
    return tuple(_entry(folder, path) for path in sorted(set(paths)))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest into a folder, so that the folder can be opened as a device's slot can."""
    (folder / MANIFEST_PATH).write_bytes(to_bytes(manifest))


def write_package(folder: Path, manifest: Manifest, target: Path) -> str:
    """Pack the files that `manifest` lists from `folder` into `target`; return the package's SHA-256.

    Raises:
        StoreError: The disk refused; nothing is left at `target` that was not there before.
    """
    members: dict[str, Content] = {MANIFEST_PATH: to_bytes(manifest)}
    members.update({entry.path: folder / entry.path for entry in manifest.files})
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".half-", delete=False) as file:
            temporary = Path(file.name)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror}; choose another folder with -o") from error
    try:
        with temporary.open("w+b") as file:
            write_archive(file, members)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror}; free some space") from error
    finally:
        temporary.unlink(missing_ok=True)
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def opened(package: Path) -> Iterator[tuple[Path, Manifest, str]]:
    """Verify a package and unpack it into a temporary folder: (folder, manifest, SHA-256).

    Raises:
        DocumentError: It is no package, or a byte of it was changed.
        StoreError: It cannot be read, or there is no room to unpack it.
    """
    with PackageReader(package) as reader, tempfile.TemporaryDirectory(prefix="edgeopt-") as folder:
        digest = reader.verify()
        reader.extract(Path(folder))
        yield Path(folder), reader.manifest, digest


def report_path(package: Path) -> Path:
    """Where the measured report of a package lies: beside it."""
    return package.with_name(package.name.removesuffix(SUFFIX) + ".report.json")


def _entry(folder: Path, path: str) -> FileEntry:
    file = folder / path
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return FileEntry(path, file.stat().st_size, digest)
