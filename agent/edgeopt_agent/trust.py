# SPDX-License-Identifier: Apache-2.0
"""Whom a device believes: The Update Framework's client (python-tuf) over any transport, and the director's word.

Rules:
- The root that the device was given at enrolment is always the start; every later root is signed by the one before.
- What python-tuf keeps is flushed to the disk after each refresh; it does not do that itself.
- Dates are judged by trusted time: never before the agent was built, nor before the newest moment seen signed. A board
  without a battery that wakes in 1970 neither accepts old metadata for ever nor falls behind what it knew.
- Expired metadata blocks new installations only (a `TransportError`: it may be fresh tomorrow). A wrong signature, a
  version that went back or a wrong digest is a `TrustError`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgeopt_agent.files import disk_error, sync_folder
from edgeopt_wire.document import from_bytes, parse_json
from edgeopt_wire.errors import DocumentError, EdgeoptError, StoreError, TransportError, TrustError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.messages import DESIRED_TYPE, MAX_DESIRED_BYTES, Desired

_log = logging.getLogger(__name__)

BUILT_AT = datetime(2026, 11, 1, tzinfo=timezone.utc)
"""No clock that says less is believed."""

DIRECTOR_TARGET = "fleet/director.json"
DIRECTOR_SCHEMA = "edgeopt.director/1"
MAX_TARGET_BYTES = 4 * 1024 * 1024
_BASE = "repository:///"

Fetch = Callable[[str], "bytes | None"]
"""Gives a file of the repository by its relative name, None if there is none; raises TransportError."""


class Trust:
    """The verified view of one repository. `folder` keeps the metadata between starts."""

    def __init__(self, folder: Path, root: bytes, fetch: Fetch, now: Callable[[], datetime]) -> None:
        self._folder = folder
        self._root = root
        self._fetch = fetch
        self._now = now

    def find_index(self, target: str) -> PackageIndex:
        """Return the verified index at a target path.

        Raises:
            TrustError: The metadata or the index is not what was signed, or there is no such target.
            TransportError: The repository cannot be reached, or its metadata has expired.
        """
        return from_bytes(PackageIndex, self._target(target))

    def list_targets(self) -> dict[str, int]:
        """Every signed target's path with its length, for an operator who installs from a folder."""
        updater = self._refreshed()
        # python-tuf offers look-ups by name only; the verified targets are in its set of trusted metadata
        targets = updater._trusted_set["targets"].targets  # noqa: SLF001
        return {path: info.length for path, info in targets.items()}

    def open_desired(self, envelope: bytes, device: str) -> Desired:
        """Return the desired document in a DSSE envelope that the published director signed for this device.

        Raises:
            TrustError: A wrong signature, another device's document, or an expired one.
            TransportError: The director's keys cannot be verified now.
        """
        from securesystemslib.dsse import Envelope
        from securesystemslib.exceptions import FormatError, VerificationError

        if len(envelope) > MAX_DESIRED_BYTES:
            raise TrustError(
                f"a desired document of {len(envelope)} bytes, at most {MAX_DESIRED_BYTES} are read"
            )
        try:
            found = Envelope.from_dict(parse_json(envelope, "desired envelope"))
        except (KeyError, ValueError, TypeError, AttributeError, FormatError) as error:
            raise TrustError(f"the desired document has no readable envelope: {error}") from error
        keys, threshold = self._director()
        try:
            found.verify(keys, threshold)
        except (VerificationError, ValueError) as error:
            raise TrustError("the desired document is not signed by this fleet's director") from error
        if found.payload_type != DESIRED_TYPE:
            raise TrustError(f"the director signed {found.payload_type}, expected {DESIRED_TYPE}")
        desired = from_bytes(Desired, found.payload)
        if desired.device != device:
            raise TrustError(f"the desired document is for {desired.device}, this device is {device}")
        if desired.expires_at < self._now():
            raise TrustError(f"the desired document expired at {desired.expires_at:%Y-%m-%d %H:%M} UTC")
        return desired

    def _director(self) -> tuple[list[Any], int]:
        from securesystemslib.exceptions import FormatError
        from securesystemslib.signer import Key

        document = parse_json(self._target(DIRECTOR_TARGET), "director keys")
        try:
            if document["schema"] != DIRECTOR_SCHEMA:
                raise DocumentError(f"expected schema {DIRECTOR_SCHEMA}, found {document['schema']!r}")
            keys = [Key.from_dict(keyid, dict(value)) for keyid, value in document["keys"].items()]
            return keys, int(document["threshold"])
        except (KeyError, ValueError, TypeError, AttributeError, FormatError) as error:
            raise TrustError(f"{DIRECTOR_TARGET} is signed and cannot be read: {error}") from error

    def _target(self, path: str) -> bytes:
        from tuf.api.exceptions import DownloadError, RepositoryError

        updater = self._refreshed()
        temporary = self._folder / "target.part"
        try:
            info = updater.get_targetinfo(path)
            if info is None:
                raise TrustError(f"the signed metadata lists no {path}")
            if info.length > MAX_TARGET_BYTES:
                raise TrustError(
                    f"{path} is said to have {info.length} bytes, at most {MAX_TARGET_BYTES} are read"
                )
            updater.download_target(info, str(temporary))
            return temporary.read_bytes()
        except RepositoryError as error:
            raise TrustError(f"{path} is not what was signed: {error}") from error
        except DownloadError as error:
            raise _away(path, error) from error
        except OSError as error:
            raise disk_error(f"cannot keep {path}", error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _refreshed(self) -> Any:
        """A python-tuf updater whose metadata is verified and new."""
        from tuf.api.exceptions import DownloadError, ExpiredMetadataError, RepositoryError
        from tuf.ngclient.updater import Updater

        try:
            updater = Updater(
                str(self._folder),
                f"{_BASE}metadata/",
                str(self._folder),
                f"{_BASE}targets/",
                fetcher=_fetcher(self._fetch),
                bootstrap=self._root,
            )
            updater._trusted_set.reference_time = self._now()  # noqa: SLF001 - the only place where it can be set
            updater.refresh()
        except ExpiredMetadataError as error:
            raise TransportError(
                f"the repository's metadata has expired ({error}); what runs goes on, nothing new is installed until "
                "fresh metadata is published"
            ) from error
        except RepositoryError as error:
            raise TrustError(f"the repository's metadata is refused: {error}") from error
        except DownloadError as error:
            raise _away("the metadata", error) from error
        except OSError as error:
            raise disk_error("cannot keep metadata", error) from error
        self._flush()
        return updater

    def _flush(self) -> None:
        try:
            for path in self._folder.rglob("*.json"):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            for path in (self._folder, *(entry for entry in self._folder.rglob("*") if entry.is_dir())):
                sync_folder(path)
        except OSError as error:
            raise disk_error("cannot flush metadata", error) from error


def trusted_now(newest_seen: str, clock: Callable[[], datetime]) -> datetime:
    """The newest of the clock, the moment the agent was built and the newest moment seen signed."""
    from edgeopt_wire.document import parse_moment

    return max(clock(), BUILT_AT, parse_moment(newest_seen) if newest_seen else BUILT_AT)


def read_root(path: Path) -> bytes:
    """Read the root of trust that the device was given.

    Raises:
        StoreError: It is not there.
        TrustError: It is no root.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"cannot read the root of trust {path}: {error.strerror}; enrol the device again"
        ) from error
    try:
        if json.loads(raw)["signed"]["_type"] != "root":
            raise TrustError(f"{path} is no root of trust")
    except (ValueError, KeyError, TypeError) as error:
        raise TrustError(f"{path} is no root of trust: {error}") from error
    return raw


def _fetcher(fetch: Fetch) -> Any:
    from tuf.api.exceptions import DownloadHTTPError
    from tuf.ngclient.fetcher import FetcherInterface

    class TransportFetcher(FetcherInterface):
        """python-tuf's one seam for bytes, on top of a transport."""

        def _fetch(self, url: str) -> Iterator[bytes]:
            content = fetch(url.removeprefix(_BASE))
            if content is None:
                raise DownloadHTTPError(f"there is no {url}", 404)
            return iter([content])

    return TransportFetcher()


def _away(what: str, error: Exception) -> EdgeoptError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, EdgeoptError):
            return cause
        cause = cause.__cause__
    return TransportError(f"cannot fetch {what}: {error}")
