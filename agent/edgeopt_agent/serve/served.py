# SPDX-License-Identifier: Apache-2.0
"""One loaded model in service: files to tensors, caches, queue and batch, run, answers for people.

The order of a request: semantic cache, response cache, preparation, embedding cache by row, queue, run, postprocess.
Keys of caches are what the caller sent, so that a photo that is known is not decoded again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent.model import LoadedModel
from edgeopt_agent.serve.caches import LeastRecentlyUsed, key_of, row_keys
from edgeopt_agent.serve.execution import Edges, run_batch
from edgeopt_agent.serve.processing import Processing
from edgeopt_agent.serve.readiness import prove_batch, run_once
from edgeopt_agent.serve.refusals import NotFound
from edgeopt_agent.serve.scheduler import Scheduler, Ticket
from edgeopt_agent.serve.semantic import SemanticIndex
from edgeopt_agent.service import Service
from edgeopt_wire.errors import EdgeoptError, RecipeError
from edgeopt_wire.serving import Serving

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray]
    Embed = Callable[[str, Mapping[str, Any]], "np.ndarray | None"]


@dataclass(frozen=True)
class Call:
    """One request for a model. An input is an array, or a list of files or texts."""

    inputs: Mapping[str, Any]
    wanted: tuple[str, ...] = ()
    """Names of outputs, the model's or those of postprocess; none: all of the model's."""
    priority: int = 0
    timeout_us: int = 0
    may_cache: bool = True
    is_shared: bool = False
    is_for_vector: bool = False
    """Whether another model's semantic cache asks: then none is consulted here, or two models could ask each other."""


@dataclass(frozen=True)
class Answer:
    """What a model said; `parameters` tell the variant, and the cache it came from if it did."""

    outputs: dict[str, np.ndarray]
    parameters: dict[str, Any] = field(default_factory=dict)


