# SPDX-License-Identifier: Apache-2.0
"""What a device keeps: state records, packages on their way, and two slots for each model.

    models/<name>/state-{0,1}.json   the state record, two copies in turn; each has a generation and a checksum
    models/<name>/{A,B}/             slots: unpacked packages
    incoming/<sha256>                a package while it arrives; .map holds which chunks were verified
    device.json                      the highest revision of `desired`, the newest trusted moment

Rules:
- A record whose content is wrong is set aside, never a reason not to start; the other copy counts. One that the disk
  refuses to read now stays where it is.
- Room for a package is taken before its first byte, so that a full disk is known before the network is used.
- A slot is marked whole by its `.whole` file, written last; a slot without it is rubbish.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeopt_agent.files import disk_error, sync_folder, write_durably
from edgeopt_agent.machine import State
from edgeopt_wire.archive import PackageReader
from edgeopt_wire.document import canonical_bytes, from_bytes, from_json, parse_json, to_bytes, to_json
from edgeopt_wire.errors import DocumentError, StoreError, TrustError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.manifest import MANIFEST_PATH, Manifest, check_name

_log = logging.getLogger(__name__)

SPARE_BYTES = 8 * 1024 * 1024
"""Kept free for logs, the outbox and the operating system."""


@dataclass(frozen=True)
class DeviceRecord:
    """What concerns the whole device.

    `revision` and `desired_sha256` are of the newest desired document, `director` the ids of the keys that could sign
    it, `newest_moment` the newest moment seen signed.
    """

    SCHEMA = "edgeopt.device-record/1"

    revision: int = 0
    desired_sha256: str = ""
    newest_moment: str = ""
    desired: str = ""
    director: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


class Store:
    """The state directory.

    Raises:
        StoreError: It cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            (folder / "models").mkdir(parents=True, exist_ok=True)
            (folder / "incoming").mkdir(exist_ok=True)
            (folder / "metadata").mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(f"cannot use the state directory {folder}", error) from error

    def models(self) -> list[str]:
        """Names of the models that have a record."""
        return sorted(path.name for path in (self.folder / "models").iterdir() if path.is_dir())

    def load_state(self, model: str) -> State:
        """The newest readable record of a model, or a fresh one."""
        newest = self._newest(model)
        return newest[1] if newest else State(model)

    def save_state(self, state: State) -> None:
        """Write the record over the older of its two copies, flushed."""
        newest = self._newest(state.model, to_write=True)
        generation = newest[0] + 1 if newest else 1
        body = to_json(state)
        record = {"generation": generation, "state": body, "sha256": _checksum(generation, body)}
        write_durably(self._record(state.model, generation % 2), canonical_bytes(record))

    def load_device(self) -> DeviceRecord:
        """The device's record, or a fresh one."""
        path = self.folder / "device.json"
        try:
            return from_bytes(DeviceRecord, path.read_bytes())
        except FileNotFoundError:
            return DeviceRecord()
        except OSError as error:
            _log.error("%s cannot be read now: %s", path, error)
            return DeviceRecord()
        except DocumentError as error:
            _set_aside(path, error)
            return DeviceRecord()

    def save_device(self, record: DeviceRecord) -> None:
        """Replace the device's record, flushed."""
        write_durably(self.folder / "device.json", to_bytes(record))

    def incoming(self, index: PackageIndex) -> Incoming:
        """The package of `index` while it arrives; what is there already is kept."""
        return Incoming(self.folder / "incoming" / index.sha256, index)

    def incoming_delta(self, index: PackageIndex, delta: PackageIndex) -> Incoming:
        """A delta of the package of `index` while it arrives; it goes when that package goes."""
        return Incoming(self.folder / "incoming" / f"{index.sha256}.delta", delta)

    def stage(self, index: PackageIndex, slot: str) -> Manifest:
        """Read the arrived package back, hash it, unpack it into `slot`; nothing of an older content stays.

        Raises:
            TrustError: The bytes are not what the index says; they are removed.
            StoreError: The disk refused.
        """
        package = self.folder / "incoming" / index.sha256
        if _file_digest(package) != index.sha256:
            self.incoming(index).discard()
            raise TrustError(
                f"{index.name} {index.version}: its chunks make another package than the index says; publish it again"
            )
        target = self.slot(index.name, slot)
        self._empty_slot(target)
        with PackageReader(package) as reader:
            manifest = reader.manifest
            if (manifest.name, manifest.version, manifest.device) != (
                index.name,
                index.version,
                index.device,
            ):
                raise TrustError(
                    f"the index promises {index.name} {index.version}, the package is {manifest.title}"
                )
            reader.extract(target)
        _sync_tree(target)
        write_durably(target / ".whole", index.sha256.encode("ascii"))
        return manifest

    def slot(self, model: str, slot: str) -> Path:
        """The folder of a slot."""
        return self.folder / "models" / check_name(model, "model") / slot

    def is_whole(self, model: str, slot: str, package_sha256: str) -> bool:
        """Whether a slot holds this package, completely."""
        try:
            return (self.slot(model, slot) / ".whole").read_text("ascii") == package_sha256
        except OSError:
            return False

    def manifest(self, model: str, slot: str) -> Manifest:
        """The manifest of the package in a slot.

        Raises:
            StoreError: There is none, or it is damaged.
        """
        path = self.slot(model, slot) / MANIFEST_PATH
        try:
            return from_bytes(Manifest, path.read_bytes())
        except (OSError, DocumentError) as error:
            raise StoreError(f"cannot read {path}: {error}; install the package again") from error

    def clean(self, states: dict[str, State]) -> None:
        """Remove arrived packages and slots that no state names; never the active or the previous one."""
        for path in (self.folder / "incoming").iterdir():
            wanted = {s.candidate.package_sha256 for s in states.values() if s.candidate}
            if path.name.partition(".")[0] not in wanted:
                path.unlink(missing_ok=True)
        for model in self.models():
            state = states.get(model)
            kept = {i.slot for i in (state.active, state.previous, state.candidate) if i} if state else set()
            for slot in {"A", "B"} - kept:
                shutil.rmtree(self.slot(model, slot), ignore_errors=True)

    def remove(self, model: str) -> None:
        """Forget a model wholly."""
        shutil.rmtree(self.folder / "models" / check_name(model, "model"), ignore_errors=True)

    def free_bytes(self) -> int:
        """Room on the disk."""
        return shutil.disk_usage(self.folder).free

    def _newest(self, model: str, *, to_write: bool = False) -> tuple[int, State] | None:
        """The newest readable copy; what the disk refuses to read now may be right, and is not written over."""
        found = []
        for number in (0, 1):
            path = self._record(model, number)
            try:
                raw = parse_json(path.read_bytes(), path.name)
                _check_record(raw)
                found.append((int(raw["generation"]), from_json(State, raw["state"])))
            except FileNotFoundError:
                continue
            except OSError as error:
                if to_write:
                    raise disk_error(f"cannot read {path}", error) from error
                _log.error("%s cannot be read now: %s", path, error)
            except (DocumentError, KeyError, TypeError) as error:
                _set_aside(path, error)
        return max(found, key=lambda pair: pair[0], default=None)

    def _record(self, model: str, number: int) -> Path:
        return self.folder / "models" / check_name(model, "model") / f"state-{number}.json"

    def _empty_slot(self, target: Path) -> None:
        try:
            (target / ".whole").unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
        except OSError as error:
            raise disk_error(f"cannot empty {target}", error) from error


class Incoming:
    """A package while it arrives, chunk by chunk, each verified before it is kept."""

    def __init__(self, path: Path, index: PackageIndex) -> None:
        self.path = path
        self.index = index
        self._map = path.with_name(path.name + ".map")

    def missing(self) -> list[int]:
        """Numbers of the chunks that are not there; those that are were hashed again after a start."""
        return [number for number, there in enumerate(self._known()) if not there]

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


def _check_record(raw: dict[str, Any]) -> None:
    if raw["sha256"] != _checksum(raw["generation"], raw["state"]):
        raise DocumentError("its checksum does not match")


def _checksum(generation: int, body: Any) -> str:
    return hashlib.sha256(canonical_bytes([generation, body])).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1024 * 1024):
                digest.update(piece)
    except OSError as error:
        raise disk_error(f"cannot read {path}", error) from error
    return digest.hexdigest()


def _sync_tree(folder: Path) -> None:
    for path, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(path))


def _set_aside(path: Path, error: Exception) -> None:
    _log.error("%s cannot be read (%s); it is set aside as %s.bad", path, error, path.name)
    try:
        path.replace(path.with_name(path.name + ".bad"))
    except OSError:
        _log.exception("%s cannot be set aside either", path)
