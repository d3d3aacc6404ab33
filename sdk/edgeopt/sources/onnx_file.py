# SPDX-License-Identifier: Apache-2.0
"""An `.onnx` file. Needs no PyTorch as long as the device runs ONNX."""

from __future__ import annotations

from edgeopt.recipe import Recipe
from edgeopt.sources import Source, existing_file, file_digest, package_name


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
    return Source(model, file_digest(path), f"ONNX model {path.name}")
