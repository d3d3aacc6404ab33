# SPDX-License-Identifier: Apache-2.0
"""Memory that a client on the same host shares with us, so that tensors do not travel through the socket.

Two kinds, one use (`read`, `write`):
- *System*: a POSIX segment by name, as the Open Inference Protocol's system shared memory extension has it. Its owner
  may shrink it at any instant, and touching a page that is gone kills a process (SIGBUS); so it is read and written
  through the file (one copy, 20 us for a photo), never mapped. Only segments of the agent's own user are opened.
- *Sealed*: an anonymous memory file whose descriptor came over the Unix socket, sealed against shrinking. That can be
  mapped safely, and is read with no copy at all. It belongs to its connection and goes with it.

Source: Triton "Shared-Memory Extension"; memfd_create(2), F_SEAL_SHRINK in fcntl(2).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import stat
import threading
from typing import Protocol

from edgeopt_agent.serve.refusals import Busy, Forbidden, NotFound, Refused

MAX_REGIONS = 256
MAX_REGION_BYTES = 1024 * 1024 * 1024
_KEY = re.compile(r"/?[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")
_FOLDER = "/dev/shm"  # noqa: S108 - where POSIX shared memory lives; opened with O_NOFOLLOW, of our own user only


class Region(Protocol):
    """`size_bytes` of memory that somebody else also writes to."""

    size_bytes: int

    def read(self, offset: int, size: int) -> memoryview:
        """The bytes at `offset`."""
        ...

    def write(self, offset: int, content: memoryview) -> None:
        """Put bytes at `offset`."""
        ...

    def close(self) -> None:
        """Let go of the memory."""
        ...


class SystemRegion:
    """A window of a POSIX shared memory segment."""

    def __init__(self, key: str, offset: int, size_bytes: int) -> None:
        if not _KEY.fullmatch(key):
            raise Refused(f"the key {key[:80]!r} must match {_KEY.pattern}")
        if offset < 0 or not 0 < size_bytes <= MAX_REGION_BYTES:
            raise Refused(
                f"offset {offset}, byte_size {size_bytes}: expected 0 or more, and 1 to {MAX_REGION_BYTES}"
            )
        self.key, self.offset, self.size_bytes = key, offset, size_bytes
        self._guard = threading.Lock()
        try:
            self._file = os.open(f"{_FOLDER}/{key.lstrip('/')}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise Refused(f"cannot open the shared memory {key!r}: {error.strerror}") from error
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            os.close(self._file)
            raise Forbidden(f"the shared memory {key!r} belongs to another user than the agent")
        if found.st_size < offset + size_bytes:
            os.close(self._file)
            raise Refused(
                f"the shared memory {key!r} has {found.st_size} bytes, {offset} + {size_bytes} were asked for"
            )

    def read(self, offset: int, size: int) -> memoryview:
        """A copy of the bytes at `offset`."""
        content = bytearray(size)
        with self._guard:
            self._check_open()
            got = os.preadv(self._file, [content], self.offset + offset)
        if got != size:
            raise Refused(f"the shared memory {self.key!r} was cut short")
        return memoryview(content)

    def write(self, offset: int, content: memoryview) -> None:
        """Write through the file; a segment that was cut short is not made longer."""
        at = self.offset + offset
        with self._guard:
            self._check_open()
            fits = os.fstat(self._file).st_size >= at + len(content)
            if not fits or os.pwrite(self._file, content, at) != len(content):
                raise Refused(f"the shared memory {self.key!r} was cut short")

    def close(self) -> None:
        """Close the segment; its owner unlinks it."""
        with self._guard:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1

    def _check_open(self) -> None:
        if self._file < 0:
            raise NotFound(f"the shared memory {self.key!r} is not registered any more")


class SealedRegion:
    """A mapped memory file that can no longer shrink."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        try:
            if descriptor < 0:
                raise Refused(
                    "no file descriptor came with the request; sealed memory goes over the Unix socket only"
                )
            try:
                seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            except OSError as error:
                raise Refused(
                    "the descriptor is no memory file (memfd_create with MFD_ALLOW_SEALING)"
                ) from error
            if not seals & fcntl.F_SEAL_SHRINK:
                raise Refused("the memory file is not sealed with F_SEAL_SHRINK; it could vanish under a run")
            if not 0 < size_bytes <= min(os.fstat(descriptor).st_size, MAX_REGION_BYTES):
                raise Refused(
                    f"byte_size {size_bytes}: the memory file has {os.fstat(descriptor).st_size} bytes"
                )
            self._map = mmap.mmap(descriptor, size_bytes)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        self._view = memoryview(self._map)

    def read(self, offset: int, size: int) -> memoryview:
        """The bytes themselves, not a copy."""
        try:
            return self._view[offset : offset + size]
        except ValueError as error:
            raise NotFound("this memory is not registered any more") from error

    def write(self, offset: int, content: memoryview) -> None:
        """Put bytes at `offset`."""
        self.read(offset, len(content))[:] = content

    def close(self) -> None:
        """Unmap it as soon as no array of a run looks at it any more."""
        self._view.release()
        try:
            self._map.close()
        except BufferError:  # arrays of a run still look at it; the last of them unmaps it
            return


