# SPDX-License-Identifier: Apache-2.0
"""The signed repository on disk, as The Update Framework's specification lays it out, made with python-tuf.

    metadata/   1.root.json, N.targets.json, N.snapshot.json, timestamp.json
    targets/    small signed files: one index a package, and fleet/director.json
    blobs/      packages by their SHA-256, as the signed indexes name them

Rules:
- Files are written in the order that keeps the old state valid until the last one: blob, targets, N.targets,
  N.snapshot, timestamp. Each is flushed and renamed into its place.
- Root and targets keys are needed to publish; a control plane that only keeps metadata fresh needs neither.
- Keys that the newest root does not name for their role are refused before anything is written: what they sign, no
  device would believe.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.errors import StoreError, TrustError

if TYPE_CHECKING:
    from securesystemslib.signer import Signer
    from tuf.api.metadata import Metadata

LIFETIMES = {
    "root": timedelta(days=365),
    "targets": timedelta(days=365),
    "snapshot": timedelta(days=30),
    "timestamp": timedelta(days=7),
}
"""How long a role's word is believed; the timestamp is renewed by `freshen`, which needs online keys only."""

RENEW_BEFORE = timedelta(days=2)
DIRECTOR_TARGET = "fleet/director.json"


class Repository:
    """A signed repository in a folder. `now` is the moment that expiries count from."""

    def __init__(self, folder: Path, signers: Mapping[str, Signer], now: datetime) -> None:
        self.folder = folder
        self._signers = signers
        self._now = now

    @property
    def exists(self) -> bool:
        """Whether it was made before."""
        return (self.folder / "metadata" / "timestamp.json").is_file()

    def create(self, director: Mapping[str, Any]) -> None:
        """Make an empty repository whose first target names the director's keys.

        Raises:
            StoreError: The disk refused.
        """
        from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]

        root = Metadata(Root(expires=self._expires("root"), consistent_snapshot=True))
        for role in LIFETIMES:
            root.signed.add_key(self._signers[role].public_key, role)
        targets = Metadata(Targets(expires=self._expires("targets")))
        snapshot = Metadata(Snapshot(expires=self._expires("snapshot")))
        timestamp = Metadata(Timestamp(expires=self._expires("timestamp")))
        self._add_target(targets, DIRECTOR_TARGET, canonical_bytes(director))
        self._write_role("root", root)
        self._finish(targets, snapshot, timestamp)

    def director(self) -> bytes:
        """The bytes of the published director target.

        Raises:
            TrustError: The repository has none.
        """
        return self.read_target(DIRECTOR_TARGET)

    def targets(self) -> dict[str, dict[str, Any]]:
        """Every target's path with its length and SHA-256."""
        signed = self._newest("targets").signed
        return {path: {"length": info.length, **info.hashes} for path, info in signed.targets.items()}

    def read_target(self, path: str) -> bytes:
        """Return a small target's bytes.

        Raises:
            TrustError: The metadata lists no such target.
            StoreError: It cannot be read.
        """
        known = self.targets()
        if path not in known:
            raise TrustError(f"{self.folder} lists no {path}")
        try:
            return self._target_file(path, known[path]["sha256"]).read_bytes()
        except OSError as error:
            raise StoreError(f"cannot read {path} of {self.folder}: {error.strerror}") from error

    def add(self, additions: Mapping[str, bytes], blobs: Mapping[str, Path]) -> None:
        """Publish small targets (path -> bytes) and the blobs (SHA-256 -> file) that they speak of.

        Raises:
            TrustError: A key is none of this repository's.
            StoreError: The disk refused.
        """
        self._check_signers("targets", "snapshot", "timestamp")
        for digest, source in blobs.items():
            _copy(source, self.folder / "blobs" / digest)
        targets = self._newest("targets")
        for path, content in additions.items():
            self._add_target(targets, path, content)
        targets.signed.version += 1
        targets.signed.expires = self._expires("targets")
        self._finish(targets, self._newest("snapshot"), self._newest("timestamp"), first=False)

    def freshen(self) -> bool:
        """Sign snapshot and timestamp again if the timestamp ends soon; return whether it did.

        Raises:
            TrustError: A key is none of this repository's.
            StoreError: The disk refused.
        """
        self._check_signers("snapshot", "timestamp")
        timestamp = self._newest("timestamp")
        if timestamp.signed.expires - self._now > RENEW_BEFORE:
            return False
        snapshot = self._newest("snapshot")
        self._sign_snapshot(snapshot, timestamp)
        return True

    def trusted_root(self) -> bytes:
        """The first root, which devices are given when they are enrolled."""
        try:
            return (self.folder / "metadata" / "1.root.json").read_bytes()
        except OSError as error:
            raise StoreError(f"{self.folder} is no repository; publish a package first") from error

    def _check_signers(self, *roles: str) -> None:
        known = self._newest_root().signed.roles
        for role in roles:
            found = self._signers[role].public_key.keyid
            if found not in known[role].keyids:
                raise TrustError(
                    f"the {role} key {found[:12]} is none of {self.folder}, whose root names "
                    f"{', '.join(keyid[:12] for keyid in known[role].keyids)}; give the --keys that it was made with"
                )

    def _newest_root(self) -> Any:
        from tuf.api.exceptions import RepositoryError
        from tuf.api.metadata import Metadata

        folder = self.folder / "metadata"
        versions = [
            int(number)
            for path in folder.glob("*.root.json")
            if (number := path.name.split(".")[0]).isdigit()
        ]
        if not versions:
            raise StoreError(f"{folder} has no root metadata; the repository is not whole")
        try:
            return Metadata.from_file(str(folder / f"{max(versions)}.root.json"))
        except (OSError, RepositoryError, ValueError) as error:
            raise StoreError(f"cannot read the root metadata of {self.folder}: {error}") from error

    def _finish(self, targets: Any, snapshot: Any, timestamp: Any, *, first: bool = True) -> None:
        self._write_role("targets", targets)
        snapshot.signed.meta["targets.json"].version = targets.signed.version
        self._sign_snapshot(snapshot, timestamp, first=first)

    def _sign_snapshot(self, snapshot: Any, timestamp: Any, *, first: bool = False) -> None:
        if not first:
            snapshot.signed.version += 1
            timestamp.signed.version += 1
        snapshot.signed.expires = self._expires("snapshot")
        timestamp.signed.expires = self._expires("timestamp")
        self._write_role("snapshot", snapshot)
        timestamp.signed.snapshot_meta.version = snapshot.signed.version
        self._write_role("timestamp", timestamp)

    def _add_target(self, targets: Any, path: str, content: bytes) -> None:
        from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]

        info = TargetFile.from_data(path, content, ["sha256"])
        _write(self._target_file(path, info.hashes["sha256"]), content)
        targets.signed.targets[path] = info

    def _target_file(self, path: str, digest: str) -> Path:
        folder, _, name = path.rpartition("/")
        return self.folder / "targets" / folder / f"{digest}.{name}"

    def _write_role(self, role: str, metadata: Metadata[Any]) -> None:
        metadata.signatures.clear()
        metadata.sign(self._signers[role])
        name = "timestamp.json" if role == "timestamp" else f"{metadata.signed.version}.{role}.json"
        _write(self.folder / "metadata" / name, metadata.to_bytes())

    def _newest(self, role: str) -> Metadata[Any]:
        from tuf.api.exceptions import RepositoryError
        from tuf.api.metadata import Metadata

        folder = self.folder / "metadata"
        try:
            if role == "timestamp":
                return Metadata.from_file(str(folder / "timestamp.json"))
            timestamp: Any = Metadata.from_file(str(folder / "timestamp.json"))
            version = timestamp.signed.snapshot_meta.version
            if role == "targets":
                snapshot: Any = Metadata.from_file(str(folder / f"{version}.snapshot.json"))
                version = snapshot.signed.meta["targets.json"].version
            return Metadata.from_file(str(folder / f"{version}.{role}.json"))
        except (OSError, RepositoryError, ValueError) as error:
            raise StoreError(f"cannot read the {role} metadata of {self.folder}: {error}") from error

    def _expires(self, role: str) -> datetime:
        return self._now + LIFETIMES[role]


def _copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            return
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".half-", delete=False) as file:
            with source.open("rb") as opened:
                shutil.copyfileobj(opened, file)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).chmod(0o644)
        Path(file.name).replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror}") from error


def _write(target: Path, content: bytes) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".half-", delete=False) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).chmod(0o644)
        Path(file.name).replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
