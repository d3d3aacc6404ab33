# SPDX-License-Identifier: Apache-2.0
"""Starts that died while they loaded a model, counted on the disk before the model is loaded: what breaks boot loops.

    models/<name>/loads.json   the package and slot that are being loaded, and how many starts began to; gone when one ended

Rules:
- A vendor library that takes the process along leaves the count; whatever comes back to Python, an error too, ends it.
- After `MAX_DEATHS` such starts the package is not loaded again (`is_deadly`): the machine goes to the previous one, or
  the model does not serve and is reported `degraded`. No start is lost to it after that.
- A power cut while a model loads counts like a crash: nobody can tell them apart.
- What cannot be counted is loaded all the same: a disk that is full must not stop what serves.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgeopt_agent.files import sync_folder, write_durably
from edgeopt_agent.machine import Installed
from edgeopt_wire.errors import StoreError

_log = logging.getLogger(__name__)

SCHEMA = "edgeopt.loads/1"
MAX_DEATHS = 3
"""Starts that died while loading a package before it is not loaded any more."""


@dataclass(frozen=True)
class Loads:
    """The counts of one state directory."""

    folder: Path

    def deaths(self, model: str, installed: Installed) -> int:
        """How many starts in a row died while they loaded this package from this slot."""
        try:
            found = json.loads(self._path(model).read_bytes())
            is_it = (found["slot"], found["package_sha256"]) == (installed.slot, installed.package_sha256)
            return int(found["starts"]) if is_it else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def is_deadly(self, model: str, installed: Installed) -> bool:
        """Whether so many starts died of it that it is not loaded again."""
        return self.deaths(model, installed) >= MAX_DEATHS

    def why(self, model: str, installed: Installed) -> str:
        """What is said of it then; empty where it may be loaded."""
        if not self.is_deadly(model, installed):
            return ""
        return (
            f"{self.deaths(model, installed)} starts of the agent died while they loaded version {installed.version} "
            f"({installed.variant}); it is not loaded any more, publish another version, or start another rollout of it"
        )

    @contextmanager
    def counted(self, model: str, installed: Installed) -> Iterator[None]:
        """Count a start before the package is loaded, and take that back when loading came to an end, however."""
        starts = self.deaths(model, installed) + 1
        note = {
            "schema": SCHEMA,
            "slot": installed.slot,
            "package_sha256": installed.package_sha256,
            "starts": starts,
        }
        try:
            write_durably(self._path(model), json.dumps(note).encode())
        except StoreError as error:
            _log.warning("%s is loaded without counting that: %s", model, error)
        try:
            yield
        finally:
            self.forget(model)

    def forget(self, model: str) -> None:
        """Begin to count anew."""
        path = self._path(model)
        try:
            if path.exists():
                path.unlink()
                sync_folder(path.parent)
        except OSError as error:
            _log.warning("that %s was loaded is not noted: %s", model, error)

    def _path(self, model: str) -> Path:
        return self.folder / "models" / model / "loads.json"
