# SPDX-License-Identifier: Apache-2.0
"""A published repository in a folder: a USB stick, a network share, a test. Nothing goes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edgeopt_agent.transports import MAX_FILE_BYTES
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire.archive import safe_path
from edgeopt_wire.errors import DocumentError, ForgedError, TransportError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.messages import EventBatch, Reported


class FolderTransport:
    """Reads `metadata/`, `targets/` and `blobs/` below a folder."""

    tells_time = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def use_clock(self, clock: TrustedClock) -> None:
        """Nothing here has a date."""

    def start(self) -> None:
        """Nothing to connect to."""

    def fetch(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes | None:
        """Return a file, None if there is none.

        Raises:
            ForgedError: The file is larger than it may be.
            TransportError: The folder is gone, or the file cannot be read.
        """
        if not self.folder.is_dir():
            raise TransportError(f"{self.folder} is not here; is the stick plugged in?")
        try:
            path = self.folder / safe_path(name)
        except DocumentError:
            return None
        try:
            with path.open("rb") as file:
                content = file.read(max_bytes + 1)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise TransportError(f"cannot read {path}: {error.strerror}") from error
        if len(content) > max_bytes:
            raise ForgedError(f"{path} is larger than {max_bytes} bytes; it is not what it says")
        return content

    def pull(self, index: PackageIndex, missing: Sequence[int], keep: Callable[[int, bytes], bool]) -> None:
        """Read chunks from the blob.

        Raises:
            TransportError: The blob is not there, cannot be read, or is not what was signed.
        """
        path = self.folder / "blobs" / index.sha256
        try:
            with path.open("rb") as file:
                for number in missing:
                    file.seek(number * index.chunk_bytes)
                    if not keep(number, file.read(index.chunk_length(number))):
                        raise TransportError(
                            f"{path} is damaged at chunk {number}; copy the repository again"
                        )
        except OSError as error:
            raise TransportError(f"cannot read {path}: {error.strerror}") from error

    def report(self, reported: Reported) -> None:
        """Nobody listens."""

    def send(self, batch: EventBatch) -> bool:  # noqa: ARG002 - the protocol's signature
        """Nobody listens; the outbox keeps the events."""
        return False

    def close(self) -> None:
        """Nothing to end."""
