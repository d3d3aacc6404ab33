# SPDX-License-Identifier: Apache-2.0
"""The graph that is trained: the float graph with grids where the integer runtimes have theirs.

Rules:
- Every convolution and matrix product with a weight of its own gets a weight grid; batch normalization behind one is
  folded into it.
- Activations get a grid where native quantizers put one: at inputs, and behind every operator that computes. An
  activation function right behind its only source is fused with it, so the grid stands behind the function.
- What only moves values (reshape, max pooling, ...) shares its source's grid; a model's output stays float.
- What was left in float is said, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from edgeopt.onnx_select import Operator, choose
from edgeopt.training.graphs import aten, attribute, replace_attribute
from edgeopt.training.grids import ActivationGrid
from edgeopt.training.layers import FORMS, Layer, Normalization, Statistics
from edgeopt_wire.errors import RecipeError

FUSED = (
    aten.relu.default,
    aten.relu6.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.hardtanh.default,
)
"""Activation functions that runtimes compute within the operator before them."""

COMPUTES = (
    *FORMS,
    *FUSED,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.gelu.default,
    aten.leaky_relu.default,
    aten.prelu.default,
    aten.tanh.default,
    aten.softmax.int,
    aten.batch_norm.default,
    aten.mean.dim,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.cat.default,
    aten.upsample_bilinear2d.vec,
)
"""Operators whose result is on a grid of its own."""

ONNX_TYPES = {
    "conv1d": "Conv",
    "conv2d": "Conv",
    "conv3d": "Conv",
    "linear": "Gemm",
    "addmm": "Gemm",
    "mm": "MatMul",
    "matmul": "MatMul",
    "relu": "Relu",
    "relu6": "Clip",
    "clamp": "Clip",
    "clamp_min": "Clip",
    "hardtanh": "Clip",
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "hardswish": "HardSwish",
    "hardsigmoid": "HardSigmoid",
    "sigmoid": "Sigmoid",
    "silu": "Swish",
    "gelu": "Gelu",
    "leaky_relu": "LeakyRelu",
    "prelu": "PRelu",
    "tanh": "Tanh",
    "softmax": "Softmax",
    "batch_norm": "BatchNormalization",
    "mean": "ReduceMean",
    "avg_pool2d": "AveragePool",
    "adaptive_avg_pool2d": "GlobalAveragePool",
    "cat": "Concat",
    "upsample_bilinear2d": "Resize",
}
"""What ONNX, and so a recipe, calls the operators that have a grid."""


@dataclass
class Student:
    """A graph with its layers and its activation grids, by the node of the float graph that they stand for."""

    graph: fx.GraphModule
    layers: dict[str, Layer] = field(default_factory=dict)
    grids: dict[str, ActivationGrid] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def switch(self, *, is_on: bool) -> None:
        """Round weights and activations, or compute in float."""
        for layer in self.layers.values():
            layer.is_on = is_on
        for grid in self.grids.values():
            grid.is_on = is_on

    def freeze(self) -> None:
        """Freeze the statistics of every folded batch normalization."""
        for norm in self.norms():
            norm.is_frozen = True

    def settle(self) -> None:
        """Let the last batch enter the running statistics."""
        for norm in self.norms():
            norm.settle()

    def norms(self) -> list[Normalization]:
        """Return the folded batch normalizations."""
        return [layer.norm for layer in self.layers.values() if layer.norm is not None]


@dataclass(frozen=True)
class Grids:
    """What the target's integers are: bits of weights, one step per channel or tensor, symmetric activations."""

    bits: int = 8
    per_channel: bool = True
    is_symmetric: bool = False


def build_student(graph: fx.GraphModule, grids: Grids, exclude: Sequence[str] = ()) -> Student:
    """Turn a flat float graph into a student, in place.

    Raises:
        RecipeError: `exclude` names nothing in the graph, or no layer is left to quantize.
    """
    excluded = choose(_operators(graph), exclude)
    student = Student(graph)
    left = [f"{name} (excluded by the recipe)" for name in sorted(excluded)]
    for node in list(graph.graph.nodes):
        form = FORMS.get(node.target) if node.op == "call_function" else None
        if form is None:
            continue
        reason = _why_not(graph, node, form.weight)
        if node.name in excluded or reason:
            left.extend([f"{node.name} ({reason})"] if node.name not in excluded else [])
        else:
            _take_layer(student, node, grids)
    if not student.layers:
        raise RecipeError(
            "quantize_aware_training found no convolution or matrix product with weights of its own"
        )
    for node in [node for node in graph.graph.nodes if _needs_grid(node, student, excluded)]:
        _put_grid(student, node, is_symmetric=grids.is_symmetric)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    student.notes = (f"left in float while training: {', '.join(left)}",) if left else ()
    return student


