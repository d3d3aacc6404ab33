# SPDX-License-Identifier: Apache-2.0
"""A training run on disk: whole or not at all, and never read into another run.

Written beside its place, synced, moved there, and the folder synced: a cut at any moment leaves the last whole one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_LOG = logging.getLogger(__name__)
_FORMAT = 1


def save(path: Path, identity: str, state: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        torch.save({"format": _FORMAT, "identity": identity, "state": dict(state)}, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path, identity: str) -> dict[str, Any] | None:
    """Read the checkpoint of the run `identity`, None where there is none, a broken one or another run's.

    Nothing but tensors and plain values is unpickled.
    """
    if not path.is_file():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever the unpickler raises, the run starts afresh, and says so
        _LOG.warning("%s: no checkpoint of a training run, starting afresh: %s", path, error)
        return None
    if not isinstance(found, dict) or (found.get("format"), found.get("identity")) != (_FORMAT, identity):
        _LOG.warning("%s: checkpoint of another run, starting afresh", path)
        return None
    state: dict[str, Any] = found["state"]
    return state
