# SPDX-License-Identifier: Apache-2.0
"""A `.pt2` file: a program that `torch.export.save` wrote."""

from __future__ import annotations

from edgeopt.recipe import Recipe
from edgeopt.sources import Source, existing_file, package_name


def matches(spec: str) -> bool:
    """A path that ends in .pt2."""
    return spec.endswith(".pt2")


def load(spec: str, recipe: Recipe) -> Source:
    """Read the program and digest its weights and graph.

    Raises:
        RecipeError: It is not there, or is no exported program.
    """
    from edgeopt_converters.torch_program import digest, load_program, program_model

    path = existing_file(spec, "the model")
    program = load_program(path)
    layouts = tuple(given.layout for given in recipe.inputs)
    model = program_model(program, name=recipe.name or package_name(path.stem), layouts=layouts)
    return Source(model, digest(program), f"exported PyTorch program {path.name}")
