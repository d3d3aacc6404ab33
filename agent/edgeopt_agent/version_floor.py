# SPDX-License-Identifier: Apache-2.0
"""The newest versions of signed metadata that a device has seen, kept apart from python-tuf's own files.

    floor/versions-{0,1}.json   two copies with generations, both written each time: losing one loses nothing
    versions.floor              the same for agents that knew one file; what it says counts too
    floor/kept                  python-tuf's files as they were when the floor was not there; until there is one

Rules:
- Versions never fall, and nothing that a snapshot listed disappears, as the specification says (5.3 to 5.6). python-tuf
  remembers that in the metadata files alone: a power cut that loses one of them would let an old version in.
- A floor belongs to the keys that signed it. Where the root names other keys for a role, the floor starts again: that
  is how a fleet recovers from a thief who signed a version far ahead (fast-forward, 5.3.11).
- A floor that is lost is taken from python-tuf's files where these are whole and signed, as they were before it looked
  again: what came later may be old. Else it begins anew only with a proof (`edgeopt_agent.past`), never silently: `FloorLostError` until there is one.
- A copy that the disk refuses to read now may be the newest: nothing new is believed before it is read (`StoreError`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeopt_agent.files import disk_error, write_durably
from edgeopt_agent.records import Record, set_aside
from edgeopt_wire.document import canonical_bytes, parse_json
from edgeopt_wire.errors import DocumentError, ForgedError

_log = logging.getLogger(__name__)

SCHEMA = "edgeopt.version-floor/1"
SIGNED_FILES = ("timestamp", "snapshot")

Roles = dict[str, dict[str, Any]]
"""By role the ids of its keys (`keys`), and by name of metadata the newest version (`meta`)."""


class FloorLostError(ForgedError):
    """What this device knew of the newest versions is lost: what comes may be old, and nothing proves that it is not."""


class VersionFloor:
    """The floor in the folder of the metadata. Make it before python-tuf writes over its files there.

    Raises:
        StoreError: The disk refuses to read it now, or a newer agent wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self._single = folder / "versions.floor"
        self._record = Record(folder / "floor", "versions", "floor", SCHEMA, mirrored=True)
        self._known = self._load()
        self._kept_path = folder / "floor" / "kept"
        self._kept = {} if self._known else self._keep(folder)

    def raise_to(
        self, root: Any, timestamp: Any, snapshot: Any, witness: Callable[[bool], str] = lambda _: ""
    ) -> None:
        """Refuse what fell below the floor, and keep what is new.

        `witness` is asked only where the floor is lost or never was, and told which of the two is known: why nothing
        proves that this is not older than what was seen; empty where something does.

        Raises:
            FloorLostError: The floor is lost, and `witness` has no proof.
            ForgedError: A version fell, or a file that was listed is listed no more.
            StoreError: The disk refused.
        """
        found = _roles(root, timestamp, snapshot)
        known = self._known or self._signed_before(root)
        if not known:
            why = witness(self._is_damaged)
            if why:
                raise FloorLostError(
                    "what this device knew of the repository's newest versions is lost, and nothing proves that these "
                    f"are not older ones: {why}; what runs goes on, nothing new is installed until the control plane "
                    "signs the time for this device or the repository lists what is installed here; where neither can "
                    "happen, enrol the device with an empty state_dir"
                )
        for before in known:
            _check_all(before, found)
        if known != [found, found] or not all(path.exists() for path in self._record.paths):
            self._record.save({"schema": SCHEMA, "roles": found})
            write_durably(self._single, canonical_bytes(found))
            self._kept_path.unlink(missing_ok=True)

    @property
    def _is_damaged(self) -> bool:
        single = self._single
        return self._record.was_damaged or single.with_name(f"{single.name}.bad").exists()

    def _load(self) -> list[Roles]:
        """What each form of the record says, of those that are whole."""
        found = []
        newest = self._record.load(to_write=True)
        if newest is not None:
            try:
                found.append(_understood(newest[1]["roles"]))
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                for path in self._record.paths:
                    set_aside(path, error)
        try:
            found.append(_understood(parse_json(self._single.read_bytes(), self._single.name)))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise disk_error(f"cannot read {self._single}", error) from error
        except (DocumentError, KeyError, ValueError, TypeError, AttributeError) as error:
            set_aside(self._single, error)
        return found

    def _keep(self, folder: Path) -> dict[str, bytes]:
        """python-tuf's files as they were when the floor was first found not to be there."""
        try:
            kept = parse_json(self._kept_path.read_bytes(), self._kept_path.name)
            return {name: str(text).encode() for name, text in kept.items()}
        except FileNotFoundError:
            found = _read_signed(folder)
            write_durably(self._kept_path, canonical_bytes(found))
            return {name: text.encode() for name, text in found.items()}
        except OSError as error:
            raise disk_error(f"cannot read {self._kept_path}", error) from error
        except DocumentError:
            return {}

    def _signed_before(self, root: Any) -> list[Roles]:
        """The floor that python-tuf's own files make, where all are whole and signed as this root says."""
        from tuf.api.exceptions import RepositoryError
        from tuf.api.metadata import Metadata

        try:
            signed = {name: Metadata.from_bytes(self._kept[name]) for name in SIGNED_FILES}
            for name, metadata in signed.items():
                root.verify_delegate(name, metadata.signed_bytes, metadata.signatures)
            found = _roles(root, signed["timestamp"].signed, signed["snapshot"].signed)
        except (KeyError, ValueError, AttributeError, RepositoryError):
            return []
        if self._is_damaged:
            _log.error(
                "the newest versions of metadata were lost; the signed files that are here say them again"
            )
        return [found]


def _roles(root: Any, timestamp: Any, snapshot: Any) -> Roles:
    listed = {name: info.version for name, info in snapshot.meta.items()}
    return {
        "root": {"keys": [], "meta": {"root": root.version}},
        "timestamp": {
            "keys": sorted(root.roles["timestamp"].keyids),
            "meta": {"timestamp": timestamp.version},
        },
        "snapshot": {
            "keys": sorted(root.roles["snapshot"].keyids),
            "meta": {"snapshot": snapshot.version, **listed},
        },
    }


def _understood(roles: Any) -> Roles:
    return {
        role: {"keys": list(entry["keys"]), "meta": {str(k): int(v) for k, v in entry["meta"].items()}}
        for role, entry in roles.items()
    }


def _read_signed(folder: Path) -> dict[str, str]:
    found = {}
    for name in SIGNED_FILES:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found[name] = (folder / f"{name}.json").read_bytes().decode()
    return found


def _check_all(before: Roles, found: Roles) -> None:
    for role, entry in found.items():
        known = before.get(role)
        if known is not None and known["keys"] == entry["keys"]:
            _check(role, known["meta"], entry["meta"])


def _check(role: str, before: dict[str, int], now: dict[str, int]) -> None:
    for name, version in before.items():
        if name not in now:
            raise ForgedError(f"the {role} does not list {name} any more, which it did (version {version})")
        if now[name] < version:
            raise ForgedError(
                f"{name} went back from version {version} to {now[name]}; old metadata is repeated by somebody, or the "
                "repository was restored from a backup"
            )
