# SPDX-License-Identifier: Apache-2.0
"""ONNX to PyTorch, our own: so that an ONNX model can be trained, pruned and lowered to everything else.

Rules:
- Weights become parameters, statistics of normalizations and single numbers become buffers.
- What does not depend on the inputs is computed once, by ONNX's own reference implementation: shapes, axes, masks.
- An operator without an exact form in PyTorch is refused with its name, its node and what to do.

Why not onnx2torch? It imports torchvision, which has no build for every PyTorch that we support.
"""

from __future__ import annotations

from typing import Any

from edgeopt_converters.model import Model
from edgeopt_converters.onnx_module import build_module
from edgeopt_converters.torch_program import program_model
from edgeopt_wire.errors import UnsupportedError
from edgeopt_wire.tensor import TensorSpec

SOURCE = "onnx"
TARGET = "torch"
COST = 5.0
EXTRA = "torch"
MODULES = ("torch", "onnx")


def convert(model: Model) -> Model:
    """Build a module, trace it with static shapes.

    Inputs and outputs keep their order; PyTorch names the inputs args_0, args_1, ...

    Raises:
        UnsupportedError: An operator has no form in PyTorch, or a shape depends on the data.
    """
    return convert_with_names(model)[0]


def convert_with_names(model: Model) -> tuple[Model, dict[str, str]]:
    """Convert, and say which tensor of the program's state is which initializer: ONNX name -> name in the state.

    So what was learned in PyTorch can be written into the ONNX model that it came from.

    Raises:
        UnsupportedError: An operator has no form in PyTorch, or a shape depends on the data.
    """
    import torch

    module = build_module(model.program, tuple(_example(spec) for spec in model.inputs))
    try:
        with torch.no_grad():
            program = torch.export.export(
                module, tuple(_example(spec) for spec in model.inputs), strict=False
            )
    except Exception as error:  # the module ran, so the exporter is at its limits, whatever it raises
        raise UnsupportedError(
            f"{model.name}: PyTorch cannot export what it can run: {type(error).__name__}: "
            f"{f'{error}'.partition(chr(10))[0]}; keep the model in ONNX"
        ) from error
    found = program_model(program, name=model.name, layouts=tuple(spec.layout for spec in model.inputs))
    return found, dict(module.places)


def _example(spec: TensorSpec) -> Any:
    import torch

    return torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
