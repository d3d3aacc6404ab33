# SPDX-License-Identifier: Apache-2.0
"""Matrix products with constant weights in ONNX models, for passes that change them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

PRODUCTS = ("MatMul", "Gemm")


def attributes(node: Any) -> Mapping[str, Any]:
    """Return a node's attributes by name."""
    import onnx

    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


def unflatten(program: Any) -> Any:
    """Turn Reshape, Gemm, Reshape back into MatMul and Add, in place, and return the program.

    ONNX Runtime's folding writes MatMul and Add of three axes as a Gemm of two between reshapes, one pair for each
    product. Products of one activation then read different tensors, and each quantizes its own.
    """
    graph = program.graph
    writer = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    outputs = {output.name for output in graph.output}
    shapes = {
        info.name: tuple(axis.dim_value for axis in info.type.tensor_type.shape.dim)
        for info in (*graph.value_info, *graph.input, *graph.output)
    }
    replaced: dict[str, list[Any]] = {}
    dropped: set[str] = set()
    for node in graph.node:
        before = writer.get(node.input[0]) if node.op_type == "Gemm" and _is_plain(node) else None
        after = readers[node.output[0]]
        if before is None or before.op_type != "Reshape" or node.output[0] in outputs or len(after) != 1:
            continue
        inner, outer = shapes.get(before.input[0], ()), shapes.get(after[0].output[0], ())
        width = shapes.get(node.output[0], ())[-1:]
        if after[0].op_type == "Reshape" and len(inner) > 2 and all(inner) and outer == (*inner[:-1], *width):
            replaced[node.output[0]] = list(_product(node, before.input[0], after[0].output[0]))
            dropped.add(after[0].output[0])
            if len(readers[before.output[0]]) == 1 and before.output[0] not in outputs:
                dropped.add(before.output[0])
    nodes = [
        new
        for node in graph.node
        if node.output[0] not in dropped
        for new in replaced.get(node.output[0], [node])
    ]
    _write(graph, nodes)
    return program


def _is_plain(node: Any) -> bool:
    found = attributes(node)
    is_scaled = found.get("alpha", 1.0) != 1.0 or found.get("beta", 1.0) != 1.0
    return not (is_scaled or found.get("transA", 0) or found.get("transB", 0))


def _product(node: Any, source: str, target: str) -> Iterator[Any]:
    from onnx import helper

    has_bias = len(node.input) > 2 and bool(node.input[2])
    result = node.output[0] if has_bias else target
    yield helper.make_node("MatMul", [source, node.input[1]], [result], node.name)
    if has_bias:
        yield helper.make_node("Add", [result, node.input[2]], [target], f"{node.name}_bias")


def _write(graph: Any, nodes: list[Any]) -> None:
    """Set the nodes, and forget the shapes that may have changed and the constants that nobody reads."""
    import onnx

    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in reads(node)} | {output.name for output in graph.output}
    tensors = [
        onnx.TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in used
    ]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    written = {name for node in kept for name in node.output}
    shapes = [info for info in graph.value_info if info.name in written]
    changed = {name for node in kept if node.op_type == "MatMul" for name in node.output}
    kept_shapes = [
        onnx.ValueInfoProto.FromString(info.SerializeToString())
        for info in shapes
        if info.name not in changed
    ]
    del graph.value_info[:]
    graph.value_info.extend(kept_shapes)


def reads(node: Any) -> Iterator[str]:
    """Every name that a node reads, its subgraphs' included."""
    yield from node.input
    for entry in node.attribute:
        for graph in (entry.g, *entry.graphs):
            for inner in graph.node:
                yield from reads(inner)
            yield from (output.name for output in graph.output)
