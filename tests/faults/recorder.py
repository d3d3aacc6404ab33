# SPDX-License-Identifier: Apache-2.0
"""A FUSE file system that passes everything through to a folder and notes every operation that changes something.

`python recorder.py FOLDER MOUNTPOINT NOTES` mounts until it is unmounted; NOTES is a stream of pickled operations as
`disk.Disk.apply` takes them. Nothing that was ever open is closed, so that the numbers of files stay unique.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import mfusepy


class Recorder(mfusepy.Operations):
    """Pass through and note."""

    use_ns = True

    def __init__(self, folder: Path, notes: Path) -> None:
        self._folder = folder
        self._notes = notes.open("wb")

    def _note(self, *operation: Any) -> None:
        pickle.dump(operation, self._notes)
        self._notes.flush()

    def _at(self, path: str) -> str:
        return str(self._folder / path.lstrip("/"))

    @staticmethod
    def _number(descriptor: int) -> int:
        return os.fstat(descriptor).st_ino

    def access(self, path: str, amode: int) -> int:
        if not os.access(self._at(path), amode):
            raise mfusepy.FuseOSError(13)
        return 0

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._at(path))
        keys = (
            "st_atime",
            "st_ctime",
            "st_gid",
            "st_mode",
            "st_mtime",
            "st_nlink",
            "st_size",
            "st_uid",
            "st_ino",
        )
        return {key: getattr(found, key) for key in keys}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._at(path))]

    def readlink(self, path: str) -> str:
        return os.readlink(self._at(path))

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._at(path))
        keys = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files", "f_flag", "f_frsize",
                "f_namemax")  # fmt: skip
        return {key: getattr(found, key) for key in keys}

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._at(path), mode)
        return 0

    def utimens(self, path: str, times: Any = None) -> int:
        return 0

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        descriptor = os.open(self._at(path), os.O_RDWR | os.O_CREAT, mode)
        self._note("create", path, self._number(descriptor))
        return descriptor

    def open(self, path: str, flags: int) -> int:
        descriptor = os.open(self._at(path), os.O_RDWR)
        self._note("open", path, self._number(descriptor))
        if flags & os.O_TRUNC:
            self._note("truncate", self._number(descriptor), 0)
            os.ftruncate(descriptor, 0)
        return descriptor

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._note("write", self._number(fh), offset, data)
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        number = os.lstat(self._at(path)).st_ino
        self._note("open", path, number)
        self._note("truncate", number, length)
        os.truncate(self._at(path), length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._note("flush", self._number(fh))
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self._note("flush_folder", path)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._at(path), mode)
        self._note("mkdir", path)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._at(path))
        self._note("remove", path)
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._at(path))
        self._note("remove", path)
        return 0

    def rename(self, old: str, new: str) -> int:
        os.rename(self._at(old), self._at(new))
        self._note("rename", old, new)
        return 0

    def link(self, target: str, source: str) -> int:
        os.link(self._at(source), self._at(target))
        self._note("link", source, target)
        return 0

    def symlink(self, target: str, source: str) -> int:
        os.symlink(source, self._at(target))
        self._note("symlink", target, source)
        return 0


def main() -> None:
    """Mount until somebody unmounts."""
    folder, mountpoint, notes = map(Path, sys.argv[1:])
    mfusepy.FUSE(Recorder(folder, notes), str(mountpoint), foreground=True, nothreads=True)


if __name__ == "__main__":
    main()
