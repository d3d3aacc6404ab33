# SPDX-License-Identifier: Apache-2.0
"""PyTorch to LiteRT (.tflite), by litert-torch; no TensorFlow.

Rules:
- An image input (layout NCHW) becomes channels-last, and its `TensorSpec` says NHWC: LiteRT computes in NHWC, so a
  model that keeps NCHW starts with a Transpose on every inference.
- Outputs keep the order of axes that the program gives them.
- What litert-torch lowers badly is spelled otherwise before (`litert_spellings`) and tidied behind it (`litert_layout`).
- int64 and float64 become int32 and float32 (devices have no others); the specs say so.
- The same program gives the same bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgeopt_converters.litert_file import edges
from edgeopt_converters.litert_layout import tidy
from edgeopt_converters.litert_spellings import respell
from edgeopt_converters.model import Model
from edgeopt_converters.quiet import quiet
from edgeopt_wire.errors import UnsupportedError
from edgeopt_wire.tensor import TensorSpec

SOURCE = "torch"
TARGET = "litert"
COST = 15.0
EXTRA = "litert"
MODULES = ("torch", "litert_torch", "ai_edge_litert")

_ENVIRONMENT = {
    "LITERT_TORCH_SHOW_PROGRESS": "n",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TF_ENABLE_ONEDNN_OPTS": "0",  # its constant folding rounds by the machine's kernels, and says so at length
}
_TO_FIRST = (0, 3, 1, 2)
_TO_LAST = (0, 2, 3, 1)


def convert(model: Model) -> Model:
    """Lower with static shapes in float32; layouts are propagated so that Transposes cancel out.

    Raises:
        UnsupportedError: litert-torch has no lowering for an operator; the message names it.
    """
    arguments = tuple(_example(spec) for spec in model.inputs)
    try:
        with _told_nothing():
            import litert_torch

            lowered = litert_torch.convert(_flat(model), arguments)
            program: bytes = lowered.model_content()
    except Exception as error:  # MLIR, PyTorch and litert-torch raise what they like; all mean that it cannot
        raise UnsupportedError(
            f"{model.name}: litert-torch cannot convert this model: {_cause(error)}"
        ) from error
    program = tidy(program)
    inputs, outputs = edges(program)
    return Model(
        format=TARGET,
        program=program,
        name=model.name,
        inputs=tuple(
            replace(found, layout="NHWC" if given.layout == "NCHW" else given.layout)
            for found, given in zip(inputs, model.inputs, strict=True)
        ),
        outputs=tuple(
            replace(found, layout=given.layout) for found, given in zip(outputs, model.outputs, strict=True)
        ),
    )


def _example(spec: TensorSpec) -> Any:
    import torch

    shape = tuple(spec.shape[axis] for axis in _TO_LAST) if spec.layout == "NCHW" else spec.shape
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _flat(model: Model) -> Any:
    """The program as a module that takes its inputs one by one, images channels-last, and returns a flat tuple."""
    import torch
    from torch.utils import _pytree as pytree

    program = model.program
    images = tuple(spec.layout == "NCHW" for spec in model.inputs)

    class Flat(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.program = respell(program.module(check_guards=False))
            self.training = False

        def forward(self, *tensors: Any) -> Any:
            ordered = [
                tensor.permute(_TO_FIRST) if image else tensor
                for tensor, image in zip(tensors, images, strict=True)
            ]
            arguments, keywords = pytree.tree_unflatten(ordered, program.call_spec.in_spec)
            return tuple(pytree.tree_leaves(self.program(*arguments, **keywords)))

    return Flat()


def _cause(error: BaseException) -> str:
    """The first lines of what the libraries say; the rest is a dump of the whole program."""
    lines = [line.strip() for line in f"{error}".splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:500]}"


@contextlib.contextmanager
def _told_nothing() -> Iterator[None]:
    """Keep progress lines off the terminal too; what they depend on is in the environment."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        with quiet("", "torch", "torchao"):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
