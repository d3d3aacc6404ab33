# SPDX-License-Identifier: Apache-2.0
"""One inference on this device: through the running agent, else straight from the active slot. No network either way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent.config import AgentConfig
from edgeopt_agent.images import load_photo
from edgeopt_agent.machine import Installed
from edgeopt_agent.store import Store
from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError, TransportError
from edgeopt_wire.manifest import Manifest
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgeopt_agent.client import Answer

TOP = 5
VALUES_SHOWN = 16


def infer(config: AgentConfig, data: Path, model: str = "") -> dict[str, Any]:
    """Run the active package of `model` (the only one, if unnamed) on a photo, a text, .npy, .npz or request .json.

    Raises:
        RecipeError: No such model is active, or the data does not fit it.
        RuntimeFailure: The runtime failed.
    """
    store = Store(config.folder)
    name, active = _active(store, model)
    manifest = store.manifest(name, active.slot)
    inputs = read_data(data, manifest, store.slot(name, active.slot))
    try:
        answer = _through_agent(config, name, inputs)
        via = "agent"
    except TransportError:
        answer = _directly(store, name, active, manifest, inputs)
        via = "slot"
    labels = _labels(store, name, active, manifest)
    return {
        "schema": "edgeopt.infer/1",
        "model": name,
        "version": answer.version,
        "variant": answer.parameters["variant"],
        "via": via,
        "outputs": {
            name: {"shape": list(array.shape), "first": array.reshape(-1)[:VALUES_SHOWN].tolist()}
            for name, array in answer.outputs.items()
        },
        "top": top_answers(next(iter(answer.outputs.values())).reshape(-1).tolist(), labels),
    }


def read_data(data: Path, manifest: Manifest, folder: Path) -> dict[str, np.ndarray]:
    """Read the model's inputs from a file, for the package that is extracted in `folder`.

    Raises:
        RecipeError: It cannot be read, or does not fit.
    """
    import zipfile

    import numpy as np

    from edgeopt_agent.serve.protocol import read_inputs

    signature = manifest.signature_inputs
    try:
        if data.suffix == ".json":
            body = json.loads(data.read_bytes())
            if not isinstance(body, dict):
                raise RecipeError(f'{data}: expected an object with "inputs", found {type(body).__name__}')
            return read_inputs(body, signature)
        if data.suffix in (".npy", ".npz"):
            loaded = np.load(data, allow_pickle=False)
            given = {signature[0].name: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
            return {spec.name: _as_said(given[spec.name], spec) for spec in signature}
    except KeyError as error:
        raise RecipeError(
            f"{data} has no array {error}; the model takes {[spec.name for spec in signature]}"
        ) from error
    except (OSError, EOFError, ValueError, RecursionError, zipfile.BadZipFile) as error:
        raise RecipeError(f"cannot read {data}: {error}") from error
    if not manifest.preprocess:
        raise RecipeError(
            "the package does not say how a photo or a text becomes its input; give a .npy file instead"
        )
    return _prepared(data, manifest, folder)


def _prepared(data: Path, manifest: Manifest, folder: Path) -> dict[str, np.ndarray]:
    """A photo or a text by the package's `preprocess`."""
    signature = manifest.signature_inputs
    if manifest.preprocess.get("kind", "image") == "image":
        return {signature[0].name: load_photo(data, manifest.preprocess, signature[0])}
    from edgeopt_agent.serve.processing import Processing

    try:
        content = data.read_bytes()
    except OSError as error:
        raise RecipeError(f"cannot read {data}: {error.strerror}") from error
    return Processing(manifest, folder).prepare([content])


def _as_said(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """An array file's values in the model's dtype; float64, which numpy makes by itself, becomes float32."""
    import numpy as np

    if not np.can_cast(array.dtype, spec.dtype, "same_kind"):
        raise RecipeError(f"input {spec.name!r}: expected {spec.dtype}, found {array.dtype.name}")
    return array.astype(spec.dtype, copy=False)


def _active(store: Store, model: str) -> tuple[str, Installed]:
    active = {name: store.load_state(name).active for name in store.models()}
    serving = {name: installed for name, installed in active.items() if installed is not None}
    if not model and len(serving) == 1:
        model = next(iter(serving))
    if model not in serving:
        raise RecipeError(
            seam.unknown("model", model, serving)
            if model
            else f"say which with --model; active: {sorted(serving)}"
        )
    return model, serving[model]


def _through_agent(config: AgentConfig, model: str, inputs: Mapping[str, np.ndarray]) -> Answer:
    from edgeopt_agent.client import Client

    with Client(config.socket_path) as client:
        return client.infer(model, inputs, may_cache=False)


def _directly(
    store: Store, model: str, active: Installed, manifest: Manifest, inputs: Mapping[str, np.ndarray]
) -> Answer:
    from edgeopt_agent.client import Answer
    from edgeopt_agent.model import open_model

    with open_model(store.slot(model, active.slot), manifest, active.variant) as loaded:
        variant = {"variant": loaded.variant.id}
        return Answer(loaded.infer(inputs), manifest.name, manifest.version, variant)


def _labels(store: Store, model: str, active: Installed, manifest: Manifest) -> list[str]:
    if not manifest.labels:
        return []
    return (store.slot(model, active.slot) / manifest.labels).read_text(encoding="utf-8").splitlines()


def top_answers(values: list[float], labels: list[str]) -> list[dict[str, Any]]:
    """The highest values with their indexes, and labels where there are some; nothing for a single value."""
    if len(values) < 2:
        return []
    best = sorted(range(len(values)), key=lambda index: -values[index])[:TOP]
    return [
        {
            "index": index,
            "score": float(values[index]),
            **({"label": labels[index]} if index < len(labels) else {}),
        }
        for index in best
    ]