class Regions:
    """All regions by name; those with an owner are seen and dropped by their owner alone. Thread-safe."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._regions: dict[tuple[int, str], Region] = {}
        self.generation = 0
        """Changes whenever a region goes: what was read of one before may be gone."""

    def add(self, name: str, region: Region, owner: int = 0) -> None:
        """Register `region`; it is closed again where that is refused.

        Raises:
            Refused: The name is taken.
            Busy: There are too many.
        """
        with self._guard:
            if (owner, name) not in self._regions and len(self._regions) < MAX_REGIONS:
                self._regions[owner, name] = region
                return
            is_known = (owner, name) in self._regions
        region.close()
        if is_known:
            raise Refused(f"the region {name!r} is registered already; unregister it first")
        raise Busy(f"{MAX_REGIONS} regions are registered, no more are taken; unregister some")

    def remove(self, name: str, owner: int = 0) -> None:
        """Unregister one; an unknown name is no error (the protocol's rule)."""
        with self._guard:
            found = self._regions.pop((owner, name), None)
            self.generation += found is not None
        if found is not None:
            found.close()

    def remove_all(self, owner: int = 0) -> None:
        """Unregister all of an owner."""
        with self._guard:
            names = [name for held, name in self._regions if held == owner]
        for name in names:
            self.remove(name, owner)

    def read(self, name: str, offset: int, size: int, owner: int = 0) -> memoryview:
        """Bytes of a region.

        Raises:
            NotFound: No such region.
            Refused: The bytes are not within it.
        """
        return self._find(name, offset, size, owner).read(offset, size)

    def is_mapped(self, name: str, owner: int) -> bool:
        """Whether reading the region gives the memory itself, so that it need not be read again."""
        with self._guard:
            return isinstance(self._regions.get((owner, name)), SealedRegion)

    def write(self, name: str, offset: int, content: memoryview, owner: int = 0) -> None:
        """Put bytes into a region; errors as in `read`."""
        self._find(name, offset, len(content), owner).write(offset, content)

    def status(self, name: str = "") -> list[dict[str, object]]:
        """The system regions as the protocol lists them.

        Raises:
            NotFound: No region called `name`.
        """
        with self._guard:
            found = [
                (known, region)
                for (_, known), region in sorted(self._regions.items())
                if not name or known == name
            ]
        listed: list[dict[str, object]] = [
            {"name": known, "key": region.key, "offset": region.offset, "byte_size": region.size_bytes}
            for known, region in found
            if isinstance(region, SystemRegion)
        ]
        if name and not listed:
            raise NotFound(f"no region {name!r} is registered")
        return listed

    def _find(self, name: str, offset: int, size: int, owner: int) -> Region:
        with self._guard:
            region = self._regions.get((owner, name)) or self._regions.get((0, name))
        if region is None:
            raise NotFound(f"no region {name!r} is registered here")
        if offset < 0 or size < 0 or offset + size > region.size_bytes:
            raise Refused(f"{name}: bytes {offset} to {offset + size} are not within its {region.size_bytes}")
        return region
