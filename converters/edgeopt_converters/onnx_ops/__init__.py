# SPDX-License-Identifier: Apache-2.0
"""ONNX operators in PyTorch, one module a family; each has a table `OPERATORS`: ONNX name -> function of a `Call`.

Rules:
- A function reads its inputs through the call: `tensor(i)` where values flow, `constant(i)` where ONNX passes a
  parameter (axes, pads, sizes) that PyTorch wants as Python numbers.
- What it cannot do exactly as ONNX defines it, it refuses by `call.refuse(why)`; nothing is approximated.
- It computes what the operator's definition for the model's opset says; where a definition changed (axes that moved
  from an attribute to an input), both forms are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt_wire import seam
from edgeopt_wire.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np

Tensor = Any
"""A torch.Tensor; PyTorch is imported by the functions that run."""

ADVICE = (
    "keep the model in ONNX (it is then optimized post-training only), or export it without this operator"
)


@dataclass(frozen=True)
class Call:
    """One run of one node: its inputs, attributes and constants.

    `values` holds each input as a tensor, or None where it is left out. `constants` holds those known beforehand.
    """

    type: str
    name: str
    opset: int
    attributes: Mapping[str, Any]
    values: Callable[[int], Tensor | None]
    constants: Sequence[np.ndarray | None]
    outputs: int

    @property
    def inputs(self) -> int:
        """How many inputs the node lists, left-out ones included."""
        return len(self.constants)

    def tensor(self, index: int) -> Tensor:
        """Input `index` as a tensor; refuses if it is left out."""
        found = self.optional(index)
        if found is None:
            raise self.refuse(f"input {index} is missing")
        return found

    def optional(self, index: int) -> Tensor | None:
        """Input `index` as a tensor, or None if it is left out."""
        return self.values(index) if index < self.inputs else None

    def tensors(self) -> list[Tensor]:
        """All inputs."""
        return [self.tensor(index) for index in range(self.inputs)]

    def constant(self, index: int) -> np.ndarray | None:
        """Input `index` as a known array, or None if it is left out; refuses if it depends on the model's inputs."""
        if index >= self.inputs or self.optional_is_missing(index):
            return None
        found = self.constants[index]
        if found is None:
            raise self.refuse(f"input {index} depends on the model's input; it must be constant")
        return found

    def optional_is_missing(self, index: int) -> bool:
        """Whether input `index` is left out; does not turn a constant into a tensor."""
        return index >= self.inputs or (self.constants[index] is None and self.values(index) is None)

    def integers(self, index: int, attribute: str = "") -> list[int] | None:
        """A list of integers that is an input in newer opsets and an attribute in older ones."""
        found = self.constant(index)
        if found is not None:
            return [int(value) for value in found.reshape(-1)]
        given = self.attributes.get(attribute) if attribute else None
        return None if given is None else [int(value) for value in given]

    def get(self, attribute: str, default: Any) -> Any:
        """An attribute, or ONNX's default for it."""
        return self.attributes.get(attribute, default)

    def refuse(self, why: str) -> UnsupportedError:
        """The error to raise: names operator, node and opset, and says what to do."""
        return UnsupportedError(
            f"onnx_to_torch: {self.type} (node {self.name!r}, opset {self.opset}): {why}; {ADVICE}"
        )


Function = Callable[[Call], Any]


def table() -> dict[str, Function]:
    """All operators that can enter PyTorch: ONNX name -> function."""
    found: dict[str, Function] = {}
    for family in seam.names(__name__):
        found.update(seam.load(__name__, family).OPERATORS)
    return found
