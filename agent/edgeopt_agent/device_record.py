# SPDX-License-Identifier: Apache-2.0
"""What concerns the whole device: the newest document that was obeyed, who could sign it, and the newest signed moment.

device-{0,1}.json   two copies, both written each time: losing one loses nothing
device.json         the same for agents before version 0.2, which knew one copy; read where the others are lost
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeopt_agent.files import disk_error, write_durably
from edgeopt_agent.records import Record, check_not_newer, set_aside
from edgeopt_wire.document import from_json, parse_json, to_bytes, to_json
from edgeopt_wire.errors import DocumentError


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


def load_device(folder: Path) -> tuple[DeviceRecord | None, str]:
    """The record in a state directory; None where there is none, and then why, if one was there.

    Raises:
        StoreError: The disk refuses to read it now.
        NewerRecordError: A newer agent wrote it.
    """
    record = _record(folder)
    newest = record.load()
    complaint = "both copies were damaged" if record.was_damaged else ""
    if newest is not None:
        try:
            return from_json(DeviceRecord, newest[1]), ""
        except DocumentError as error:
            complaint = str(error)
            for copy in record.paths:
                set_aside(copy, error)
    path = folder / "device.json"
    try:
        body = parse_json(path.read_bytes(), path.name)
        check_not_newer(body, DeviceRecord.SCHEMA, str(path))
        return from_json(DeviceRecord, body), ""
    except FileNotFoundError:
        return None, complaint
    except OSError as error:
        raise disk_error(f"cannot read {path}", error) from error
    except DocumentError as error:
        set_aside(path, error)
        return None, complaint or str(error)


def save_device(folder: Path, record: DeviceRecord) -> None:
    """Replace the record, flushed.

    Raises:
        StoreError: The disk refused.
        NewerRecordError: A newer agent wrote what is there.
    """
    _record(folder).save(to_json(record))
    write_durably(folder / "device.json", to_bytes(record))


def _record(folder: Path) -> Record:
    return Record(folder, "device", "device", DeviceRecord.SCHEMA, mirrored=True)
