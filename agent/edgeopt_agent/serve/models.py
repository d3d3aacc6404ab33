# SPDX-License-Identifier: Apache-2.0
"""The models that serve, by name. A new one is ready before the old one goes; nobody sees a gap."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeopt_agent.machine import Installed
from edgeopt_agent.model import LoadedModel, open_model
from edgeopt_agent.store import Store
from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np


class Models:
    """Loaded models. One inference a model at a time: runtimes share their threads within a session."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._models: dict[str, tuple[LoadedModel, threading.Lock]] = {}
        self._guard = threading.Lock()

    def activate(self, model: str, installed: Installed) -> None:
        """Load a variant from its slot and serve from it.

        Raises:
            EdgeoptError: It cannot be loaded; the one before serves on.
        """
        manifest = self._store.manifest(model, installed.slot)
        loaded = open_model(self._store.slot(model, installed.slot), manifest, installed.variant)
        with self._guard:
            before = self._models.get(model)
            self._models[model] = (loaded, threading.Lock())
        if before is not None:
            with before[1]:  # the request in hand is finished first
                before[0].close()

    def deactivate(self, model: str) -> None:
        """Stop serving a model."""
        with self._guard:
            before = self._models.pop(model, None)
        if before is not None:
            with before[1]:
                before[0].close()

    def names(self) -> list[str]:
        """Names of the models that serve."""
        return sorted(self._models)

    def describe(self, model: str) -> LoadedModel:
        """The loaded model.

        Raises:
            RecipeError: None of this name serves.
        """
        return self._find(model)[0]

    def infer(
        self, model: str, inputs: Mapping[str, np.ndarray]
    ) -> tuple[LoadedModel, dict[str, np.ndarray]]:
        """Run one inference; return the model that answered and its outputs.

        Raises:
            RecipeError: None of this name serves, or the inputs do not fit.
            RuntimeFailure: The runtime failed.
        """
        while True:
            loaded, lock = self._find(model)
            with lock:
                if self._find(model)[0] is loaded:  # else it was swapped while we waited
                    return loaded, loaded.infer(inputs)

    def _find(self, model: str) -> tuple[LoadedModel, threading.Lock]:
        with self._guard:
            if model not in self._models:
                raise RecipeError(seam.unknown("model", model, self._models))
            return self._models[model]
