# SPDX-License-Identifier: Apache-2.0
"""Choose operators of a graph by what they are, because names change with the next export.

A selector is one of:
- a name ("node_Conv_878") or a type ("Softmax");
- the n-th of its type in the order in which they run, from 0: "Conv#0", "Conv#-1";
- a role: "role:first", "role:last" (convolution or matrix product), "role:depthwise", "role:pointwise",
  "role:classifier" (a matrix product that makes an output of the model).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

GATE = "Gate"
"""The type by which selectors know the depthwise 1x1 convolution that `hard_gates` puts in a gate's place: so the numbers
of all others are those of the model as it was handed over."""

ROLES = ("first", "last", "depthwise", "pointwise", "classifier")
PRODUCTS = ("Conv", "Gemm", "MatMul", "ConvTranspose")


@dataclass(frozen=True)
class Operator:
    """An operator as selectors see it, of a graph in any form. `types` has its ONNX type first, then other names for it.

    `weight` is the shape of a convolution's weights (outputs, inputs of a group, *kernel); `makes_output` says whether a
    model's output is its own.
    """

    name: str
    types: tuple[str, ...]
    weight: tuple[int, ...] = ()
    groups: int = 1
    makes_output: bool = False

    @property
    def type(self) -> str:
        """Its ONNX type, or `GATE`."""
        return GATE if self.is_gate else self.types[0]

    @property
    def is_gate(self) -> bool:
        """Whether it is a line for each channel, a convolution that no model has of itself."""
        return self.types[0] == "Conv" and len(self.weight) > 2 and is_line(self.weight, self.groups)

    @property
    def is_depthwise(self) -> bool:
        """Whether it is a convolution of every channel by itself."""
        is_alone = len(self.weight) > 2 and self.weight[1] == 1
        return self.type == "Conv" and is_alone and self.groups == self.weight[0] > 1

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a convolution without a neighbourhood."""
        is_small = len(self.weight) > 2 and set(self.weight[2:]) == {1}
        return self.type == "Conv" and is_small and not self.is_depthwise


def is_line(weight: Sequence[int], groups: int) -> bool:
    """Whether weights (outputs, inputs of a group, *kernel) are one factor for each channel."""
    return groups == weight[0] > 1 and set(weight[1:]) == {1}


def select(program: Any, selectors: Iterable[str]) -> frozenset[str]:
    """Return the names of the operators of an ONNX program that any selector means.

    Raises:
        RecipeError: A selector means nothing in this model; the message lists its types.
    """
    return choose(_operators(program), selectors)


def choose(operators: Sequence[Operator], selectors: Iterable[str]) -> frozenset[str]:
    """Return the names of the operators that any selector means; `operators` are in the order in which they run.

    Raises:
        RecipeError: A selector means nothing in this model; the message lists its types.
    """
    found: set[str] = set()
    for selector in selectors:
        found.update(operator.name for operator in _chosen(operators, selector))
    return frozenset(found)


def describe(program: Any, name: str) -> str:
    """The selector of an operator that survives an export: its type and number."""
    operators = _operators(program)
    kind = next(operator.type for operator in operators if operator.name == name)
    alike = [operator.name for operator in operators if operator.type == kind]
    return f"{kind}#{alike.index(name)}"


def _chosen(operators: Sequence[Operator], selector: str) -> Sequence[Operator]:
    if selector.startswith("role:"):
        return _by_role(operators, selector.removeprefix("role:"))
    kind, mark, number = selector.rpartition("#")
    if GATE in (kind, selector) and not any(operator.is_gate for operator in operators):
        return []  # passes before `respell_operators` have none yet
    alike = [operator for operator in operators if kind in _types(operator)]
    if mark and alike:
        try:
            return [alike[int(number)]]
        except (ValueError, IndexError) as error:
            raise RecipeError(
                f"quantize.exclude: {selector!r} means the n-th {kind}, this model has {len(alike)} of them"
            ) from error
    found = [operator for operator in operators if selector in (operator.name, *_types(operator))]
    if not found:
        raise RecipeError(
            f"quantize.exclude: the model has no operator of name or type {selector!r}; "
            f"its types are {', '.join(sorted({operator.type for operator in operators}))}"
        )
    return found


def _types(operator: Operator) -> tuple[str, ...]:
    return (GATE,) if operator.is_gate else operator.types


def _by_role(operators: Sequence[Operator], role: str) -> Sequence[Operator]:
    if role not in ROLES:
        raise RecipeError(f"quantize.exclude: {seam.unknown('role', role, ROLES)}")
    products = [operator for operator in operators if operator.type in PRODUCTS]
    found = {
        "first": products[:1],
        "last": products[-1:],
        "depthwise": [operator for operator in products if operator.is_depthwise],
        "pointwise": [operator for operator in products if operator.is_pointwise],
        "classifier": [
            operator for operator in products if operator.type != "Conv" and operator.makes_output
        ],
    }[role]
    if not found:
        raise RecipeError(f"quantize.exclude: this model has no operator of the role {role!r}")
    return found


def _operators(program: Any) -> list[Operator]:
    shapes = {tensor.name: tuple(tensor.dims) for tensor in program.graph.initializer}
    outputs = {output.name for output in program.graph.output}
    return [
        Operator(
            node.name,
            (node.op_type,),
            shapes.get(node.input[1], ()) if node.op_type == "Conv" else (),
            next((entry.i for entry in node.attribute if entry.name == "group"), 1),
            bool(outputs & set(node.output)),
        )
        for node in program.graph.node
    ]
