# SPDX-License-Identifier: Apache-2.0
"""Small records that must not be lost: two copies, each with a generation and a checksum.

Rules:
- The newest whole copy counts. One whose content is wrong is set aside as `.bad`, never a reason not to start.
- One that the disk refuses to read now stays where it is, and nothing is written over it: `StoreError`, later again.
- One that a newer agent wrote stays as it is: `NewerRecordError`. That an agent went back to an older version must
  not cost what the newer one knew.
- Where losing the newest copy must lose nothing, both copies are written each time (`mirrored`); else in turn.
- The envelope (`generation`, `sha256`, and the body under its name) is the same in every version of the agent.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeopt_agent.files import disk_error, write_durably
from edgeopt_wire.document import canonical_bytes, parse_json
from edgeopt_wire.errors import DocumentError, StoreError

_log = logging.getLogger(__name__)


class NewerRecordError(StoreError):
    """A newer agent wrote this record; `body` is what it says, unchecked."""

    def __init__(self, said: str, body: dict[str, Any]) -> None:
        super().__init__(said)
        self.body = body


@dataclass(frozen=True)
class Record:
    """The two copies `<stem>-0.json` and `<stem>-1.json` of one record in a folder; `key` names the body."""

    folder: Path
    stem: str
    key: str
    schema: str
    mirrored: bool = False

    def load(self, *, to_write: bool = False) -> tuple[int, dict[str, Any]] | None:
        """Generation and body of the newest whole copy; None where there is none.

        `to_write` refuses where a copy cannot be read now, though the other can: it may be the newer one.

        Raises:
            StoreError: The disk refuses now.
            NewerRecordError: A newer agent wrote it.
        """
        found: list[tuple[int, dict[str, Any]]] = []
        refused: StoreError | None = None
        for path in self.paths:
            try:
                found.append(self._read(path))
            except FileNotFoundError:
                continue
            except OSError as error:
                refused = disk_error(f"cannot read {path}", error)
                _log.error("%s now", refused)
            except (DocumentError, KeyError, TypeError, ValueError) as error:
                set_aside(path, error)
        if refused is not None and (to_write or not found):
            raise refused
        newest = max(found, key=lambda pair: pair[0], default=None)
        if newest is not None:
            check_not_newer(newest[1], self.schema, f"{self.folder / self.stem}")
        return newest

    def save(self, body: dict[str, Any]) -> None:
        """Write the body over the older copy (`mirrored`: over both, one after the other), flushed.

        Raises:
            StoreError: The disk refused; what was there still is.
            NewerRecordError: A newer agent wrote what is there.
        """
        newest = self.load(to_write=True)
        generation = newest[0] + 1 if newest else 1
        record = {"generation": generation, self.key: body, "sha256": _checksum(generation, body)}
        raw = canonical_bytes(record)
        for path in self.paths if self.mirrored else self.paths[generation % 2 :][:1]:
            write_durably(path, raw)

    @property
    def paths(self) -> tuple[Path, Path]:
        """Where the copies are."""
        return self.folder / f"{self.stem}-0.json", self.folder / f"{self.stem}-1.json"

    @property
    def was_damaged(self) -> bool:
        """Whether a copy was set aside, now or earlier."""
        return any(path.with_name(f"{path.name}.bad").exists() for path in self.paths)

    def _read(self, path: Path) -> tuple[int, dict[str, Any]]:
        raw = parse_json(path.read_bytes(), path.name)
        generation, body = int(raw["generation"]), raw[self.key]
        if raw["sha256"] != _checksum(raw["generation"], body) or not isinstance(body, dict):
            raise DocumentError("its checksum does not match")
        return generation, body


def check_not_newer(body: dict[str, Any], schema: str, where: str) -> None:
    """See that a body is not of a newer version than `schema`.

    Raises:
        NewerRecordError: It is.
    """
    found = str(body.get("schema", schema))
    name, _, version = schema.rpartition("/")
    other, _, number = found.rpartition("/")
    if other == name and number.isdigit() and int(number) > int(version):
        raise NewerRecordError(
            f"{where} was written by a newer agent ({found}; this one knows {schema}): it is left as it is, and what "
            "this agent understands of it serves on; install the newer agent again",
            body,
        )


def set_aside(path: Path, error: Exception) -> None:
    """Move away what cannot be read, for people to look at."""
    _log.error("%s cannot be read (%s); it is set aside as %s.bad", path, error, path.name)
    try:
        path.replace(path.with_name(path.name + ".bad"))
    except OSError:
        _log.exception("%s cannot be set aside either", path)


def _checksum(generation: int, body: Any) -> str:
    return hashlib.sha256(canonical_bytes([generation, body])).hexdigest()
