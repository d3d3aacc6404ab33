# SPDX-License-Identifier: Apache-2.0
"""A package while it arrives: room is taken before its first byte, every chunk is verified before it is kept.

incoming/<sha256>      the bytes
incoming/<sha256>.map  which chunks are there; it never speaks of bytes that are not flushed
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from edgeopt_agent.files import disk_error, write_durably
from edgeopt_wire.errors import StoreError
from edgeopt_wire.index import PackageIndex

SPARE_BYTES = 8 * 1024 * 1024
"""Kept free for logs, the outbox and the operating system."""


class Incoming:
    """A package while it arrives, chunk by chunk, each verified before it is kept."""

    def __init__(self, path: Path, index: PackageIndex) -> None:
        self.path = path
        self.index = index
        self._map = path.with_name(path.name + ".map")

    def missing(self) -> list[int]:
        """Numbers of the chunks that are not there; those that are were hashed again after a start."""
        return [number for number, there in enumerate(self._known()) if not there]

    def to_take(self) -> int:
        """Bytes of disk that are not taken yet."""
        return max(0, self.index.size_bytes - (self.path.stat().st_size if self.path.exists() else 0))

    def reserve(self, beside: int | None = None) -> None:
        """Take room for these bytes, and see that there is room `beside` them (default: to unpack the package).

        Raises:
            StoreError: There is not enough; the message says how much is.
        """
        need = self.index.size_bytes + (self.index.size_bytes if beside is None else beside) + SPARE_BYTES
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            already = self.path.stat().st_size if self.path.exists() else 0
            free = shutil.disk_usage(self.path.parent).free
            if free + already < need:
                raise StoreError(
                    f"{self.index.name} {self.index.version} needs {need / 1e6:.1f} MB of disk, "
                    f"{(free + already) / 1e6:.1f} MB are free; free some space, the agent tries again"
                )
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, self.index.size_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise disk_error(
                f"cannot take {need / 1e6:.1f} MB of disk for {self.index.name}", error
            ) from error

    def put(self, number: int, chunk: bytes) -> bool:
        """Keep a chunk if it is what was signed; say whether it is.

        Raises:
            StoreError: The disk refused.
        """
        if not 0 <= number < len(self.index.chunks) or len(chunk) != self.index.chunk_length(number):
            return False
        if hashlib.sha256(chunk).hexdigest() != self.index.chunks[number]:
            return False
        try:
            descriptor = os.open(self.path, os.O_WRONLY)
            try:
                os.pwrite(descriptor, chunk, number * self.index.chunk_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise disk_error("cannot keep a chunk", error) from error
        return True

    def checkpoint(self, there: set[int]) -> None:
        """Flush the data, then note which chunks are there: a note never speaks of data that is not on the disk."""
        try:
            descriptor = os.open(self.path, os.O_RDWR)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise disk_error("cannot flush the package", error) from error
        write_durably(self._map, json.dumps(sorted(there)).encode())

    def discard(self) -> None:
        """Throw away what arrived."""
        self._map.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _known(self) -> list[bool]:
        there = [False] * len(self.index.chunks)
        try:
            noted = json.loads(self._map.read_bytes())
            with self.path.open("rb") as file:
                for number in noted:
                    file.seek(number * self.index.chunk_bytes)
                    piece = file.read(self.index.chunk_length(number))
                    there[number] = hashlib.sha256(piece).hexdigest() == self.index.chunks[number]
        except (OSError, ValueError, TypeError, IndexError):
            return [False] * len(self.index.chunks)
        return there
