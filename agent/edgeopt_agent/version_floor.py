# SPDX-License-Identifier: Apache-2.0
"""The newest versions of signed metadata that a device has seen, kept apart from python-tuf's own files.

Rules:
- Versions never fall, and nothing that a snapshot listed disappears, as the specification says (5.3 to 5.6). python-tuf
  remembers that in the metadata files alone: a power cut that loses one of them would let an old version in.
- A floor belongs to the keys that signed it. Where the root names other keys for a role, the floor starts again: that
  is how a fleet recovers from a thief who signed a version far ahead (fast-forward, 5.3.11).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeopt_agent.files import write_durably
from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.errors import ForgedError


@dataclass(frozen=True)
class VersionFloor:
    """The record in one file."""

    path: Path

    def raise_to(self, root: Any, timestamp: Any, snapshot: Any) -> None:
        """Refuse what fell below the floor, and keep what is new.

        Raises:
            ForgedError: A version fell, or a file that was listed is listed no more.
            StoreError: The disk refused.
        """
        known = self._load()
        found = {
            "root": {"keys": [], "meta": {"root": root.version}},
            "timestamp": {
                "keys": sorted(root.roles["timestamp"].keyids),
                "meta": {"timestamp": timestamp.version},
            },
            "snapshot": {
                "keys": sorted(root.roles["snapshot"].keyids),
                "meta": {
                    "snapshot": snapshot.version,
                    **{name: info.version for name, info in snapshot.meta.items()},
                },
            },
        }
        for role, entry in found.items():
            before = known.get(role)
            if before is not None and before["keys"] == entry["keys"]:
                _check(role, before["meta"], entry["meta"])  # type: ignore[arg-type]
        if found != known:
            write_durably(self.path, canonical_bytes(found))

    def _load(self) -> dict[str, Any]:
        try:
            record = json.loads(self.path.read_bytes())
            return {
                role: {
                    "keys": list(entry["keys"]),
                    "meta": {str(k): int(v) for k, v in entry["meta"].items()},
                }
                for role, entry in record.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def _check(role: str, before: dict[str, int], now: dict[str, int]) -> None:
    for name, version in before.items():
        if name not in now:
            raise ForgedError(f"the {role} does not list {name} any more, which it did (version {version})")
        if now[name] < version:
            raise ForgedError(
                f"{name} went back from version {version} to {now[name]}; old metadata is repeated by somebody, or the "
                "repository was restored from a backup"
            )
