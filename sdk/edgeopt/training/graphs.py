# SPDX-License-Identifier: Apache-2.0
"""An exported program as a graph that can be edited and run in batches, and back.

Rules:
- The graph owns copies of all weights; the program is never touched.
- Inputs and outputs are flat, in the order of the program's signature.
- Shapes that were exported with batch 1 are freed; whether the graph then says the same for a batch as for its
  samples one by one is tried, never assumed (`is_batchable`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from edgeopt_wire.errors import RecipeError

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten.reshape.default, aten.expand.default)
_BATCH_TOLERANCE = 1e-3  # of the output's largest value: float32 sums in another order, not another meaning


def flat_graph(program: Any) -> fx.GraphModule:
    """Copy a program into a graph module that takes tensors one by one and returns a flat tuple."""
    module = program.module(check_guards=False)
    found = copy.deepcopy(fx.GraphModule(module, module.graph))
    found.graph.set_codegen(fx.graph.CodeGen())
    _refuse_training_mode(found)
    _without_in_place(found.graph)
    for node in found.graph.nodes:
        if node.op == "call_function" and node.target in _RESHAPES:
            _free_batch(node)
    found.recompile()
    for parameter in found.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return found


def flat(values: Any) -> tuple[torch.Tensor, ...]:
    """Return the outputs of a flat graph as a tuple, however it packs them."""
    return (values,) if isinstance(values, torch.Tensor) else tuple(values)


def is_batchable(
    graph: fx.GraphModule, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]
) -> bool:
    """Say whether two samples in one batch give what they give one by one."""
    with torch.no_grad():
        try:
            both = flat(graph(*(torch.cat(pair) for pair in zip(first, second, strict=True))))
        except RuntimeError:  # a shape that is fixed to batch 1
            return False
        alone = [torch.cat(pair) for pair in zip(flat(graph(*first)), flat(graph(*second)), strict=True)]
    return all(
        wanted.shape == found.shape
        and bool((wanted - found).abs().max() <= _BATCH_TOLERANCE * wanted.abs().max().clamp_min(1e-6))
        for wanted, found in zip(alone, both, strict=True)
    )


def export(graph: fx.GraphModule, program: Any) -> Any:
    """Export an edited copy of `program`'s graph with the program's own signature and batch 1."""
    from torch.utils import _pytree as pytree

    whole = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    whole.graph.set_codegen(program.module(check_guards=False).graph._codegen)  # noqa: SLF001 - no other way to keep names
    whole.recompile()
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    edges = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    examples = [torch.zeros(tuple(values[name].shape), dtype=values[name].dtype) for name in edges]
    arguments, keywords = pytree.tree_unflatten(examples, program.call_spec.in_spec)
    with torch.no_grad():
        return torch.export.export(whole, arguments, keywords, strict=False)


def attribute(module: torch.nn.Module, path: str) -> Any:
    """Follow a dotted path."""
    for part in path.split("."):
        module = getattr(module, part)
    return module


def replace_attribute(module: torch.nn.Module, path: str, value: Any) -> None:
    """Set what a dotted path leads to; a tensor becomes a parameter without gradients."""
    owner, _, name = path.rpartition(".")
    holder = attribute(module, owner) if owner else module
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=False)
    setattr(holder, name, value)


def _without_in_place(graph: fx.Graph) -> None:
    """Let every operator return a new tensor, which all later readers of the old one read."""
    for node in list(graph.nodes):
        name = str(node.target).split(".")
        if (
            node.op != "call_function"
            or name[0] != "aten"
            or not name[1].endswith("_")
            or name[1][:2] == "__"
        ):
            continue
        overloads = getattr(aten, name[1][:-1])
        before = node.args[0]
        order = {found: number for number, found in enumerate(graph.nodes)}
        for user in [user for user in before.users if order[user] > order[node]]:
            user.replace_input_with(before, node)
        node.target = getattr(overloads, name[2])


def _refuse_training_mode(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        is_active = (node.target is aten.batch_norm.default and node.args[5]) or (
            node.target in (aten.dropout.default, aten.dropout_.default) and node.args[2]
        )
        if is_active:
            raise RecipeError(
                f"quantize_aware_training: operator {node.name!r} was exported in training mode; call model.eval() "
                "before torch.export.export (training mode is put back where it belongs)"
            )


def _free_batch(node: fx.Node) -> None:
    """Let the first axis of a reshape be the batch, where it was 1 before and after."""
    source, shape = node.args[0], node.args[1]
    value = node.meta.get("val")
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    if value is None or before is None or not isinstance(shape, (list, tuple)) or len(shape) == 0:
        return
    if before.dim() == 0 or before.shape[0] != 1 or value.shape[0] != 1 or shape[0] != 1:
        return
    if node.target is aten.expand.default:
        node.args = (source, [-1, *shape[1:]], *node.args[2:])
    else:
        node.args = (source, [-1, *(int(size) for size in value.shape[1:])])
