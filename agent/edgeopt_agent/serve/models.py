# SPDX-License-Identifier: Apache-2.0
"""The models that serve, by name. A new one is ready before the old one goes; nobody sees a gap.

A request holds the model that it began with; the model that was replaced is closed by the last request that holds it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt_agent.machine import Installed
from edgeopt_agent.model import LoadedModel, open_model
from edgeopt_agent.serve.refusals import NotFound
from edgeopt_agent.service import Service
from edgeopt_agent.store import Store
from edgeopt_wire import seam
from edgeopt_wire.document import from_json
from edgeopt_wire.errors import EdgeoptError, RecipeError
from edgeopt_wire.manifest import Manifest
from edgeopt_wire.serving import Serving

if TYPE_CHECKING:
    import numpy as np

    from edgeopt_agent.serve.served import Answer, Call, Served

_log = logging.getLogger(__name__)


@dataclass
class _Entry:
    served: Served
    users: int = 0
    is_gone: bool = False


class Models:
    """Loaded models. `overrides` are the device's own `serving` by model name; its keys go before the manifest's.

    `service` is told of every call of a runtime.
    """

    def __init__(
        self,
        store: Store,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        service: Service | None = None,
    ) -> None:
        self.service = service
        self._store = store
        self._overrides = overrides or {}
        self._entries: dict[str, _Entry] = {}
        self._absent: dict[str, tuple[str, str]] = {}
        self._guard = threading.Lock()
        self.is_starting = False
        """Whether what is installed is still being loaded: until then nobody is told that this device is ready."""

    def activate(self, model: str, installed: Installed) -> None:
        """Load a variant from its slot and serve from it.

        Raises:
            EdgeoptError: It cannot be loaded; the one before serves on.
        """
        from edgeopt_agent.serve.served import Served

        instances: list[LoadedModel] = []
        try:
            manifest = self._store.manifest(model, installed.slot)
            folder = self._store.slot(model, installed.slot)
            serving = serving_of(manifest, self._overrides.get(model, {}))
            instances.append(open_model(folder, manifest, installed.variant))
            while len(instances) < serving.instances:
                is_shared = getattr(instances[0].session, "is_reentrant", False)
                instances.append(
                    instances[0] if is_shared else open_model(folder, manifest, installed.variant)
                )
            served = Served(instances, serving, folder, self._embed, self.service)
        except BaseException as error:
            for loaded in instances:
                loaded.close()
            with self._guard:
                if model not in self._entries:
                    self._absent[model] = (installed.version, str(error))
            raise
        with self._guard:
            self._absent.pop(model, None)
            before = self._entries.get(model)
            self._entries[model] = _Entry(served)
            is_last = before is not None and self._retire(before)
        if before is not None and is_last:
            before.served.close()

    def leave(self, model: str, version: str, why: str) -> None:
        """Note that a model should serve and is not loaded."""
        with self._guard:
            if model not in self._entries:
                self._absent[model] = (version, why)

    def deactivate(self, model: str) -> None:
        """Stop serving a model."""
        with self._guard:
            self._absent.pop(model, None)
            before = self._entries.pop(model, None)
            is_last = before is not None and self._retire(before)
        if before is not None and is_last:
            before.served.close()

    def names(self) -> list[str]:
        """Names of the models that serve."""
        with self._guard:
            return sorted(self._entries)

    def absent(self) -> dict[str, tuple[str, str]]:
        """The models that should serve and do not: their version, and why."""
        with self._guard:
            return dict(sorted(self._absent.items()))

    @property
    def is_ready(self) -> bool:
        """Whether every model that should serve does."""
        return not self.is_starting and not self._absent

    def describe(self, model: str) -> LoadedModel:
        """The loaded model.

        Raises:
            NotFound: None of this name serves.
        """
        return self.served(model).loaded

    def served(self, model: str) -> Served:
        """The model in service, to look at; `answer` is what runs it.

        Raises:
            NotFound: None of this name serves.
        """
        with self._guard:
            return self._find(model).served

    def infer(
        self, model: str, inputs: Mapping[str, np.ndarray]
    ) -> tuple[LoadedModel, dict[str, np.ndarray]]:
        """Run one inference; return the model that answered and its outputs.

        Raises:
            RecipeError: None of this name serves, or the inputs do not fit.
            RuntimeFailure: The runtime failed.
        """
        from edgeopt_agent.serve.served import Call

        served, answer = self.answer(model, Call(inputs))
        return served.loaded, answer.outputs

    def answer(self, model: str, call: Call) -> tuple[Served, Answer]:
        """Answer one request; return the model that did and what it said. Errors as in `Served.answer`."""
        with self.hold(model) as served:
            return served, served.answer(call)

    @contextmanager
    def hold(self, model: str) -> Iterator[Served]:
        """The model in service, which is not closed until the caller lets it go.

        Raises:
            NotFound: None of this name serves.
        """
        with self._guard:
            entry = self._find(model)
            entry.users += 1
        try:
            yield entry.served
        finally:
            with self._guard:
                entry.users -= 1
                is_last = entry.is_gone and not entry.users
            if is_last:
                entry.served.close()

    def _find(self, model: str) -> _Entry:
        if model not in self._entries:
            raise NotFound(seam.unknown("model", model, self._entries))
        return self._entries[model]

    @staticmethod
    def _retire(entry: _Entry) -> bool:
        entry.is_gone = True
        return not entry.users

    def _embed(self, model: str, inputs: Mapping[str, Any]) -> np.ndarray | None:
        """The vector of `inputs` by another served model, which takes them under its own input's name."""
        from edgeopt_agent.serve.served import Call

        try:
            served = self.served(model)
            name = served.loaded.manifest.signature_inputs[0].name
            wanted = ("embedding",) if served.processing.kind_out == "embed" else ()
            _, answer = self.answer(
                model, Call({name: next(iter(inputs.values()))}, wanted, is_for_vector=True)
            )
        except EdgeoptError as error:
            _log.warning("the embedder %s gives no vector: %s", model, error)
            return None
        return answer.outputs["embedding"] if wanted else next(iter(answer.outputs.values()))


def serving_of(manifest: Manifest, override: Mapping[str, Any]) -> Serving:
    """How a package is served here: its own `serving`, and the device's keys before it.

    Raises:
        RecipeError: An unknown key, or a value out of its bounds.
    """
    said = manifest.extra.get("serving", {})
    try:
        found = from_json(Serving, {**(said if isinstance(said, Mapping) else {}), **override}, "serving")
    except EdgeoptError as error:
        raise RecipeError(f"{manifest.title}: {error}") from error
    if found.semantic_cache is not None and found.semantic_cache.embedder == manifest.name:
        raise RecipeError(
            f"{manifest.title}: serving.semantic_cache.embedder is the model itself; name another"
        )
    if found.extra:
        known = [name for name in Serving.__dataclass_fields__ if name != "extra"]
        raise RecipeError(f"{manifest.title}: serving: {seam.unknown('key', next(iter(found.extra)), known)}")
    return found
