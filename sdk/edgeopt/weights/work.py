# SPDX-License-Identifier: Apache-2.0
"""A program whose weights are being quantized: what was found in it, what becomes of it, what is to be said."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeopt.weights import lowering
from edgeopt.weights.options import Options
from edgeopt_converters.onnx_subgraphs import graphs

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Product:
    """One weight, and all products that multiply with it."""

    weight: str
    is_rows: bool  # (outputs, inputs), as Gemm with transB keeps it
    is_narrow: bool = False  # stored in 4 bits, multiplied in float
    nodes: list[Any] = field(default_factory=list)
    values: tuple[str, ...] = ()  # what is multiplied with the weight, seen through changes of shape


@dataclass
class Work:
    """A program on its way, and what is to be said about it."""

    program: Any
    options: Options
    exclude: tuple[str, ...]
    products: dict[tuple[str, bool], Product] = field(default_factory=dict)
    lowered: dict[str, lowering.Lowered] = field(
        default_factory=dict
    )  # by node output, or by weight if stored
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.constants = {tensor.name: tensor for tensor in self.program.graph.initializer}

    def array(self, name: str) -> np.ndarray:
        """The values of a constant."""
        import onnx

        values: np.ndarray = onnx.numpy_helper.to_array(self.constants[name])
        return values

    def nodes(self) -> Iterator[Any]:
        """All nodes of all graphs."""
        for graph in graphs(self.program):
            yield from graph.node


def label(node: Any) -> str:
    """What a node is called in notes."""
    return str(node.name or lowering.key(node))


def elements(tensor: Any) -> int:
    """The number of a tensor's values."""
    return math.prod(tensor.dims)


def attribute(node: Any, name: str, default: Any) -> Any:
    """A node's attribute, or the default."""
    import onnx

    return next(
        (onnx.helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default
    )