def export_graph(student: Student, graph: fx.GraphModule) -> fx.GraphModule:
    """Write the student's weights into a fresh flat copy of the float graph; folded normalization disappears."""
    trained = dict(student.graph.named_parameters())
    for path in [path for path, _ in graph.named_parameters()]:
        if path in trained:
            replace_attribute(graph, path, trained[path].detach().clone())
    nodes = {node.name: node for node in graph.graph.nodes}
    for name, layer in student.layers.items():
        node = nodes[name]
        weight, bias = layer.exported()
        replace_attribute(graph, str(node.args[layer.form.weight].target), weight)
        if bias is not None and layer.form.bias is not None:
            _set_bias(graph, node, layer.form.bias, bias)
        if layer.norm is not None:
            norm = next(iter(node.users))
            norm.replace_all_uses_with(node)
            graph.graph.erase_node(norm)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _set_bias(graph: fx.GraphModule, node: fx.Node, position: int, bias: torch.Tensor) -> None:
    given = node.args[position] if position < len(node.args) else None
    if isinstance(given, fx.Node) and given.op == "get_attr" and len(given.users) == 1:
        replace_attribute(graph, str(given.target), bias.detach().clone())
        return
    path = f"edgeopt_bias_{node.name}"
    graph.register_parameter(path, nn.Parameter(bias.detach().clone(), requires_grad=False))
    with graph.graph.inserting_before(node):
        constant = graph.graph.get_attr(path)
    arguments = list(node.args)
    if position < len(arguments):
        arguments[position] = constant
    else:
        arguments.append(constant)
    node.args = tuple(arguments)


def _why_not(graph: fx.GraphModule, node: fx.Node, position: int) -> str:
    weight = node.args[position]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "its weight is no constant of its own"
    if len(weight.users) > 1:
        return "shares its weight with another layer"
    values = attribute(graph, str(weight.target))
    if values.dtype != torch.float32 or (values.dim() != 2 and "conv" not in str(node.target)):
        return "its weight is not a float32 matrix"
    return ""


def _take_layer(student: Student, node: fx.Node, grids: Grids) -> None:
    """Put a `Layer` where an operator stands, with the batch normalization behind it."""
    graph = student.graph
    form = FORMS[node.target]
    known = tuple(_value(graph, argument) for argument in node.args)
    layer = Layer(node.target, form, known, dict(node.kwargs))
    last = node
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.batch_norm.default and users[0].args[0] is node:
        last = users[0]
        layer.norm = _normalization(graph, last)
    layer.prepare(grids.bits, per_channel=grids.per_channel)
    path = f"edgeopt_layer_{node.name}"
    graph.add_submodule(path, layer)
    with graph.graph.inserting_after(last):
        call = graph.graph.call_module(path, (node.args[form.values],))
    last.replace_all_uses_with(call)
    if last is not node:
        graph.graph.erase_node(last)
    graph.graph.erase_node(node)
    student.layers[node.name] = layer


def _value(graph: fx.GraphModule, argument: Any) -> Any:
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        return attribute(graph, str(argument.target))
    return argument


def _normalization(graph: fx.GraphModule, node: fx.Node) -> Normalization:
    """Read `aten.batch_norm(x, weight, bias, mean, variance, training, momentum, epsilon, cudnn)`."""
    scale, shift, mean, variance = (_value(graph, argument) for argument in node.args[1:5])
    return Normalization(
        torch.ones_like(mean) if scale is None else scale,
        torch.zeros_like(mean) if shift is None else shift,
        Statistics(mean, variance),
        momentum=float(node.args[6]),
        epsilon=float(node.args[7]),
    )


def _needs_grid(node: fx.Node, student: Student, excluded: frozenset[str]) -> bool:
    """Decide by what a node is and who reads it."""
    if node.name in excluded or not node.users or any(user.op == "output" for user in node.users):
        return False
    is_layer = _layer_of(node, student) is not None
    if node.op != "placeholder" and not is_layer and node.target not in COMPUTES:
        return False
    value = node.meta.get("val")
    if value is not None and not value.is_floating_point():
        return False
    users = list(node.users)
    is_fused = len(users) == 1 and users[0].target in FUSED and node.op != "placeholder"
    return not is_fused


def _layer_of(node: fx.Node, student: Student) -> Layer | None:
    if node.op != "call_module":
        return None
    return student.layers.get(str(node.target).removeprefix("edgeopt_layer_"))


def _put_grid(student: Student, node: fx.Node, *, is_symmetric: bool) -> None:
    graph = student.graph
    name = node.name.removeprefix("edgeopt_layer_")
    grid = ActivationGrid(is_symmetric=is_symmetric)
    path = f"edgeopt_grid_{name}"
    graph.add_submodule(path, grid)
    users = list(node.users)
    with graph.graph.inserting_after(node):
        call = graph.graph.call_module(path, (node,))
    for user in users:
        user.replace_input_with(node, call)
    student.grids[name] = grid


def _operators(graph: fx.GraphModule) -> list[Operator]:
    """The operators as a recipe's selectors see them, by their types in ONNX and in PyTorch."""
    found = []
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        kind = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else str(node.target)
        types = (ONNX_TYPES[kind], kind) if kind in ONNX_TYPES else (kind,)
        if kind == "linear":  # ONNX says Gemm or, of more than two axes, MatMul
            types = (*types, "MatMul")
        form = FORMS.get(node.target)
        is_constant = form is not None and getattr(node.args[form.weight], "op", "") == "get_attr"
        shape = tuple(_value(graph, node.args[form.weight]).shape) if form and is_constant else ()
        groups = int(node.args[6]) if types[0] == "Conv" and len(node.args) > 6 else 1
        makes_output = any(user.op == "output" for user in node.users)
        found.append(Operator(node.name, types, shape, groups, makes_output))
    return found
