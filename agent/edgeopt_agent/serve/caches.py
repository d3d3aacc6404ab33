# SPDX-License-Identifier: Apache-2.0
"""Answers kept for the next one who asks the same: least recently used first out, by entries, bytes and age.

Rules:
- Keys are SHA-256 over names, dtypes, shapes and bytes: two requests share an answer only if they are equal.
- A cache belongs to one loaded model and goes with it: a new version never answers with the old one's words.
- What is kept is a copy that nobody can write to.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeopt_wire.serving import ResponseCache

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray]


class LeastRecentlyUsed:
    """A bounded cache of outputs; thread-safe."""

    def __init__(self, bounds: ResponseCache, clock: Callable[[], float] = time.monotonic) -> None:
        self._bounds = bounds
        self._clock = clock
        self._guard = threading.Lock()
        self._kept: OrderedDict[bytes, tuple[Arrays, int, float]] = OrderedDict()
        self._bytes = 0
        self._hits = self._misses = self._evicted = 0

    def get(self, key: bytes) -> Arrays | None:
        """The outputs kept under `key`, or None."""
        with self._guard:
            found = self._kept.get(key)
            if found is not None and self._bounds.ttl_s and self._clock() - found[2] > self._bounds.ttl_s:
                self._drop(key)
                found = None
            if found is None:
                self._misses += 1
                return None
            self._hits += 1
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: bytes, outputs: Arrays) -> None:
        """Keep a copy of `outputs`; too large ones are not kept."""
        size = sum(array.nbytes for array in outputs.values())
        if size > self._bounds.size_mib * 2**20:
            return
        copied = {name: array.copy() for name, array in outputs.items()}
        for array in copied.values():
            array.flags.writeable = False
        with self._guard:
            if key in self._kept:
                self._drop(key)
            self._kept[key] = (copied, size, self._clock())
            self._bytes += size
            while len(self._kept) > self._bounds.entries or self._bytes > self._bounds.size_mib * 2**20:
                self._drop(next(iter(self._kept)))
                self._evicted += 1

    def counts(self) -> dict[str, int]:
        """Hits, misses, evictions, and what is kept now."""
        with self._guard:
            return {
                "hits": self._hits,
                "misses": self._misses,
                "evicted": self._evicted,
                "entries": len(self._kept),
                "bytes": self._bytes,
            }

    def _drop(self, key: bytes) -> None:
        self._bytes -= self._kept.pop(key)[1]


def key_of(inputs: Mapping[str, Any]) -> bytes:
    """The key of a whole request: arrays, or lists of bytes, by input name."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name]
        if isinstance(value, (list, tuple)):
            _add_items(digest, name, value)
        else:
            digest.update(f"{name}\0{value.dtype.str}{value.shape}\0".encode())
            digest.update(memoryview(value if value.flags.c_contiguous else value.copy()).cast("B"))
    return digest.digest()


def row_keys(inputs: Mapping[str, Any], rows: int) -> list[bytes]:
    """The key of every row of a request; row i of every input belongs together."""
    return [key_of({name: value[i : i + 1] for name, value in inputs.items()}) for i in range(rows)]


def _add_items(digest: Any, name: str, items: Sequence[bytes]) -> None:
    digest.update(f"{name}\0raw{len(items)}\0".encode())
    for item in items:
        digest.update(len(item).to_bytes(8, "little"))
        digest.update(item)
