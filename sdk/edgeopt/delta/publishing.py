# SPDX-License-Identifier: Apache-2.0
"""Deltas to a package that is published now, from the newest versions of its model that were published before."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.delta import make_delta
from edgeopt_wire.document import from_bytes
from edgeopt_wire.errors import EdgeoptError
from edgeopt_wire.index import PackageIndex, index_of, with_deltas

if TYPE_CHECKING:
    from edgeopt.repository import Repository


@contextmanager
def published_deltas(
    store: Repository, index: PackageIndex, package: Path, count: int
) -> Iterator[tuple[PackageIndex, dict[str, Path]]]:
    """Give the index with its deltas, and their blobs (SHA-256 -> file), which are gone afterwards."""
    found: dict[str, PackageIndex] = {}
    blobs: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="edgeopt-delta-") as folder:
        for number, (blob, base) in enumerate(_earlier(store, index)[:count]):
            file = Path(folder) / str(number)
            try:
                is_worth_it = make_delta((blob, base), (package, index), file)
            except EdgeoptError:  # an old blob that is gone or damaged is no reason not to publish
                continue
            if is_worth_it:
                found[base.sha256] = index_of(
                    file,
                    name=index.name,
                    version=index.version,
                    device=index.device,
                    compatible=index.compatible,
                )
                blobs[found[base.sha256].sha256] = file
        yield with_deltas(index, found), blobs


def _earlier(store: Repository, index: PackageIndex) -> list[tuple[Path, PackageIndex]]:
    """Published packages of the same model and device class whose bytes are here, the newest first."""
    found: dict[str, tuple[Path, PackageIndex]] = {}
    for path in store.targets():
        if path.startswith(f"models/{index.name}/") and path.endswith(f"/{index.device}.json"):
            known = from_bytes(PackageIndex, store.read_target(path))
            blob = store.folder / "blobs" / known.sha256
            if known.sha256 != index.sha256 and blob.is_file():
                found[known.sha256] = (blob, known)
    return sorted(found.values(), key=lambda entry: entry[0].stat().st_mtime_ns, reverse=True)
