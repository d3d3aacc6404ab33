# SPDX-License-Identifier: Apache-2.0
"""Bring what an ONNX file hides in branches and Constant nodes to where passes look for it.

Exporters keep weights as Constant nodes inside the branches of an If, one branch for each sampling rate or batch form.
A pass over the weights of the main graph finds nothing there and silently does nothing.

Rules:
- An input that the device always feeds the same value becomes a constant (`specialise`); every If that is thereby
  decided, or that static shapes decide, is replaced by the branch that is taken.
- Constant nodes of all graphs become initializers of the main graph, where every branch and body can read them.
- Values of sibling branches get names of their own, so that a name says which value is meant.
- What cannot be decided stays, with its branches, and a note names it.
- The caller's program is never touched; the new one computes the same values.

Why not ONNX Runtime's own inlining: 1.32 refuses nested branches that read the value of an outer one
("is not If node's input or previous node output in this subgraph"), which recurrent nets exported by tracing have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

DECIDING = frozenset({
    "Add", "And", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Gather", "Greater",
    "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Not", "Or",
    "Range", "ReduceProd", "Reshape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
    "Xor",
})  # fmt: skip
"""The operators that are computed ahead: those with which exporters write the condition of an If."""

DECIDING_ELEMENTS = 4096
"""Conditions are made of shapes and scalars; larger tensors are weights, which are no business of this module."""


def graphs(program: Any) -> Iterator[Any]:
    """Yield the main graph and then every graph inside a node, outermost first."""
    yield from _graphs(program.graph)


def specialise(program: Any, values: Mapping[str, np.ndarray] | None = None) -> tuple[Any, tuple[str, ...]]:
    """Fix inputs to `values`, take every decided branch, and make Constant nodes initializers of the main graph.

    Shapes should be static before, so that conditions on shapes are decided too. Called twice it changes nothing more.

    Raises:
        RecipeError: `values` names no input, or has another type or shape than the input.
    """
    import onnx

    new = onnx.ModelProto()
    new.CopyFrom(program)
    notes = [_fix(new.graph, name, value) for name, value in (values or {}).items()]
    lifted = _lift_constants(new)
    taken = []
    new = onnx.shape_inference.infer_shapes(new, data_prop=True)
    while True:  # a constant settles shapes, and these settle more constants
        before = len(new.graph.initializer)
        decided = _decide(new)
        if decided is None and len(new.graph.initializer) == before:
            break
        if decided is not None:
            graph, node, is_true = decided
            taken.append(f"{node.name or node.output[0]}: {'then' if is_true else 'else'}")
            _inline(new, graph, node, "then_branch" if is_true else "else_branch")
        new = onnx.shape_inference.infer_shapes(new, data_prop=True)
    _drop_unused(new)
    if lifted:
        notes.append(f"{lifted} Constant nodes became initializers")
    if taken:
        notes.append(f"{len(taken)} branches decided ahead ({', '.join(taken)})")
    open_ones = [
        node.name or node.output[0] for graph in graphs(new) for node in graph.node if node.op_type == "If"
    ]
    if open_ones:
        notes.append(f"{len(open_ones)} branches decided on the device only: {', '.join(open_ones)}")
    return new, tuple(notes)


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for inner in _inner(node):
            yield from _graphs(inner)


def _inner(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _fix(graph: Any, name: str, value: np.ndarray) -> str:
    """Replace one input of the main graph by a constant, and say so."""
    import onnx

    found = next((entry for entry in graph.input if entry.name == name), None)
    if found is None:
        raise RecipeError(seam.unknown("input", name, [entry.name for entry in graph.input]))
    tensor = found.type.tensor_type
    wanted = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    sizes = [dim.dim_value for dim in tensor.shape.dim]
    fits = len(sizes) == value.ndim and all(
        size in (0, given) for size, given in zip(sizes, value.shape, strict=True)
    )
    if value.dtype != wanted or not fits:
        raise RecipeError(
            f"input {name!r} takes {wanted} of shape {sizes}, found {value.dtype} of shape {list(value.shape)}"
        )
    graph.input.remove(found)
    graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    shown = value.item() if value.size == 1 else f"a constant of shape {list(value.shape)}"
    return f"input {name!r} is fixed to {shown}"


def _lift_constants(program: Any) -> int:
    """Move Constant nodes and the initializers of inner graphs to the main graph; say how many nodes there were."""
    names = _Names(program)
    count = 0
    for graph in list(graphs(program)):
        main = graph is program.graph
        renamed: dict[str, str] = {}
        for node in [node for node in graph.node if node.op_type == "Constant"]:
            tensor = _constant(node)
            if tensor is None:
                continue
            renamed[node.output[0]] = tensor.name = node.output[0] if main else names.fresh(node.output[0])
            program.graph.initializer.append(tensor)
            graph.node.remove(node)
            count += 1
        if not main:
            for tensor in graph.initializer:
                lifted = program.graph.initializer.add()
                lifted.CopyFrom(tensor)
                renamed[tensor.name] = lifted.name = names.fresh(tensor.name)
            del graph.initializer[:]
        constants = set(renamed.values())
        if not main:
            own = [name for node in graph.node for name in node.output if name and name not in renamed]
            renamed |= {name: names.fresh(name) for name in own}
        _rename(graph, renamed)
        _reattach(graph, constants)
    return count


def _constant(node: Any) -> Any:
    """The tensor of a Constant node; None for a sparse one or one of strings, which stay."""
    import numpy as np
    import onnx

    attribute = node.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        tensor = onnx.TensorProto()
        tensor.CopyFrom(value)
        return tensor
    if attribute.name in ("value_float", "value_floats"):
        return onnx.numpy_helper.from_array(np.asarray(value, np.float32))
    if attribute.name in ("value_int", "value_ints"):
        return onnx.numpy_helper.from_array(np.asarray(value, np.int64))
    return None


class _Names:
    """Names that no value of any graph of a program has yet."""

    def __init__(self, program: Any) -> None:
        self._count: dict[str, int] = {}
        for graph in graphs(program):
            for name in _defined(graph):
                self._count[name] = self._count.get(name, 0) + 1

    def fresh(self, name: str) -> str:
        """Return `name` for a value that moves to an outer graph: itself where only one value has it."""
        if self._count.get(name, 0) <= 1:
            return name
        number = 1
        while f"{name}_{number}" in self._count:
            number += 1
        self._count[f"{name}_{number}"] = 1
        self._count[name] -= 1
        return f"{name}_{number}"


def _defined(graph: Any) -> Iterator[str]:
    yield from (entry.name for entry in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (name for node in graph.node for name in node.output if name)


def _rename(graph: Any, renamed: Mapping[str, str]) -> None:
    """Give values other names wherever `graph` and the graphs inside it define or read them."""
    changed = {old: new for old, new in renamed.items() if old != new}
    if not changed:
        return
    for inner in _graphs(graph):
        for node in inner.node:
            for names in (node.input, node.output):
                names[:] = [changed.get(name, name) for name in names]
        for entry in (*inner.initializer, *inner.value_info, *inner.output):
            entry.name = changed.get(entry.name, entry.name)


def _reattach(graph: Any, constants: set[str]) -> None:
    """An output of a graph must be made by a node of its own: a lifted constant gets an Identity."""
    import onnx

    for entry in graph.output:
        if entry.name in constants and entry.name not in {
            name for node in graph.node for name in node.output
        }:
            inner = f"{entry.name}_out"
            graph.node.append(onnx.helper.make_node("Identity", [entry.name], [inner], inner))
            entry.name = inner


@dataclass
class _Walk:
    """One walk over all graphs: what is found to be constant, and the first If that this decides."""

    opsets: Any
    constants: list[tuple[Any, Any, np.ndarray]] = field(default_factory=list)  # graph, node, value
    decided: tuple[Any, Any, bool] | None = None

    def over(
        self, graph: Any, known: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Compute what can be computed of `graph` and of the graphs inside it."""
        import onnx

        known, shapes = dict(known), {**shapes, **_shapes(graph)}
        for tensor in graph.initializer:
            shapes[tensor.name] = tuple(tensor.dims)
            if math.prod(tensor.dims) <= DECIDING_ELEMENTS:
                known[tensor.name] = onnx.numpy_helper.to_array(tensor)
        outputs = {entry.name for entry in graph.output}
        for node in graph.node:
            if node.op_type == "If" and node.input[0] in known and self.decided is None:
                self.decided = graph, node, bool(known[node.input[0]].item())
            for inner in _inner(node):
                self.over(inner, known, shapes)
            value = _computed(node, known, shapes, self.opsets)
            if value is not None:
                known[node.output[0]] = value
                if node.output[0] not in outputs:
                    self.constants.append((graph, node, value))


