# SPDX-License-Identifier: Apache-2.0
"""An `.onnx` file. Needs no PyTorch as long as the device runs ONNX. A tokenizer in its folder goes with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.recipe import Recipe
from edgeopt.sources import Source, existing_file, file_digest, package_name
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    from edgeopt_converters.model import Model

_log = logging.getLogger(__name__)


def matches(spec: str) -> bool:
    """A path that ends in .onnx."""
    return spec.endswith(".onnx")


def load(spec: str, recipe: Recipe) -> Source:
    """Read and check the model; a free batch axis becomes 1, and inputs of the recipe's `[constants]` are fixed.

    Raises:
        RecipeError: It is not there, is no ONNX model, or has free axes that nothing sets.
    """
    from edgeopt_converters.onnx_file import load_onnx

    path = existing_file(spec, "the model")
    name = recipe.name or package_name(path.stem)
    model = load_onnx(path, name=name, inputs=recipe.inputs, constants=recipe.constants)
    return Source(
        model, file_digest(path), f"ONNX model {path.name}", preprocess=_tokenizer(path, model, recipe)
    )


def _tokenizer(path: Path, model: Model, recipe: Recipe) -> Mapping[str, Any]:
    """`[preprocess]` of texts, where the model takes token numbers and its folder holds a tokenizer that a device knows."""
    from edgeopt.evaluate import texts

    beside = texts.find(path.absolute().parent)
    if recipe.preprocess or beside is None or not texts.takes_tokens(model.inputs):
        return {}
    try:
        texts.read(beside)
    except RecipeError as error:
        _log.warning("clients of this model send token numbers, not texts: %s", error)
        return {}
    return {"kind": texts.KIND, "vocabulary": str(beside)}
