# SPDX-License-Identifier: Apache-2.0
"""The package file: a deterministic, stored, aligned ZIP, written here and read with suspicion.

Rules:
- Same files, same bytes: members sorted (the manifest first), no time, no compression, fixed attributes.
- A member of 64 KiB or more starts on a page, so that a runtime can map it from the package itself.
- Reading refuses: unsafe names, links, duplicates, compression, members not in the manifest, sizes that do not
  add up, digests that do not match. Any flipped byte is found: `verify` writes the archive again and compares.
"""

import hashlib
import os
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from edgeopt_wire.document import from_bytes
from edgeopt_wire.errors import DocumentError, StoreError
from edgeopt_wire.manifest import MANIFEST_PATH, FileEntry, Manifest

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_MEMBERS = 1000
PAGE_BYTES = 4096
_ALIGN_FROM_BYTES = 64 * 1024
_ALIGNMENT_FIELD = 0xD935  # the extra field that Android's zipalign uses for the same purpose
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest moment that ZIP can say
_LOCAL_HEADER_BYTES, _NAME_LENGTHS_AT = 30, 26
_READ_BYTES = 1024 * 1024

Content = bytes | Path


def safe_path(name: str) -> str:
    """Return `name` if it is a plain relative POSIX path of harmless characters.

    Raises:
        DocumentError: Absolute, `..`, backslash, empty part, control or odd character, or over 200 characters.
    """
    allowed = all(c.isascii() and (c.isalnum() or c in "._-/") for c in name)
    parts = name.split("/")
    if not allowed or not 0 < len(name) <= 200 or any(part in ("", ".", "..") for part in parts):
        raise DocumentError(f"{name!r} is not a safe path inside a package")
    return name


def write_archive(target: IO[bytes], members: Mapping[str, Content]) -> None:
    """Write `members` (path -> bytes, or a file to copy) as a package; `target` must be seekable.

    Raises:
        DocumentError: A path is unsafe, or the manifest is missing.
        StoreError: The disk refused.
    """
    if MANIFEST_PATH not in members:
        raise DocumentError(f"a package needs {MANIFEST_PATH}")
    ordered = sorted(members, key=_order)
    try:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name in ordered:
                _write_member(archive, safe_path(name), members[name])
    except OSError as error:
        raise StoreError(f"cannot write the package: {error}") from error