def _decide(program: Any) -> tuple[Any, Any, bool] | None:
    """Make constants of all that is computed from constants and static shapes; return the first If so decided."""
    import onnx

    walk = _Walk(program.opset_import)
    walk.over(program.graph, {}, {})
    names = _Names(program)
    for graph, node, value in walk.constants:
        old = node.output[0]
        new = old if graph is program.graph else names.fresh(old)
        graph.node.remove(node)
        _rename(graph, {old: new})
        program.graph.initializer.append(onnx.numpy_helper.from_array(value, new))
    return walk.decided


def _shapes(graph: Any) -> dict[str, tuple[int, ...]]:
    """The static shapes that are known of a graph's values."""
    found = {}
    for entry in (*graph.input, *graph.value_info, *graph.output):
        tensor = entry.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            found[entry.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    return found


def _computed(
    node: Any, known: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], opsets: Any
) -> np.ndarray | None:
    """What a node yields whatever the model is fed, None where that cannot be said."""
    import numpy as np
    import onnx
    from onnx.reference import ReferenceEvaluator

    if node.op_type in ("Shape", "Size") and node.input[0] in shapes:
        shape = shapes[node.input[0]]
        ends = {entry.name: entry.i for entry in node.attribute}
        part = shape[ends.get("start", 0) : ends.get("end", len(shape))]
        is_shape = node.op_type == "Shape"
        return np.array(part if is_shape else math.prod(shape), np.int64)
    given = [name for name in node.input if name]
    if node.domain or node.op_type not in DECIDING or not given or any(name not in known for name in given):
        return None
    values = {name: known[name] for name in given}
    graph = onnx.helper.make_graph(
        [node],
        "ahead",
        [_typed(name, value) for name, value in values.items()],
        [onnx.helper.make_empty_tensor_value_info(node.output[0])],
    )
    result = np.asarray(
        ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=list(opsets))).run(None, values)[0]
    )
    return result if result.size <= DECIDING_ELEMENTS else None


