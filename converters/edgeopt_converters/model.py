# SPDX-License-Identifier: Apache-2.0
"""Model: a program in exactly one format, with the tensors at its edges.

Rules:
- `inputs` and `outputs` stand in the program's own order; that order, not the names, says which tensor is which
  when a model is converted.
- A converter returns a new model and leaves the one it was given as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

FORMATS = (
    "torch",  # a torch.export.ExportedProgram, the hub: it can be trained and lowered everywhere
    "onnx",  # an onnx.ModelProto without external data
    "litert",  # the bytes of a .tflite file
    "executorch",  # the bytes of a .pte file
)

SUFFIXES = {"onnx": ".onnx", "litert": ".tflite", "executorch": ".pte"}
"""What the file of a format is called: some runtimes tell formats by it."""


@dataclass(frozen=True)
class Model:
    """A program of one of `FORMATS`; `program` is the framework's own object, opaque here."""

    format: str
    program: Any
    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise RecipeError(seam.unknown("model format", self.format, FORMATS))
        for what, specs in (("input", self.inputs), ("output", self.outputs)):
            names = [spec.name for spec in specs]
            if not names:
                raise RecipeError(f"model {self.name!r} needs at least one {what} tensor, found none")
            if len(set(names)) != len(names):
                raise RecipeError(f"model {self.name!r}: every {what} needs its own name, found {names}")
