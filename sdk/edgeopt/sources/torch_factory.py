# SPDX-License-Identifier: Apache-2.0
"""`package.module:factory` or `file.py:factory`: a function without arguments that makes a PyTorch model.

It returns one of
- an `edgeopt.TorchModel`, which also says how photos become inputs and what the classes are called,
- a pair (module, example inputs),
- a module alone, where the recipe lists `[[inputs]]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeopt.factory import call_factory, is_factory
from edgeopt.recipe import Recipe
from edgeopt.sources import Source, package_name
from edgeopt_wire.errors import RecipeError, UnsupportedError


@dataclass(frozen=True)
class TorchModel:
    """A PyTorch module with what a build needs to know about it.

    `example_inputs` are tensors with batch 1. `preprocess` has the keys of a recipe's `[preprocess]`. `layout` names
    the axes of each input, e.g. ("NCHW",); 4-axis inputs are NCHW where it is empty.
    """

    module: Any
    example_inputs: tuple[Any, ...]
    name: str = ""
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()


def matches(spec: str) -> bool:
    """A colon with a module or a Python file before it and a name after it."""
    return is_factory(spec)


def load(spec: str, recipe: Recipe) -> Source:
    """Import the factory, call it and export what it returns.

    Raises:
        RecipeError: It cannot be imported, called or exported.
        UnsupportedError: PyTorch is not installed.
    """
    made = call_factory(spec)
    found = _described(made, spec, recipe)
    return export(found, spec, recipe.name or found.name or package_name(spec.rpartition(":")[2]))


def export(found: TorchModel, spec: str, name: str) -> Source:
    """Export a module into PyTorch's exported program and digest its weights and graph."""
    import torch

    from edgeopt_converters.torch_program import digest, program_model

    module = found.module.eval()
    try:
        with torch.no_grad():
            program = torch.export.export(module, tuple(found.example_inputs), strict=False)
    except Exception as error:  # the exporter raises whatever the user's own forward raises
        raise RecipeError(
            f"{spec}: torch.export cannot trace the model: {type(error).__name__}: {error}. "
            "Check that it runs on its example inputs and has no data-dependent Python control flow"
        ) from error
    return Source(
        model=program_model(program, name=name, layouts=found.layout),
        sha256=digest(program),
        description=f"PyTorch factory {Path(spec).name}",
        preprocess=found.preprocess,
        labels=found.labels,
    )


def _described(made: Any, spec: str, recipe: Recipe) -> TorchModel:
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError("a PyTorch model needs PyTorch: pip install 'edgeopt[torch]'") from error
    if isinstance(made, TorchModel):
        return made
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module):
        examples = made[1] if isinstance(made[1], tuple) else (made[1],)
        return TorchModel(made[0], examples)
    if not isinstance(made, torch.nn.Module):
        raise RecipeError(
            f"{spec}() must return a torch.nn.Module or an edgeopt.TorchModel, found {type(made).__name__}"
        )
    if not recipe.inputs:
        raise RecipeError(
            f"{spec}() returns a module alone, and nothing says its input shapes; return (module, example_inputs), "
            "or list [[inputs]] with name, shape and dtype in the recipe"
        )
    examples = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in recipe.inputs)
    return TorchModel(made, examples, layout=tuple(spec.layout for spec in recipe.inputs))