def _typed(name: str, value: np.ndarray) -> Any:
    import onnx

    return onnx.helper.make_tensor_value_info(
        name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
    )


def _inline(program: Any, graph: Any, node: Any, branch_name: str) -> None:
    """Put the nodes of one branch where the If stood."""
    import onnx

    branch = onnx.GraphProto()
    branch.CopyFrom(next(attribute.g for attribute in node.attribute if attribute.name == branch_name))
    at = list(graph.node).index(node)
    outputs = list(node.output)
    del graph.node[at]
    taken = {name for other in graphs(program) for name in _defined(other)}
    renamed = {name: _free(name, taken) for name in _defined(branch)}
    _rename(branch, renamed)
    links = [
        onnx.helper.make_node("Identity", [inner.name], [outer], f"{outer}_taken")
        for inner, outer in zip(branch.output, outputs, strict=True)
    ]
    after = [_copied(other) for other in (*branch.node, *links, *list(graph.node)[at:])]
    del graph.node[at:]
    graph.node.extend(after)
    graph.initializer.extend(branch.initializer)


def _free(name: str, taken: set[str]) -> str:
    """Return a name that is not in `taken`, and put it there."""
    number = 0
    free = name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free


def _drop_unused(program: Any) -> None:
    """Remove what only a branch that is never taken, or a decided condition, has read."""
    while True:
        used = {entry.name for graph in graphs(program) for entry in graph.output}
        used |= {name for graph in graphs(program) for node in graph.node for name in node.input}
        dropped = False
        for graph in list(graphs(program)):
            kept = [node for node in graph.node if used.intersection(node.output)]
            if len(kept) < len(graph.node):
                dropped = True
                copies = [_copied(node) for node in kept]
                del graph.node[:]
                graph.node.extend(copies)
        if not dropped:
            break
    for graph in graphs(program):
        tensors = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(tensors)
        values = [entry for entry in graph.value_info if entry.name in set(_defined(graph))]
        del graph.value_info[:]
        graph.value_info.extend(values)


def _copied(node: Any) -> Any:
    import onnx

    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
