# SPDX-License-Identifier: Apache-2.0
"""A disk that remembers what was flushed: from the operations of a run to what a power cut could have left.

POSIX promises of a file only what `fsync` of it flushed, and of a name only what `fsync` of its folder flushed; all
else may be there, or not, or in part, in any mixture. So a cut behind an operation leaves one of (`LEFT`):

- `flushed`: nothing that was not flushed;
- `names`: every name, but of file contents only what was flushed (delayed allocation: an empty file after a rename);
- `contents`: every content, but of names only what was flushed;
- `torn`: every name, and of contents that were not flushed the first half, then zeros;
- `all`: everything, as after a killed process.

Sources: Pillai et al. 2014, "All File Systems Are Not Created Equal" (the mixtures); Mohan et al. 2018, "Finding
Crash-Consistency Bugs with Bounded Black-Box Crash Testing" (images made from one recorded run).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEFT = ("flushed", "names", "contents", "torn", "all")

Operation = tuple[Any, ...]
"""What `recorder.py` notes: a name and its arguments; files by number, folders and names by path."""

Image = tuple[tuple[str, str | bytes | None], ...]
"""Paths in order with what is there: bytes of a file, text of a symbolic link, None for a folder."""


@dataclass
class File:
    """Contents now and as flushed; None: never."""

    now: bytearray = field(default_factory=bytearray)
    flushed: bytes | None = None


@dataclass
class Folder:
    """Names now and as flushed."""

    now: dict[str, Node] = field(default_factory=dict)
    flushed: dict[str, Node] = field(default_factory=dict)


Node = File | Folder | str


class Disk:
    """The state directory while operations happen. It begins as a copy of `folder`, all of it flushed."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[int, File] = {}
        self._root = _load(folder)

    def apply(self, operation: Operation) -> None:
        """Do what was noted."""
        name, *arguments = operation
        getattr(self, f"_{name}")(*arguments)

    def image(self, left: str) -> Image:
        """What a power cut at this moment leaves."""
        return tuple(_walk(self._root, left, ""))

    def _at(self, path: str) -> tuple[Folder, str]:
        *parents, name = path.strip("/").split("/")
        folder = self._root
        for parent in parents:
            found = folder.now[parent]
            assert isinstance(found, Folder)
            folder = found
        return folder, name

    def _create(self, path: str, number: int) -> None:
        folder, name = self._at(path)
        self._files[number] = File()
        folder.now[name] = self._files[number]

    def _open(self, path: str, number: int) -> None:
        folder, name = self._at(path)
        found = folder.now[name]
        assert isinstance(found, File)
        self._files[number] = found

    def _mkdir(self, path: str) -> None:
        folder, name = self._at(path)
        folder.now[name] = Folder()

    def _symlink(self, path: str, target: str) -> None:
        folder, name = self._at(path)
        folder.now[name] = target

    def _remove(self, path: str) -> None:
        folder, name = self._at(path)
        del folder.now[name]

    def _link(self, old: str, new: str) -> None:
        folder, name = self._at(old)
        node = folder.now[name]
        folder, name = self._at(new)
        folder.now[name] = node

    def _rename(self, old: str, new: str) -> None:
        folder, name = self._at(old)
        node = folder.now.pop(name)
        folder, name = self._at(new)
        folder.now[name] = node

    def _write(self, number: int, offset: int, content: bytes) -> None:
        file = self._files[number]
        if len(file.now) < offset:
            file.now.extend(bytes(offset - len(file.now)))
        file.now[offset : offset + len(content)] = content

    def _truncate(self, number: int, size: int) -> None:
        file = self._files[number]
        del file.now[size:]
        file.now.extend(bytes(size - len(file.now)))

    def _flush(self, number: int) -> None:
        file = self._files[number]
        file.flushed = bytes(file.now)

    def _flush_folder(self, path: str) -> None:
        folder = self._root
        if path.strip("/"):
            parent, name = self._at(path)
            found = parent.now[name]
            assert isinstance(found, Folder)
            folder = found
        folder.flushed = dict(folder.now)


def _load(path: Path) -> Folder:
    loaded = Folder()
    for entry in sorted(path.iterdir()):
        if entry.is_symlink():
            loaded.now[entry.name] = str(entry.readlink())
        elif entry.is_dir():
            loaded.now[entry.name] = _load(entry)
        else:
            content = entry.read_bytes()
            loaded.now[entry.name] = File(bytearray(content), content)
    loaded.flushed = dict(loaded.now)
    return loaded


def _walk(folder: Folder, left: str, path: str) -> Iterator[tuple[str, str | bytes | None]]:
    names = folder.flushed if left in ("flushed", "contents") else folder.now
    for name, node in sorted(names.items()):
        here = f"{path}{name}"
        if isinstance(node, Folder):
            yield here, None
            yield from _walk(node, left, f"{here}/")
        else:
            yield here, node if isinstance(node, str) else _content(node, left)


def _content(file: File, left: str) -> bytes:
    now = bytes(file.now)
    if left in ("contents", "all") or now == file.flushed:
        return now
    if left == "torn":
        return now[: len(now) // 2] + bytes(len(now) - len(now) // 2)
    return file.flushed or b""


def write_image(image: Image, folder: Path) -> None:
    """Lay an image out in an empty folder."""
    folder.mkdir(parents=True)
    for path, content in image:
        target = folder / path
        if content is None:
            target.mkdir()
        elif isinstance(content, str):
            target.symlink_to(content)
        else:
            target.write_bytes(content)


def cuts(before: Path, operations: Sequence[Operation]) -> Iterator[tuple[int, str, Image]]:
    """Every different image that a cut behind any operation can leave: how many operations, what is left, the image."""
    disk, seen = Disk(before), set()
    for number, operation in enumerate([None, *operations]):
        if operation is not None:
            disk.apply(operation)
        for left in LEFT:
            image = disk.image(left)
            if image not in seen:
                seen.add(image)
                yield number, left, image
