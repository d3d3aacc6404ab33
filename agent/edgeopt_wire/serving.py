# SPDX-License-Identifier: Apache-2.0
"""How a model is served: batching, instances, queue, caches. Part of a manifest, under the key `serving`.

Every value has a bound, so that no package takes more of a device than the device's own limits allow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_BATCH, MAX_INSTANCES, MAX_QUEUE = 1024, 64, 4096
MAX_DELAY_US = 10_000_000
MAX_CACHE_ENTRIES = 1_000_000


@dataclass(frozen=True)
class ResponseCache:
    """Answers kept by the exact bytes of their inputs; `ttl_s` 0 keeps them until they are the least used."""

    entries: int = 256
    size_mib: int = 8
    ttl_s: float = 0.0

    def __post_init__(self) -> None:
        _within("entries", self.entries, 1, MAX_CACHE_ENTRIES)
        _within("size_mib", self.size_mib, 1, 65536)
        _within("ttl_s", self.ttl_s, 0, 10**9)


@dataclass(frozen=True)
class SemanticCache:
    """Answers kept by the meaning of their input: the nearest kept one with a cosine of at least `threshold`.

    `embedder` names a served model whose first output (flattened) is the vector, given the same raw input; empty:
    the vector is this model's own first input. An answer from here is not what the model would say to the letter, so
    every such answer carries the cosine, and a request may ask not to be answered so.
    """

    threshold: float = 0.97
    entries: int = 256
    embedder: str = ""

    def __post_init__(self) -> None:
        _within("threshold", self.threshold, 0.5, 1.0)
        _within("entries", self.entries, 1, 65536)


@dataclass(frozen=True)
class Serving:
    """How one model is served.

    `max_batch` rows of several requests run together, the first of them waiting at most `max_delay_us` for the
    others; `fixed_batch` pads every run to `max_batch` rows, `batch_sizes` to the next of these. `instances` runs go on at once. At most `queue` requests
    wait, the next is refused. `timeout_ms` is the deadline of a request that says none (0: none). Lower `priority`
    goes first; `default_priority` is that of a request that says none.
    """

    max_batch: int = 1
    max_delay_us: int = 0
    fixed_batch: bool = False
    batch_sizes: tuple[int, ...] = ()
    instances: int = 1
    queue: int = 64
    timeout_ms: int = 30_000
    default_priority: int = 100
    response_cache: ResponseCache | None = None
    embedding_cache: ResponseCache | None = None
    semantic_cache: SemanticCache | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _within("max_batch", self.max_batch, 1, MAX_BATCH)
        sizes = self.batch_sizes
        if sizes and (self.fixed_batch or list(sizes) != sorted({*sizes, self.max_batch}) or sizes[0] < 1):
            raise ValueError(
                f"batch_sizes must ascend from 1 or more to max_batch ({self.max_batch}), without fixed_batch; found {list(sizes)}"
            )
        _within("max_delay_us", self.max_delay_us, 0, MAX_DELAY_US)
        _within("instances", self.instances, 1, MAX_INSTANCES)
        _within("queue", self.queue, 0, MAX_QUEUE)
        _within("timeout_ms", self.timeout_ms, 0, 10**9)
        _within("default_priority", self.default_priority, 1, 65535)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, found {value}")
