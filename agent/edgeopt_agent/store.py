# SPDX-License-Identifier: Apache-2.0
"""What a device keeps: state records, packages on their way, packages that are here, and two slots for each model.

    models/<name>/state-{0,1}.json   the state record, two copies in turn
    models/<name>/{A,B}/             slots: unpacked packages, hard links to the store's files
    incoming/<sha256>                a package while it arrives (`incoming`)
    blobs/, packages/                packages that are here (`packages`)
    device-{0,1}.json                the device's record, both copies each time (`device_record`)

Rules:
- Records survive what `records` says; what stays and what goes is `housekeeping`'s.
- A slot is marked whole by its `.whole` file, written last; a slot without it is rubbish.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgeopt_agent.device_record import DeviceRecord, load_device, save_device
from edgeopt_agent.files import (
    digest_of,
    discard_folder,
    disk_error,
    remove_half,
    sync_folder,
    sync_tree,
    write_durably,
)
from edgeopt_agent.incoming import SPARE_BYTES, Incoming
from edgeopt_agent.machine import Installed, State
from edgeopt_agent.packages import Packages
from edgeopt_agent.records import NewerRecordError, Record, set_aside
from edgeopt_wire.archive import PackageReader
from edgeopt_wire.document import from_bytes, from_json, to_json
from edgeopt_wire.errors import DocumentError, StoreError, TrustError
from edgeopt_wire.index import PackageIndex
from edgeopt_wire.manifest import MANIFEST_PATH, Manifest, check_name

__all__ = ["SPARE_BYTES", "DeviceRecord", "Incoming", "Store"]

_log = logging.getLogger(__name__)

SLOTS = ("A", "B")


class Store:
    """The state directory.

    Raises:
        StoreError: It cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packages = Packages(folder)
        self.complaints: list[str] = []
        """What was lost and cannot be got back here, for whoever can tell somebody."""
        self._device: DeviceRecord | None = None
        try:
            (folder / "models").mkdir(parents=True, exist_ok=True)
            for name in ("incoming", "metadata", "blobs", "packages"):
                (folder / name).mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(f"cannot use the state directory {folder}", error) from error

    def recover(self) -> None:
        """Remove what a power cut left half written. Only for who holds the state directory's lock."""
        remove_half(self.folder)

    def models(self) -> list[str]:
        """Names of the models that have a record."""
        folders = (self.folder / "models").iterdir()
        return sorted(path.name for path in folders if path.is_dir() and not path.name.startswith("."))

    def load_state(self, model: str) -> State:
        """The newest readable record of a model, or a fresh one; its `error` says why it is not what it should be.

        For looking at and for serving; who goes on working with it needs `open_state`.
        """
        try:
            return self.open_state(model)
        except NewerRecordError as error:
            return State(model, active=_active_of(error.body), error=str(error))
        except StoreError as error:
            _log.error("%s", error)
            return State(model, error=str(error))

    def open_state(self, model: str) -> State:
        """The newest whole record of a model, or a fresh one where there is none.

        Raises:
            StoreError: The disk refuses to read it now.
            NewerRecordError: A newer agent wrote it.
        """
        record = self._record(model)
        newest = record.load()
        if newest is None:
            if record.was_damaged:
                self.complain(f"the record of {model} was damaged twice over; it begins anew")
            return State(model)
        try:
            return from_json(State, newest[1])
        except DocumentError as error:  # whole, and yet none of ours
            for path in record.paths:
                set_aside(path, error)
            self.complain(f"the record of {model} cannot be understood ({error}); it begins anew")
            return State(model)

    def save_state(self, state: State) -> None:
        """Write the record over the older of its two copies, flushed.

        Raises:
            StoreError: The disk refused.
            NewerRecordError: A newer agent wrote what is there.
        """
        self._record(state.model).save(to_json(state))

    def load_device(self) -> DeviceRecord:
        """The device's record, or a fresh one where there was none.

        One that is lost begins with what the models' records still say, and is complained of.

        Raises:
            StoreError: The disk refuses to read it now.
            NewerRecordError: A newer agent wrote it.
        """
        found, complaint = load_device(self.folder)
        if found is None:
            revision = max((self.load_state(name).revision for name in self.models()), default=0)
            found = DeviceRecord(revision=revision)
            if complaint or revision:
                self.complain(
                    f"the device's record is lost{': ' if complaint else ''}{complaint}; it begins anew with revision "
                    f"{revision}, the newest that a model's record knows"
                )
        self._device = found
        return found

    def save_device(self, record: DeviceRecord) -> None:
        """Replace the device's record, flushed.

        Raises:
            StoreError: The disk refused.
            NewerRecordError: A newer agent wrote what is there.
        """
        save_device(self.folder, record)
        self._device = record

    def newest_moment(self) -> str:
        """The newest moment that was seen signed, as far as that is known; never raises."""
        try:
            return (self._device or self.load_device()).newest_moment
        except StoreError as error:
            _log.error("the newest signed moment is not known now: %s", error)
            return ""

    def incoming(self, index: PackageIndex) -> Incoming:
        """The package of `index` while it arrives; what is there already is kept."""
        return Incoming(self.folder / "incoming" / index.sha256, index)

    def incoming_delta(self, index: PackageIndex, delta: PackageIndex) -> Incoming:
        """A delta of the package of `index` while it arrives; it goes when that package goes."""
        return Incoming(self.folder / "incoming" / f"{index.sha256}.delta", delta)

    def arrived(self, package_sha256: str) -> int:
        """How many chunks of a package are noted as being there."""
        try:
            return len(json.loads((self.folder / "incoming" / f"{package_sha256}.map").read_bytes()))
        except (OSError, ValueError, TypeError):
            return 0

    def stage(self, index: PackageIndex) -> bool:
        """Read the arrived package back from the disk, hash it, and keep its files; False where the disk damaged it.

        Raises:
            TrustError: The bytes are not what the index says; they are removed.
            StoreError: The disk refused.
        """
        arrived = self.incoming(index)
        try:
            is_right = digest_of(arrived.path) == index.sha256
        except OSError as error:
            raise disk_error(f"cannot read {arrived.path}", error) from error
        if not is_right:
            if arrived.missing():
                return False
            arrived.discard()
            raise TrustError(
                f"{index.name} {index.version}: its chunks make another package than the index says; publish it again"
            )
        with PackageReader(arrived.path) as reader:
            manifest = reader.manifest
        if (manifest.name, manifest.version, manifest.device) != (index.name, index.version, index.device):
            raise TrustError(
                f"the index promises {index.name} {index.version}, the package is {manifest.title}"
            )
        self.packages.keep(arrived.path, index.sha256)
        return True

    def place(self, model: str, slot: str, package_sha256: str) -> bool:
        """Fill a slot with a package that is here, every byte read and checked; False where the disk damaged it.

        Raises:
            StoreError: The disk refused.
        """
        entry = self.packages.find(package_sha256)
        target = self.slot(model, slot)
        if entry is None or (
            self.is_whole(model, slot, package_sha256) and self.packages.fits(entry, target)
        ):
            return entry is not None
        if not self.packages.is_whole(package_sha256):
            return False
        try:
            self._empty(target)
            self.packages.fill(entry, target)
            sync_tree(target)
            write_durably(target / ".whole", package_sha256.encode("ascii"))
            sync_folder(target.parent)
        except OSError as error:
            raise disk_error(f"cannot fill {target}", error) from error
        return True

    def slot(self, model: str, slot: str) -> Path:
        """The folder of a slot."""
        return self.folder / "models" / check_name(model, "model") / slot

    def is_whole(self, model: str, slot: str, package_sha256: str) -> bool:
        """Whether a slot holds this package, completely."""
        try:
            return (self.slot(model, slot) / ".whole").read_text("ascii") == package_sha256
        except (OSError, ValueError):
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

    def remove(self, model: str) -> None:
        """Forget a model wholly.

        Raises:
            StoreError: The disk refused; it is there still.
        """
        folder = self.folder / "models" / check_name(model, "model")
        try:
            discard_folder(folder)
        except OSError as error:
            raise disk_error(f"cannot remove {folder}", error) from error

    def free_bytes(self) -> int:
        """Room on the disk."""
        return shutil.disk_usage(self.folder).free

    def _record(self, model: str) -> Record:
        return Record(self.folder / "models" / check_name(model, "model"), "state", "state", State.SCHEMA)

    def complain(self, text: str) -> None:
        """Note what was lost; said twice it is told once."""
        if text not in self.complaints:
            _log.error("%s", text)
            self.complaints.append(text)

    def _empty(self, target: Path) -> None:
        discard_folder(target)
        target.mkdir(parents=True)


def _active_of(body: Mapping[str, object]) -> Installed | None:
    """What a newer agent's record says is active, as far as this one understands it."""
    active = body.get("active")
    try:
        found = from_json(Installed, active) if isinstance(active, dict) else None
    except DocumentError:
        return None
    return replace(found, measured_under="") if found is not None and found.slot in SLOTS else None
