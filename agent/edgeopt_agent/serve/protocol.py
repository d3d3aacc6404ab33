# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol v2 in JSON: requests to arrays, arrays to answers.

Source: Open Inference Protocol, "REST", version 2: `{"inputs": [{"name", "shape", "datatype", "data"}]}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgeopt_agent.model import LoadedModel
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

DATATYPES = {
    "float32": "FP32",
    "float16": "FP16",
    "int8": "INT8",
    "uint8": "UINT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}


def read_inputs(body: Mapping[str, Any], signature: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
    """Return the arrays of an infer request.

    Raises:
        RecipeError: Something of the request does not fit the model; the message says what was expected.
    """
    import numpy as np

    entries = body.get("inputs")
    if not isinstance(entries, list):
        raise RecipeError('the request needs "inputs", a list')
    given = {str(entry.get("name")): entry for entry in entries if isinstance(entry, dict)}
    arrays: dict[str, np.ndarray] = {}
    for spec in signature:
        entry = given.get(spec.name)
        if entry is None:
            raise RecipeError(
                f"the input {spec.name!r} is missing; the model takes {[s.name for s in signature]}"
            )
        if entry.get("datatype") != DATATYPES[spec.dtype]:
            raise RecipeError(
                f"{spec.name}: expected datatype {DATATYPES[spec.dtype]}, found {entry.get('datatype')!r}"
            )
        if entry.get("shape") != list(spec.shape):
            raise RecipeError(f"{spec.name}: expected shape {list(spec.shape)}, found {entry.get('shape')!r}")
        try:
            arrays[spec.name] = np.asarray(entry.get("data"), dtype=spec.dtype).reshape(spec.shape)
        except (ValueError, TypeError, OverflowError) as error:
            raise RecipeError(f"{spec.name}: the data does not fit: {error}") from error
    return arrays


def write_request(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The body of an infer request."""
    return {"inputs": [_tensor(name, array) for name, array in inputs.items()]}


def write_answer(loaded: LoadedModel, outputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The answer to an infer request, with the variant that gave it."""
    manifest = loaded.manifest
    return {
        "model_name": manifest.name,
        "model_version": manifest.version,
        "parameters": {"variant": loaded.variant.id},
        "outputs": [_tensor(name, array) for name, array in outputs.items()],
    }


def write_metadata(loaded: LoadedModel) -> dict[str, Any]:
    """The answer to a model metadata request."""
    manifest = loaded.manifest
    return {
        "name": manifest.name,
        "versions": [manifest.version],
        "platform": f"edgeopt_{loaded.variant.runtime}",
        "inputs": [_described(spec) for spec in manifest.signature_inputs],
        "outputs": [_described(spec) for spec in manifest.signature_outputs],
    }


def _tensor(name: str, array: np.ndarray) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(array.shape),
        "datatype": DATATYPES[array.dtype.name],
        "data": array.reshape(-1).tolist(),
    }


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "datatype": DATATYPES[spec.dtype]}
