# SPDX-License-Identifier: Apache-2.0
"""One verified look at a repository of The Update Framework: python-tuf's client over any transport, within limits.

Rules:
- The root that the device was given is always the start; every later root is signed by the one before.
- A file is asked for with the most bytes that it may have; a source that goes on is cut off there.
- What was verified is flushed to the disk, which python-tuf does not do, and versions never fall below what was seen
  (`edgeopt_agent.version_floor`), even if python-tuf's own files are lost.
- An answer that is not what was signed is a `ForgedError`: another answer may be right later. Expired metadata is a
  `TransportError`: it may be fresh tomorrow.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from edgeopt_agent.files import disk_error, sync_folder
from edgeopt_agent.version_floor import VersionFloor
from edgeopt_wire.errors import ForgedError, TransportError, TrustError

MAX_TARGET_BYTES = 4 * 1024 * 1024
MAX_DELEGATIONS = 32
_BASE = "repository:///"

Fetch = Callable[[str, int], "bytes | None"]
"""Gives a file of the repository by its relative name, at most so many bytes; None if there is none.

Raises TransportError, or ForgedError where the source goes on for longer.
"""


Witness = Callable[["SignedView", bool], str]
"""Says why nothing proves that a view is not older than what was seen; empty where something does. See `version_floor`."""


class SignedView:
    """What a repository signed, as of one refresh; use it for one task and open another for the next."""

    def __init__(self, updater: Any, folder: Path) -> None:
        self._updater = updater
        self._folder = folder
        self._trusted = updater._trusted_set  # noqa: SLF001 - python-tuf gives verified targets by name only

    @property
    def until(self) -> datetime:
        """When the newest word of this repository ends."""
        moment: datetime = self._trusted.timestamp.expires
        return moment

    def targets(self) -> dict[str, int]:
        """Every signed target's path with its length, those of delegated roles within their own paths too."""
        found: dict[str, int] = {}
        waiting: list[tuple[str, str, Any]] = [("targets", "root", None)]
        seen: set[str] = set()
        with _judged("the list of targets"):
            while waiting and len(seen) <= MAX_DELEGATIONS:
                name, parent, allowed = waiting.pop(0)
                if name in seen:
                    continue
                seen.add(name)
                role = self._updater._load_targets(name, parent)  # noqa: SLF001 - as above
                for path, info in role.targets.items():
                    if allowed is None or allowed.is_delegated_path(path):
                        found.setdefault(path, info.length)
                children = (
                    role.delegations.roles.values() if role.delegations and role.delegations.roles else ()
                )
                waiting.extend((child.name, name, child) for child in children)
        flush(self._folder)
        return found

    def find(self, path: str) -> Any:
        """The signed length and digests of a target (python-tuf's `TargetFile`), or None.

        Raises:
            ForgedError: Metadata on the way is not what was signed.
            TransportError: It cannot be fetched now, or has expired.
        """
        with _judged(path):
            info = self._updater.get_targetinfo(path)
        flush(self._folder)
        return info

    def read(self, path: str) -> bytes:
        """A small target's verified bytes.

        Raises:
            TrustError: There is no such target, or it is larger than any that is read.
            ForgedError: What came is not what was signed.
            TransportError: It cannot be fetched now, or metadata has expired.
        """
        info = self.find(path)
        if info is None:
            raise TrustError(f"the signed metadata lists no {path}")
        if info.length > MAX_TARGET_BYTES:
            raise TrustError(
                f"{path} is said to have {info.length} bytes, at most {MAX_TARGET_BYTES} are read"
            )
        temporary = self._folder / "target.part"
        try:
            with _judged(path):
                self._updater.download_target(info, str(temporary))
                return temporary.read_bytes()
        finally:
            temporary.unlink(missing_ok=True)


def open_view(
    folder: Path, root: bytes, fetch: Fetch, now: datetime, *, witness: Witness = lambda _view, _damaged: ""
) -> SignedView:
    """Refresh the metadata in `folder` and return the view of it, dates judged as of `now`.

    `witness` is asked where the floor of versions is not there (`version_floor`).

    Raises:
        ForgedError: What came is not what was signed, or is older than what was seen.
        TransportError: The repository cannot be reached, or its metadata has expired.
        StoreError: The disk refused.
    """
    from tuf.ngclient.config import UpdaterConfig
    from tuf.ngclient.updater import Updater

    floor = VersionFloor(folder)
    with _judged("the repository's metadata"):
        updater = Updater(
            str(folder),
            f"{_BASE}metadata/",
            str(folder),
            f"{_BASE}targets/",
            fetcher=_fetcher(fetch),
            config=UpdaterConfig(max_delegations=MAX_DELEGATIONS),
            bootstrap=root,
        )
        trusted = updater._trusted_set  # noqa: SLF001 - the only place where the moment can be set
        trusted.reference_time = now
        updater.refresh()
    flush(folder)
    view = SignedView(updater, folder)
    floor.raise_to(
        trusted.root, trusted.timestamp, trusted.snapshot, lambda is_damaged: witness(view, is_damaged)
    )
    return view


def flush(folder: Path) -> None:
    """Flush python-tuf's files and folders to the disk.

    Raises:
        StoreError: The disk refused.
    """
    try:
        for path in folder.rglob("*.json"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        for path in (folder, *(entry for entry in folder.rglob("*") if entry.is_dir())):
            sync_folder(path)
    except OSError as error:
        raise disk_error("cannot flush metadata", error) from error


@contextmanager
def _judged(what: str) -> Iterator[None]:
    """Say in our words what python-tuf found; our own errors pass."""
    from tuf.api.exceptions import (
        DownloadError,
        DownloadLengthMismatchError,
        ExpiredMetadataError,
        RepositoryError,
    )

    try:
        yield
    except ExpiredMetadataError as error:
        raise TransportError(
            f"the repository's metadata has expired ({error}); what runs goes on, nothing new is installed until "
            "fresh metadata is published, or until this device's clock is right"
        ) from error
    except (RepositoryError, DownloadLengthMismatchError) as error:
        raise ForgedError(f"{what} is not what was signed and is refused: {error}") from error
    except DownloadError as error:
        raise TransportError(f"cannot fetch {what}: {error}") from error
    except OSError as error:
        raise disk_error(f"cannot keep {what}", error) from error


def _fetcher(fetch: Fetch) -> Any:
    from tuf.api.exceptions import DownloadHTTPError, DownloadLengthMismatchError
    from tuf.ngclient.fetcher import FetcherInterface

    class TransportFetcher(FetcherInterface):
        """python-tuf's one seam for bytes, on top of a transport that is told the limit."""

        @contextmanager
        def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
            content = fetch(url.removeprefix(_BASE), max_length)
            if content is None:
                raise DownloadHTTPError(f"there is no {url.removeprefix(_BASE)}", 404)
            if len(content) > max_length:
                raise DownloadLengthMismatchError(f"{len(content)} bytes came, at most {max_length} are read")
            yield io.BytesIO(content)

        def _fetch(self, url: str) -> Iterator[bytes]:
            with self.download_file(url, MAX_TARGET_BYTES) as content:
                yield content.read()

    return TransportFetcher()
