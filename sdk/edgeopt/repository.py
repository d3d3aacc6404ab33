# SPDX-License-Identifier: Apache-2.0
"""The signed repository on disk, as The Update Framework's specification lays it out, made with python-tuf.

    metadata/   1.root.json, N.targets.json, N.snapshot.json, timestamp.json, N.<team>.json
    targets/    small signed files: one index a package, and fleet/director.json
    blobs/      packages by their SHA-256, as the signed indexes name them

Rules:
- Files are written in the order that keeps the old state valid until the last one: blob, targets, N.targets,
  N.snapshot, timestamp. Each is flushed and renamed into its place, by one process at a time (`locked`).
- Root and targets keys are needed to publish; a control plane that only keeps metadata fresh needs neither.
- Keys that the newest root does not name for their role are refused before anything is written: what they sign, no
  device would believe.
- What a team signed for its own models counts once the snapshot lists it: whoever holds the snapshot key takes it up
  after the same checks that a device makes (`edgeopt.teams`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.repository_files import copy_file, locked, write_file
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
        self.signers = signers
        self._now = now
        self._depth = 0

    @property
    def exists(self) -> bool:
        """Whether it was made before."""
        return (self.folder / "metadata" / "timestamp.json").is_file()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the repository's lock; may be nested.

        Raises:
            StoreError: Another process holds it for too long.
        """
        if self._depth:
            yield
            return
        with locked(self.folder):
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def create(self, director: Mapping[str, Any], roots: Sequence[Signer] = ()) -> None:
        """Make an empty repository whose first target names the director's keys.

        `roots` are the root signers, by default the one of `signers`; a majority of them must sign every later root.

        Raises:
            StoreError: The disk refused.
        """
        from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]

        roots = roots or (self.signers["root"],)
        root = Metadata(Root(expires=self.expires("root"), consistent_snapshot=True))
        for signer in roots:
            root.signed.add_key(signer.public_key, "root")
        root.signed.roles["root"].threshold = majority(len(roots))
        for role in ("targets", "snapshot", "timestamp"):
            root.signed.add_key(self.signers[role].public_key, role)
        targets = Metadata(Targets(expires=self.expires("targets")))
        snapshot = Metadata(Snapshot(expires=self.expires("snapshot")))
        timestamp = Metadata(Timestamp(expires=self.expires("timestamp")))
        with self.held():
            self._add_target(targets, DIRECTOR_TARGET, canonical_bytes(director))
            self.write_role("root", root, roots)
            self.write_role("targets", targets)
            self.write_role("snapshot", snapshot)
            self.write_role("timestamp", timestamp)

    def director(self) -> bytes:
        """The bytes of the published director target.

        Raises:
            TrustError: The repository has none.
        """
        return self.read_target(DIRECTOR_TARGET)

    def targets(self) -> dict[str, dict[str, Any]]:
        """Every target's path with its length and SHA-256, those of teams within their own models too."""
        from edgeopt.teams import team_targets

        signed: Any = self.newest("targets").signed
        found = dict(team_targets(self))
        found.update(signed.targets)
        return {path: {"length": info.length, **info.hashes} for path, info in found.items()}

    def read_target(self, path: str) -> bytes:
        """Return a small target's bytes.

        Raises:
            TrustError: The metadata lists no such target.
            StoreError: It cannot be read.
        """
        known = self.targets()
        if path not in known:
            raise TrustError(f"{self.folder} lists no {path}")
        return self.read_small(path, known[path]["sha256"])

    def read_small(self, path: str, digest: str) -> bytes:
        """Return the bytes of a small target with this SHA-256, signed or not yet listed.

        Raises:
            StoreError: It cannot be read.
        """
        try:
            return self._target_file(path, digest).read_bytes()
        except OSError as error:
            raise StoreError(f"cannot read {path} of {self.folder}: {error.strerror}") from error

    def add(self, additions: Mapping[str, bytes], blobs: Mapping[str, Path]) -> None:
        """Publish small targets (path -> bytes) and the blobs (SHA-256 -> file) that they speak of.

        Raises:
            TrustError: A key is none of this repository's.
            StoreError: The disk refused.
        """
        with self.held():
            self.check_signers("targets", "snapshot", "timestamp")
            self.keep_blobs(blobs)
            targets = self.newest("targets")
            self.put_targets(targets, additions)
            self.write_role("targets", targets)
            self.sign_snapshot({"targets.json": targets.signed.version})

    def keep_blobs(self, blobs: Mapping[str, Path]) -> None:
        """Copy packages (SHA-256 -> file) to where devices pull them from; without metadata nobody asks for them."""
        for digest, source in blobs.items():
            copy_file(source, self.folder / "blobs" / digest)

    def put_targets(self, metadata: Any, additions: Mapping[str, bytes]) -> None:
        """List small targets in targets metadata and count its version up; what is signed next says so."""
        for path, content in additions.items():
            self._add_target(metadata, path, content)
        metadata.signed.version += 1
        metadata.signed.expires = self.expires("targets")

    def freshen(self) -> bool:
        """Sign snapshot and timestamp again if the timestamp ends soon or a team has signed; return whether it did.

        Raises:
            TrustError: A key is none of this repository's.
            StoreError: The disk refused.
        """
        from edgeopt.teams import pending

        with self.held():
            self.check_signers("snapshot", "timestamp")
            news = pending(self)
            timestamp: Any = self.newest("timestamp")
            if not news and timestamp.signed.expires - self._now > RENEW_BEFORE:
                return False
            self.sign_snapshot(news)
            return True

    def trusted_root(self) -> bytes:
        """The first root, which devices are given when they are enrolled."""
        try:
            return (self.folder / "metadata" / "1.root.json").read_bytes()
        except OSError as error:
            raise StoreError(f"{self.folder} is no repository; publish a package first") from error

    def check_signers(self, *roles: str) -> None:
        """Refuse keys that the newest root does not name for their role.

        Raises:
            TrustError: It does not.
        """
        known = self.newest("root").signed.roles
        for role in roles:
            found = self.signers[role].public_key.keyid
            if found not in known[role].keyids:
                raise TrustError(
                    f"the {role} key {found[:12]} is none of {self.folder}, whose root names "
                    f"{', '.join(keyid[:12] for keyid in known[role].keyids)}; give the --keys that it was made with"
                )

    def sign_snapshot(
        self, versions: Mapping[str, int], extra: Mapping[str, Sequence[Signer]] | None = None
    ) -> None:
        """Write the next snapshot with these files' versions, and the timestamp of it.

        `extra` signers by role sign too, so that devices which know the old keys and those which know the new ones both
        believe it.
        """
        from tuf.api.metadata import MetaFile  # type: ignore[attr-defined]

        more = extra or {}
        snapshot: Any = self.newest("snapshot")
        timestamp: Any = self.newest("timestamp")
        for name, version in versions.items():
            snapshot.signed.meta.setdefault(name, MetaFile(version)).version = version
        snapshot.signed.version += 1
        timestamp.signed.version += 1
        snapshot.signed.expires = self.expires("snapshot")
        timestamp.signed.expires = self.expires("timestamp")
        self.write_role("snapshot", snapshot, (self.signers["snapshot"], *more.get("snapshot", ())))
        timestamp.signed.snapshot_meta.version = snapshot.signed.version
        self.write_role("timestamp", timestamp, (self.signers["timestamp"], *more.get("timestamp", ())))

    def write_role(self, role: str, metadata: Metadata[Any], signers: Sequence[Signer] = ()) -> None:
        """Sign metadata, by default with the role's own signer, and put it into its place."""
        metadata.signatures.clear()
        for signer in signers or (self.signers[role],):
            metadata.sign(signer, append=True)
        name = "timestamp.json" if role == "timestamp" else f"{metadata.signed.version}.{role}.json"
        write_file(self.folder / "metadata" / name, metadata.to_bytes())

    def newest(self, role: str) -> Metadata[Any]:
        """The newest metadata of root, timestamp, snapshot, targets or a team, as the snapshot lists it.

        Raises:
            StoreError: It cannot be read.
        """
        if role == "root":
            return self.read_role("root", self._newest_root_version())
        if role == "timestamp":
            return self.read_role(role, None)
        timestamp: Any = self.read_role("timestamp", None)
        version = timestamp.signed.snapshot_meta.version
        if role != "snapshot":
            snapshot: Any = self.read_role("snapshot", version)
            listed = snapshot.signed.meta.get(f"{role}.json")
            if listed is None:
                raise StoreError(f"the snapshot of {self.folder} lists no {role}.json")
            version = listed.version
        return self.read_role(role, version)

    def read_role(self, role: str, version: int | None) -> Metadata[Any]:
        """One metadata file as it stands, unchecked; `version` is None for the timestamp.

        Raises:
            StoreError: It cannot be read.
        """
        from tuf.api.exceptions import RepositoryError
        from tuf.api.metadata import Metadata

        name = f"{role}.json" if version is None else f"{version}.{role}.json"
        path = self.folder / "metadata" / name
        try:
            return Metadata.from_bytes(path.read_bytes())
        except (OSError, RepositoryError, ValueError) as error:
            raise StoreError(f"cannot read the {role} metadata of {self.folder}: {error}") from error

    def expires(self, role: str) -> datetime:
        """When what is signed now for a role ends."""
        return self._now + LIFETIMES[role]

    def _newest_root_version(self) -> int:
        folder = self.folder / "metadata"
        versions = [
            int(number)
            for path in folder.glob("*.root.json")
            if (number := path.name.split(".")[0]).isdigit()
        ]
        if not versions:
            raise StoreError(f"{folder} has no root metadata; the repository is not whole")
        return max(versions)

    def _add_target(self, targets: Any, path: str, content: bytes) -> None:
        from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]

        info = TargetFile.from_data(path, content, ["sha256"])
        write_file(self._target_file(path, info.hashes["sha256"]), content)
        targets.signed.targets[path] = info

    def _target_file(self, path: str, digest: str) -> Path:
        folder, _, name = path.rpartition("/")
        return self.folder / "targets" / folder / f"{digest}.{name}"


def majority(count: int) -> int:
    """How many of so many root keys must sign: more than half."""
    return count // 2 + 1
