# SPDX-License-Identifier: Apache-2.0
"""One operator and its neighbours, cut out of an ONNX model as a small model that can be changed and tried.

Rules:
- Constants, and what is computed from constants alone (a DequantizeLinear of weights), come along at no distance; large
  ones of other operators become inputs, because copying them would take the time of everything else.
- Where the cut goes through a tensor that an outside operator makes, it becomes an input; one that an outside operator
  reads becomes an output, because a tensor that is read elsewhere is what often stops a fusion.
- Control flow is never cut out; the operators inside a branch are, with the outer tensors as inputs.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeopt.coverage import _optimized

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
TARGET = "edgeopt-target"
LARGE_BYTES = 65536
"""Scales and biases are smaller, weights of neighbours larger."""


@dataclass
class Scope:
    """One graph of a model (the main one or a branch): who makes and who reads each tensor."""

    program: Any
    nodes: list[Any]
    constants: Mapping[str, Any]
    types: Mapping[str, Any]
    edges: frozenset[str]
    writers: dict[str, int] = field(default_factory=dict)
    readers: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    constant_nodes: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for index, node in enumerate(self.nodes):
            self.writers.update(dict.fromkeys(node.output, index))
            names = set(node.input) | _captured(node)
            for name in names:
                self.readers[name].append(index)
            reads = [name for name in names if name and name not in self.constants]
            if all(
                self.writers.get(name, -1) in self.constant_nodes for name in reads
            ):  # ONNX sorts its nodes
                self.constant_nodes.add(index)

    def is_constant(self, index: int) -> bool:
        """Whether an operator reads nothing but constants."""
        return index in self.constant_nodes

    def read_by(self, name: str) -> list[Any]:
        """The operators that read a tensor."""
        return [self.nodes[index] for index in self.readers.get(name, ())]

    def writer(self, name: str) -> Any:
        """The operator that makes a tensor, or None."""
        return self.nodes[self.writers[name]] if name in self.writers else None


def scopes(program: Any) -> Iterator[Scope]:
    """The main graph of a model and every graph inside it; shapes are inferred first where they can be."""
    import onnx

    # where inference finds a contradiction, the boundaries of a cut have types and no shapes
    with contextlib.suppress(onnx.shape_inference.InferenceError, ValueError):
        program = onnx.shape_inference.infer_shapes(program, strict_mode=False, data_prop=True)
    known = {tensor.name: tensor for tensor in _optimized.constants(program.graph)}
    pending = [program.graph]
    while pending:
        graph = pending.pop(0)
        pending.extend(inner for node in graph.node for inner in _optimized.inner_graphs(node))
        yield Scope(
            program,
            [node for node in graph.node if node.op_type != "Constant"],
            known,
            {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)},
            frozenset(value.name for value in graph.output),
        )


def cut(scope: Scope, target: int, *, radius: int) -> Any:
    """Make a ModelProto of what lies within `radius` operators of the one at `target`, which is called `TARGET` there."""
    import onnx

    chosen = _ball(scope, target, radius)
    own = _constants_of(scope, target)
    nodes = [scope.nodes[index] for index in sorted(chosen)]
    made = {name for node in nodes for name in node.output if name}
    read = dict.fromkeys(name for node in nodes for name in node.input if name)
    kept = {
        name
        for name in read
        if name in scope.constants and (name in own or scope.constants[name].ByteSize() <= LARGE_BYTES)
    }
    shown = [
        name
        for node in nodes
        for name in node.output
        if name
        and (name in scope.edges or not chosen.issuperset(scope.readers[name]) or not scope.readers[name])
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "cut",
        [_value(scope, name) for name in read if name not in made and name not in kept],
        [onnx.helper.make_empty_tensor_value_info(name) for name in shown],
        [scope.constants[name] for name in read if name in kept],
    )
    model = onnx.ModelProto()
    model.ir_version = scope.program.ir_version
    model.opset_import.extend(scope.program.opset_import)
    model.functions.extend(scope.program.functions)
    model.graph.CopyFrom(graph)
    model.graph.node[sorted(chosen).index(target)].name = TARGET
    return model


def _constants_of(scope: Scope, index: int) -> set[str]:
    """The constants that an operator reads, also through a DequantizeLinear or whatever is made of constants alone."""
    found: set[str] = set()
    for name in scope.nodes[index].input:
        if name in scope.constants:
            found.add(name)
        elif name in scope.writers and scope.is_constant(scope.writers[name]):
            found |= _constants_of(scope, scope.writers[name])
    return found


def _ball(scope: Scope, start: int, radius: int) -> set[int]:
    found = {start}
    edge = {start}
    for _ in range(radius):
        near = {index for at in edge for index in _next_to(scope, at)} - found
        edge = {index for index in near if not scope.is_constant(index)}
        found |= edge
    pending = list(found)
    while pending:  # what is made of constants alone
        for name in scope.nodes[pending.pop()].input:
            index = scope.writers.get(name)
            if index is not None and index not in found and scope.is_constant(index):
                found.add(index)
                pending.append(index)
    return found


def _next_to(scope: Scope, index: int) -> Iterator[int]:
    node = scope.nodes[index]
    near = [scope.writers[name] for name in node.input if name in scope.writers]
    near += [reader for name in node.output for reader in scope.readers[name]]
    yield from (other for other in near if not any(_optimized.inner_graphs(scope.nodes[other])))


def _captured(node: Any) -> set[str]:
    """The outer tensors that the branches of a control flow operator read (and inner ones, which harm nothing)."""
    return {
        name
        for graph in _optimized.inner_graphs(node)
        for inner in graph.node
        for name in (*inner.input, *_captured(inner))
    }


def _value(scope: Scope, name: str) -> Any:
    import onnx

    if name in scope.constants:
        tensor = scope.constants[name]
        return onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
    known = scope.types.get(name)
    if known is not None and known.type.tensor_type.elem_type:
        return known
    return onnx.helper.make_tensor_value_info(name, _element_type(scope, name), None)


def _element_type(scope: Scope, name: str) -> int:
    import onnx

    writer = scope.writer(name)
    if writer is not None and writer.op_type == QUANTIZE:
        zero_point = scope.constants.get(writer.input[2]) if len(writer.input) > 2 else None
        return int(zero_point.data_type) if zero_point is not None else int(onnx.TensorProto.UINT8)
    return int(onnx.TensorProto.FLOAT)
