# SPDX-License-Identifier: Apache-2.0
"""Choose operators of an ONNX graph by what they are, because names change with the next export.

A selector is one of:
- a name ("node_Conv_878") or a type ("Softmax");
- the n-th of its type in the order in which they run, from 0: "Conv#0", "Conv#-1";
- a role: "role:first", "role:last" (convolution or matrix product), "role:depthwise", "role:pointwise",
  "role:classifier" (a matrix product that makes an output of the model).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

ROLES = ("first", "last", "depthwise", "pointwise", "classifier")
PRODUCTS = ("Conv", "Gemm", "MatMul", "ConvTranspose")


def select(program: Any, selectors: Iterable[str]) -> frozenset[str]:
    """Return the names of the operators that any selector means.

    Raises:
        RecipeError: A selector means nothing in this model; the message lists its types.
    """
    found: set[str] = set()
    for selector in selectors:
        found.update(_select(program, selector))
    return frozenset(found)


def describe(program: Any, name: str) -> str:
    """The selector of an operator that survives an export: its type and number."""
    node = next(entry for entry in program.graph.node if entry.name == name)
    alike = [entry.name for entry in program.graph.node if entry.op_type == node.op_type]
    return f"{node.op_type}#{alike.index(name)}"


def _select(program: Any, selector: str) -> list[str]:
    nodes = list(program.graph.node)
    if selector.startswith("role:"):
        return _by_role(program, selector.removeprefix("role:"))
    kind, mark, number = selector.rpartition("#")
    alike = [node.name for node in nodes if node.op_type == kind]
    if mark and alike:
        try:
            return [alike[int(number)]]
        except (ValueError, IndexError) as error:
            raise RecipeError(
                f"quantize.exclude: {selector!r} means the n-th {kind}, this model has {len(alike)} of them"
            ) from error
    found = [node.name for node in nodes if selector in (node.name, node.op_type)]
    if not found:
        raise RecipeError(
            f"quantize.exclude: the model has no operator of name or type {selector!r}; "
            f"its types are {', '.join(sorted({node.op_type for node in nodes}))}"
        )
    return found


def _by_role(program: Any, role: str) -> list[str]:
    if role not in ROLES:
        raise RecipeError(f"quantize.exclude: {seam.unknown('role', role, ROLES)}")
    products = [node for node in program.graph.node if node.op_type in PRODUCTS]
    if role in ("first", "last"):
        found = products[:1] if role == "first" else products[-1:]
    elif role == "classifier":
        outputs = {output.name for output in program.graph.output}
        found = [node for node in products if node.op_type != "Conv" and outputs & set(node.output)]
    else:
        shapes = {tensor.name: tuple(tensor.dims) for tensor in program.graph.initializer}
        convolutions = [node for node in products if node.op_type == "Conv"]
        wanted = _is_depthwise if role == "depthwise" else _is_pointwise
        found = [node for node in convolutions if wanted(node, shapes.get(node.input[1], ()))]
    if not found:
        raise RecipeError(f"quantize.exclude: this model has no operator of the role {role!r}")
    return [node.name for node in found]


def _is_depthwise(node: Any, shape: tuple[int, ...]) -> bool:
    groups = next((entry.i for entry in node.attribute if entry.name == "group"), 1)
    return len(shape) > 2 and shape[1] == 1 and groups == shape[0] and groups > 1


def _is_pointwise(node: Any, shape: tuple[int, ...]) -> bool:
    return len(shape) > 2 and set(shape[2:]) == {1} and not _is_depthwise(node, shape)