class PackageReader:
    """A package opened for reading. Opening checks its structure; `verify` checks every byte.

    Use as a context manager.

    Raises:
        DocumentError: Not a package, or a hostile one.
        StoreError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise StoreError(f"cannot open {path}: {error.strerror}") from error
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self._file)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise DocumentError(f"{self.path} is not a package: {error}") from error
        self._members = _checked_members(self._zip, self.path)
        if MANIFEST_PATH not in self._members:
            raise DocumentError(f"{self.path} is not a package: it has no {MANIFEST_PATH}")
        if self._members[MANIFEST_PATH].file_size > MAX_MANIFEST_BYTES:
            raise DocumentError(f"{self.path}: the manifest is larger than {MAX_MANIFEST_BYTES} bytes")
        self.manifest = from_bytes(Manifest, self._read_all(MANIFEST_PATH))
        self._check_listed()

    def __enter__(self) -> "PackageReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._zip.close()
        self._file.close()

    def read(self, path: str) -> bytes:
        """Return a listed file's bytes, checked against its digest."""
        entry = self._entry(path)
        raw = self._read_all(path)
        if hashlib.sha256(raw).hexdigest() != entry.sha256:
            raise DocumentError(
                f"{self.path}: {path} does not match its digest; fetch or build the package again"
            )
        return raw

    def place(self, path: str) -> tuple[int, int]:
        """Where a listed file lies in the package: offset and length in bytes.

        Raises:
            DocumentError: The package holds no such file.
        """
        info = self._members[self._entry(path).path]
        self._file.seek(info.header_offset + _NAME_LENGTHS_AT)
        name, extra = struct.unpack("<HH", self._file.read(4))
        return info.header_offset + _LOCAL_HEADER_BYTES + name + extra, info.file_size

    def extract(self, folder: Path, prefix: str = "") -> None:
        """Write the files below `prefix` (and the manifest) into `folder`, checked, each flushed to the disk.

        Raises:
            DocumentError: A digest does not match; nothing of that file stays.
            StoreError: The disk refused.
        """
        for entry in self.manifest.files:
            if entry.path.startswith(prefix):
                self._extract(entry, folder / entry.path)
        _write_synced(folder / MANIFEST_PATH, iter([self._read_all(MANIFEST_PATH)]))

    def extract_file(self, path: str, target: Path) -> None:
        """Write one listed file, or the manifest, to `target`, checked and flushed to the disk.

        Raises:
            DocumentError: Its digest does not match; nothing of it stays.
            StoreError: The disk refused.
        """
        if path == MANIFEST_PATH:
            _write_synced(target, iter([self._read_all(path)]))
        else:
            self._extract(self._entry(path), target)

    def verify(self) -> str:
        """Check every byte of the file and return its SHA-256.

        Raises:
            DocumentError: Some byte is not what the writer would have written.
        """
        for entry in self.manifest.files:
            digest = hashlib.sha256()
            for piece in self._pieces(entry.path):
                digest.update(piece)
            if digest.hexdigest() != entry.sha256:
                raise DocumentError(f"{self.path}: {entry.path} does not match its digest")
        found = _digest_of(self._file)
        if found != self._rewritten_digest():
            raise DocumentError(
                f"{self.path}: bytes between the files were changed; fetch or build the package again"
            )
        return found

    def _rewritten_digest(self) -> str:
        with tempfile.TemporaryFile() as copy:
            with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name in sorted(self._members, key=_order):
                    with _member(archive, name, self._members[name].file_size) as member:
                        for piece in self._pieces(name):
                            member.write(piece)
            return _digest_of(copy)

    def _entry(self, path: str) -> FileEntry:
        for entry in self.manifest.files:
            if entry.path == path:
                return entry
        raise DocumentError(f"{self.path} holds no {path!r}")

    def _extract(self, entry: FileEntry, target: Path) -> None:
        digest = hashlib.sha256()

        def hashed() -> Iterator[bytes]:
            for piece in self._pieces(entry.path):
                digest.update(piece)
                yield piece

        _write_synced(target, hashed())
        if digest.hexdigest() != entry.sha256:
            target.unlink()
            raise DocumentError(f"{self.path}: {entry.path} does not match its digest")

    def _pieces(self, path: str) -> Iterator[bytes]:
        try:
            with self._zip.open(self._members[path]) as member:
                while piece := member.read(_READ_BYTES):
                    yield piece
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
            raise DocumentError(f"{self.path}: {path} is damaged: {error}") from error
        except OSError as error:
            raise StoreError(f"cannot read {self.path}: {error}") from error

    def _read_all(self, path: str) -> bytes:
        return b"".join(self._pieces(path))

    def _check_listed(self) -> None:
        listed = {safe_path(entry.path): entry.size_bytes for entry in self.manifest.files}
        found = {name: info.file_size for name, info in self._members.items() if name != MANIFEST_PATH}
        if listed != found:
            odd = sorted(listed.keys() ^ found.keys()) or sorted(n for n in listed if listed[n] != found[n])
            raise DocumentError(f"{self.path}: the manifest and the content differ at {odd[0]!r}")


def _checked_members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise DocumentError(f"{path}: {len(infos)} members, at most {MAX_MEMBERS} are allowed")
    members: dict[str, zipfile.ZipInfo] = {}
    file_bytes = path.stat().st_size
    for info in infos:
        name = safe_path(info.filename)
        if not 0 <= info.header_offset <= file_bytes:
            raise DocumentError(f"{path}: the member {name!r} starts outside of the file")
        if name in members:
            raise DocumentError(f"{path}: the member {name!r} stands twice")
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.compress_size != info.file_size
            or info.flag_bits & 1
        ):
            raise DocumentError(
                f"{path}: the member {name!r} is compressed or encrypted; packages are stored"
            )
        members[name] = info
    if sum(info.file_size for info in infos) > file_bytes:
        raise DocumentError(f"{path}: its members claim more bytes than the file has")
    return members


def _write_member(archive: zipfile.ZipFile, name: str, content: Content) -> None:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    with _member(archive, name, size) as member:
        if isinstance(content, bytes):
            member.write(content)
        else:
            with content.open("rb") as source:
                while piece := source.read(_READ_BYTES):
                    member.write(piece)


@contextmanager
def _member(archive: zipfile.ZipFile, name: str, size: int) -> Iterator[IO[bytes]]:
    info = zipfile.ZipInfo(str(PurePosixPath(name)), _EPOCH)
    info.external_attr = 0o100644 << 16
    info.create_system = 3
    info.file_size = size
    if size >= _ALIGN_FROM_BYTES:
        info.extra = _alignment(archive.start_dir, len(name), size)
    with archive.open(info, "w") as member:
        yield member


def _alignment(offset: int, name_bytes: int, size: int) -> bytes:
    header = _LOCAL_HEADER_BYTES + name_bytes + 4 + 2 + (20 if size > zipfile.ZIP64_LIMIT else 0)
    padding = -(offset + header) % PAGE_BYTES
    return struct.pack("<HHH", _ALIGNMENT_FIELD, 2 + padding, PAGE_BYTES) + bytes(padding)


def _order(name: str) -> tuple[bool, str]:
    return (name != MANIFEST_PATH, name)


def _digest_of(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(_READ_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def _write_synced(target: Path, pieces: Iterator[bytes]) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror}; free some space and try again") from error
