# SPDX-License-Identifier: Apache-2.0
"""The index of a package: the small signed target from which a device pulls and checks the large blob.

It names the blob by its SHA-256 and every chunk by its own, so that each chunk is verified on arrival and nothing
unverified is kept; `compatible` is checked before a byte of the blob is fetched.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeopt_wire.manifest import Compatible, check_digest, check_name

_DELTAS = "deltas"
CHUNK_BYTES = 64 * 1024
"""64 KiB: full speed on every broker measured, and below the smallest payload limit in the field (128 kB)."""


@dataclass(frozen=True)
class PackageIndex:
    """Length, digest and chunks of one package file."""

    SCHEMA = "edgeopt.index/1"

    name: str
    version: str
    device: str
    compatible: Compatible
    size_bytes: int
    sha256: str
    chunk_bytes: int
    chunks: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name, "model")
        check_name(self.version, "version")
        check_name(self.device, "device")
        for digest in (self.sha256, *self.chunks):
            check_digest(digest)
        if self.size_bytes < 1 or not 1024 <= self.chunk_bytes <= 1024 * 1024:
            raise ValueError("size_bytes must be positive and chunk_bytes 1 KiB to 1 MiB")
        if len(self.chunks) != -(-self.size_bytes // self.chunk_bytes):
            raise ValueError(f"{self.size_bytes} bytes do not make {len(self.chunks)} chunks")

    def chunk_length(self, number: int) -> int:
        """Length in bytes of chunk `number`; only the last is shorter."""
        return min(self.chunk_bytes, self.size_bytes - number * self.chunk_bytes)


def with_deltas(index: PackageIndex, deltas: Mapping[str, PackageIndex]) -> PackageIndex:
    """The index with its deltas: digest of a base package -> index of the delta blob. Old agents do not look at them."""
    rows = [
        {
            "base": base,
            "sha256": delta.sha256,
            "size_bytes": delta.size_bytes,
            "chunk_bytes": delta.chunk_bytes,
            "chunks": list(delta.chunks),
        }
        for base, delta in sorted(deltas.items())
    ]
    return replace(index, extra={**index.extra, _DELTAS: rows} if rows else index.extra)


def deltas_of(index: PackageIndex) -> dict[str, PackageIndex]:
    """The deltas of an index: digest of the base package -> index of the delta blob. What cannot be read is left out."""
    rows = index.extra.get(_DELTAS, ())
    found = {}
    for row in rows if isinstance(rows, (list, tuple)) else ():
        try:
            found[check_digest(row["base"])] = replace(
                index,
                size_bytes=int(row["size_bytes"]),
                sha256=row["sha256"],
                chunk_bytes=int(row["chunk_bytes"]),
                chunks=tuple(row["chunks"]),
                extra={},
            )
        except (KeyError, TypeError, ValueError):
            continue
    return found


def target_path(name: str, version: str, device: str) -> str:
    """Where the signed metadata lists the index: one path per model, version and device class."""
    return f"models/{name}/{version}/{device}.json"


def index_of(
    package: Path,
    *,
    name: str,
    version: str,
    device: str,
    compatible: Compatible,
    chunk_bytes: int = CHUNK_BYTES,
) -> PackageIndex:
    """Hash a package file into its index, reading it once."""
    whole = hashlib.sha256()
    chunks: list[str] = []
    size = 0
    with package.open("rb") as file:
        while piece := file.read(chunk_bytes):
            whole.update(piece)
            chunks.append(hashlib.sha256(piece).hexdigest())
            size += len(piece)
    return PackageIndex(
        name, version, device, compatible, size, whole.hexdigest(), chunk_bytes, tuple(chunks)
    )