class Served:
    """A model that serves. `instances` are opened from the same variant; `embed` asks another model for a vector.

    `service` is told of every call of the runtime.
    """

    def __init__(
        self,
        instances: Sequence[LoadedModel],
        serving: Serving,
        folder: Path,
        embed: Embed,
        service: Service | None = None,
    ) -> None:
        self.loaded = instances[0]
        self._service = service
        self._key = (self.loaded.manifest.name, self.loaded.manifest.version, self.loaded.variant.id)
        self.serving = serving
        self.processing = Processing(self.loaded.manifest, folder)
        self._instances = tuple(instances)
        self._embed = embed
        self._edges = Edges(self.loaded.manifest, self.loaded.variant, serving)
        for loaded in dict.fromkeys(instances):
            if serving.max_batch > 1:
                prove_batch(loaded, self._edges, folder, serving.max_batch)
            else:
                run_once(loaded, self._edges)
        self.scheduler = Scheduler(instances, serving, self._run)
        self._responses = LeastRecentlyUsed(serving.response_cache) if serving.response_cache else None
        self._rows = LeastRecentlyUsed(serving.embedding_cache) if serving.embedding_cache else None
        self._semantic = SemanticIndex(serving.semantic_cache) if serving.semantic_cache else None
        if self._semantic is not None and self.processing.needs_inputs:
            raise RecipeError(
                f"{self.loaded.manifest.title}: a semantic cache keeps no inputs, and postprocess embed with pool mean needs "
                "them; use the embedding cache"
            )
        self._names = frozenset(spec.name for spec in self.loaded.manifest.signature_outputs)
        self._is_cached = any(cache is not None for cache in (self._responses, self._rows, self._semantic))
        drift = service.drift if service is not None else None
        self._monitor = drift.monitor(self.loaded.manifest) if drift is not None else None

    def answer(self, call: Call) -> Answer:
        """Answer one request.

        Raises:
            RecipeError: It does not fit the model.
            Busy: Too many wait.
            Expired: Its deadline passed while it waited.
            RuntimeFailure: The runtime failed.
        """
        parameters: dict[str, Any] = {"variant": self.loaded.variant.id}
        if self._is_cached and call.may_cache:
            outputs, prepared = self._cached(call, parameters)
        else:
            prepared = self._prepared(call.inputs)
            outputs = self._infer(prepared, call)
        if call.wanted and not self._names.issuperset(call.wanted):
            outputs = self._finished(call, outputs, prepared)
        return Answer(dict(outputs), parameters)

    def counts(self) -> dict[str, dict[str, int]]:
        """Counters of every cache that is on."""
        caches = {"response": self._responses, "embedding": self._rows, "semantic": self._semantic}
        return {name: cache.counts() for name, cache in caches.items() if cache is not None}

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Numbers of rows that a run may have; none: any up to `max_batch`."""
        return self._edges.sizes

    def close(self) -> None:
        """Release the runtime's memory."""
        for loaded in self._instances:
            loaded.close()

    def _prepared(self, inputs: Mapping[str, Any]) -> Arrays:
        raw = [value for value in inputs.values() if isinstance(value, list)]
        if raw:
            if len(inputs) != 1:
                raise RecipeError("a request with files or texts has one input, not several")
            return self.processing.prepare(raw[0])
        if self.processing.kind_in == "image":
            spec = self.loaded.manifest.signature_inputs[0]
            pixels = inputs.get(spec.name)
            if pixels is not None and pixels.dtype.name == "uint8" and spec.dtype != "uint8":
                return self.processing.prepare(list(pixels))
        return inputs

    def _cached(self, call: Call, parameters: dict[str, Any]) -> tuple[Arrays, Arrays]:
        """Look everywhere before running; what ran is kept. Inputs that the caller can write to are copied first."""
        sent = call.inputs
        if call.is_shared:  # else it could change between the key and the run, and answer others wrongly
            sent = {name: value if isinstance(value, list) else value.copy() for name, value in sent.items()}
        vector = None if call.is_for_vector else self._vector(sent)
        if vector is not None and self._semantic is not None:
            near = self._semantic.find(vector)
            if near is not None:
                parameters |= {"cache": "semantic", "similarity": near[0]}
                return near[1], {}
        key = key_of(sent) if self._responses is not None else b""
        kept = self._responses.get(key) if self._responses is not None else None
        if kept is not None:
            parameters["cache"] = "response"
            return kept, {}
        prepared: Arrays = {}
        if self._rows is None:
            prepared = self._prepared(sent)
            outputs: Arrays = self._infer(prepared, call)
        else:
            outputs = self._by_row(sent, call, self._rows)
        if self._responses is not None:
            self._responses.put(key, outputs)
        if vector is not None and self._semantic is not None:
            self._semantic.add(vector, outputs)
        return outputs, prepared

    def _vector(self, sent: Mapping[str, Any]) -> np.ndarray | None:
        """What the semantic cache compares; none without that cache, for several rows, or without an embedder."""
        if self._semantic is None or self.serving.semantic_cache is None or _count(sent) != 1:
            return None
        embedder = self.serving.semantic_cache.embedder
        first = next(iter(sent.values()))
        vector = self._embed(embedder, sent) if embedder else None if isinstance(first, list) else first
        if vector is None:
            self._semantic.bypass()
        return vector

    def _by_row(self, sent: Mapping[str, Any], call: Call, cache: LeastRecentlyUsed) -> dict[str, np.ndarray]:
        import numpy as np

        rows = _count(sent)
        keys = row_keys(sent, rows)
        known = [cache.get(key) for key in keys]
        missing = [row for row in range(rows) if known[row] is None]
        if missing:
            part = {
                n: [v[i] for i in missing] if isinstance(v, list) else v[missing] for n, v in sent.items()
            }
            fresh = self._infer(self._prepared(part), call)
            for at, row in enumerate(missing):
                known[row] = {name: array[at : at + 1] for name, array in fresh.items()}
                cache.put(keys[row], known[row] or {})
        found = [entry for entry in known if entry is not None]
        return {name: np.concatenate([entry[name] for entry in found]) for name in found[0]}

    def _infer(self, inputs: Arrays, call: Call) -> dict[str, np.ndarray]:
        rows = self._edges.rows_of(inputs)
        converted = self._edges.to_variant(inputs, rows)
        timeout_us = call.timeout_us or self.serving.timeout_ms * 1000
        until = time.monotonic() + timeout_us / 1e6 if timeout_us else float("inf")
        ticket = Ticket((converted, rows), rows, call.priority or self.serving.default_priority, until)
        outputs = self._edges.from_variant(self.scheduler.run(ticket), rows)
        if self._monitor is not None and self._monitor.is_due:
            self._monitor.look(inputs, outputs)
        return outputs

    def _run(self, loaded: LoadedModel, contents: Sequence[tuple[Arrays, int]]) -> list[Arrays]:
        if self._service is None:
            return run_batch(loaded, contents, self._edges.sizes)
        began = time.perf_counter_ns()
        try:
            found = run_batch(loaded, contents, self._edges.sizes)
        except EdgeoptError:
            self._service.failed(self._key)
            raise
        taken = time.perf_counter_ns() - began
        self._service.ran(self._key, taken, sum(rows for _, rows in contents), contents[0][0])
        return found

    def _finished(self, call: Call, outputs: Arrays, prepared: Arrays) -> dict[str, np.ndarray]:
        offered = [name for name, _, _ in self.processing.outputs()]
        for name in call.wanted:
            if name not in self._names and name not in offered:
                raise NotFound(
                    f"unknown output {name!r}; the model gives {sorted(self._names)}, postprocess {offered}"
                )
        if self.processing.needs_inputs and not prepared:
            prepared = self._prepared(call.inputs)
        return {**outputs, **self.processing.finish(outputs, prepared)}


def _count(sent: Mapping[str, Any]) -> int:
    first = next(iter(sent.values()), ())
    return len(first)
