# SPDX-License-Identifier: Apache-2.0
"""What OpenVINO makes of an ONNX file: the graph that its CPU plug-in runs, which it shows itself.

Rules:
- The file is compiled as the agent compiles it, with one thread. Free axes get the sample's lengths, or 1.
- A node says in which type it reads and writes, and the names of the operators that were merged into it; those are
  operators of the file, or made of them (`NAME/WithoutBiases`).
- A product is one in integers if it reads 8 bits and its weights are 8 bits. Products that were merged into a generated
  kernel (`Subgraph`) are judged by their weights; those of two activations (attention is one kernel) by whether all that
  flows into the kernel is 8 bits and the zero points suit.
- Any other operator computes in integers if it reads and writes 8 bits, whatever a generated kernel does inside.
- A node that holds nothing of the file but QuantizeLinear and DequantizeLinear is a conversion, and so is a reordering
  between floats and integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.coverage import Arithmetic, Coverage, Left, Step, tally
from edgeopt.coverage._openvino_causes import multiplies_activations, suits_integers, why
from edgeopt.coverage._openvino_source import Source
from edgeopt.coverage._products import is_product
from edgeopt_wire.errors import RuntimeFailure

if TYPE_CHECKING:
    import numpy as np

_EDGES = frozenset({"Input", "Output", "Const", "MemoryInput", "MemoryOutput", "ShapeOf"})
_MOVES = frozenset({
    "Reorder", "Convert", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Pad", "Split", "StridedSlice", "Slice",
    "Gather", "GatherElements", "GatherND", "Tile", "Broadcast", "DepthToSpace", "SpaceToDepth", "ShuffleChannels",
    "BatchToSpace", "SpaceToBatch", "Roll", "ScatterUpdate", "ScatterElementsUpdate", "ScatterNDUpdate", "ReverseSequence",
})  # fmt: skip
"""They compute nothing, and follow the type of what they move."""
_PRODUCTS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNCell", "RNNSeq"})
_GENERATED = "Subgraph"
_BODIES = frozenset({"If", "Loop", "TensorIterator"})
_NARROW = frozenset({"u8", "i8", "u4", "i4"})


def read(
    file: Path, *, reference: Path | None = None, sample: Mapping[str, np.ndarray] | None = None
) -> Coverage:
    """Compile `file` for the CPU and read what became of it.

    Raises:
        RuntimeFailure: OpenVINO cannot load it.
    """
    from edgeopt_agent.runtimes import openvino as runtime

    graph = _Graph(_compiled(file, sample), Source.of(file, reference))
    steps = [step for node in graph.nodes for step in _steps(graph, node)]
    conversions = sum(_is_conversion(graph, node) for node in graph.nodes)
    bodies = sum(node.type in _BODIES for node in graph.nodes)
    failure = (
        f"the operators inside {bodies} branches and loops are not counted: OpenVINO does not show them; judge them by a "
        "model without control flow"
        if bodies
        else ""
    )
    return tally("openvino", runtime.version(), steps, conversions=conversions, failure=failure)


@dataclass(frozen=True)
class _Node:
    """A node of the graph that runs: `reads` and `writes` are types, `merged` names of what it was made of.

    What flows in first says what it reads: the type that the plug-in tells is that of the weights, for one.
    """

    type: str
    name: str
    reads: str
    writes: tuple[str, ...]
    merged: tuple[str, ...]
    inputs: tuple[_Node, ...]
    shapes: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]

    @property
    def is_constant(self) -> bool:
        """Whether nothing flows in: a constant, or what is computed from constants."""
        return self.type == "Const" or (bool(self.inputs) and all(node.is_constant for node in self.inputs))

    @property
    def weights(self) -> tuple[_Node, ...]:
        """The matrices among the constants that it reads."""
        return tuple(node for node in self.inputs if node.is_constant and _is_matrix(node.output))


class _Graph:
    """The graph that runs, in its order."""

    def __init__(self, model: Any, source: Source) -> None:
        self.source = source
        known: dict[str, _Node] = {}
        self.nodes: list[_Node] = []
        for entry in model.get_ordered_ops():
            given = [port.get_source_output().get_node().get_friendly_name() for port in entry.inputs()]
            node = _node(entry, tuple(known[name] for name in given))
            known[entry.get_friendly_name()] = node
            if node.type not in _EDGES and not node.is_constant:
                self.nodes.append(node)


def _compiled(file: Path, sample: Mapping[str, np.ndarray] | None) -> Any:
    from edgeopt_agent.runtimes import openvino as runtime

    core = runtime.library().Core()
    try:
        model = core.read_model(str(file))
        if any(port.get_partial_shape().is_dynamic for port in model.inputs):
            model.reshape({index: _shape(port, sample) for index, port in enumerate(model.inputs)})
        compiled = core.compile_model(model, runtime.DEVICE, runtime.settings(threads=1))
        return compiled.get_runtime_model()
    except (RuntimeError, ValueError, TypeError) as error:
        raise RuntimeFailure(f"openvino cannot load {file.name}: {error}") from error


def _shape(port: Any, sample: Mapping[str, np.ndarray] | None) -> list[int]:
    for name in port.get_names():
        if sample is not None and name in sample:
            return list(sample[name].shape)
    return [1 if axis.is_dynamic else axis.get_length() for axis in port.get_partial_shape()]


def _node(entry: Any, inputs: tuple[_Node, ...]) -> _Node:
    facts = {name: _text(value) for name, value in entry.get_rt_info().items()}
    return _Node(
        type=facts["layerType"],
        name=entry.get_friendly_name(),
        reads=next((given.writes[0] for given in inputs if not given.is_constant), facts["runtimePrecision"]),
        writes=tuple(facts["outputPrecisions"].split(",")),
        merged=tuple(filter(None, facts["originalLayersNames"].split(","))),
        inputs=inputs,
        shapes=tuple(_sizes(port) for port in entry.inputs()),
        output=_sizes(entry.output(0)) if entry.get_output_size() else (),
    )


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def _sizes(port: Any) -> tuple[int, ...]:
    shape = port.get_partial_shape()
    return tuple(shape.to_shape()) if shape.is_static else ()


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("f", "bf"))


def _is_conversion(graph: _Graph, node: _Node) -> bool:
    if node.type in ("Reorder", "Convert"):
        return (
            any(_is_float(node.reads) != _is_float(dtype) for dtype in node.writes) and prod(node.output) > 1
        )
    is_own = node.type not in _MOVES | _PRODUCTS | _BODIES
    return is_own and not graph.source.merged(node.merged) and _quantizes(node)


def _quantizes(node: _Node) -> bool:
    """Whether a node that stands for no operator of the file reads or writes 8 bits."""
    return node.reads in _NARROW or any(dtype in _NARROW for dtype in node.writes)


def _steps(graph: _Graph, node: _Node) -> list[Step]:
    """What a node computes: nothing, one operator, or several products."""
    if node.type in _MOVES | _BODIES or _is_conversion(graph, node):
        return []
    merged = graph.source.merged(node.merged)
    products = [operator for operator in merged if is_product(operator.op_type)]
    if node.type == _GENERATED and products:
        return _generated(graph, node, products)
    if node.type in _PRODUCTS:
        origin = next(iter(products or merged), None)
        return [_step(graph, node, origin, is_integer=node.reads in _NARROW, macs=_macs(node), is_one=True)]
    if not _computes(node):
        return []
    return [_step(graph, node, next(iter(merged), None), is_integer=_is_narrow(node), macs=0, is_one=False)]


def _generated(graph: _Graph, node: _Node, products: Sequence[Any]) -> list[Step]:
    """The products inside a generated kernel: by their weights where there are as many of them, or by all that flows in."""
    program = graph.source.program
    attention = [product for product in products if multiplies_activations(program, product)]
    weighing = [product for product in products if product not in attention]
    weights, rows = node.weights, prod(node.output[:-1])
    is_fed = node.reads in _NARROW or graph.source.quantizes(node.merged)
    narrow = [is_fed and given.writes[0] in _NARROW for given in weights]
    macs: list[int | None] = [rows * prod(given.output) or None for given in weights]
    if len(weights) != len(weighing):
        narrow, macs = [bool(narrow) and all(narrow)] * len(weighing), [None] * len(weighing)
    is_narrow = all(given.writes[0] in _NARROW for given in node.inputs if not given.is_constant)
    steps = [
        _step(graph, node, product, is_integer=is_integer, macs=count, is_one=True)
        for product, is_integer, count in zip(weighing, narrow, macs, strict=True)
    ]
    return steps + [
        _step(
            graph,
            node,
            product,
            is_integer=is_narrow and suits_integers(program, product),
            macs=None,
            is_one=True,
        )
        for product in attention
    ]


def _step(
    graph: _Graph, node: _Node, origin: Any, *, is_integer: bool, macs: int | None, is_one: bool
) -> Step:
    name = graph.source.label(origin) if origin is not None else node.name
    if is_integer:
        return Step(name, node.type, Arithmetic.INTEGER, macs, is_one)
    kind = str(origin.op_type) if origin is not None else node.type
    source = graph.source
    said = why(source.program, origin, is_quantized=source.is_quantized, reads=node.reads, is_one=is_one)
    left = Left(name, kind, macs or 0, said.why, said.remedy, said.key)
    return Step(name, kind, Arithmetic.FLOAT, macs, is_one, left)


def _computes(node: _Node) -> bool:
    """Whether numbers are computed that stand for real ones, and not indices or shapes."""
    return any(_is_float(dtype) or dtype in _NARROW for dtype in (node.reads, *node.writes))


def _is_narrow(node: _Node) -> bool:
    """Whether all that flows in and out is 8 bits."""
    given = [entry.writes[0] for entry in node.inputs if not entry.is_constant]
    return node.reads in _NARROW and not any(map(_is_float, (*given, *node.writes)))


def _is_matrix(shape: Sequence[int]) -> bool:
    return sum(size > 1 for size in shape) > 1


def _macs(node: _Node) -> int | None:
    """Multiply-accumulates by the shapes of what runs; None where one is not known."""
    if not node.output or not all(node.shapes):
        return None
    if node.type == "Convolution":
        return prod(node.output) * prod(node.shapes[1]) // node.output[1]
    if node.type == "Deconvolution":
        return prod(node.shapes[0]) * prod(node.shapes[1]) // node.shapes[0][1]
    if node.type in ("FullyConnected", "MatMul"):
        return prod(node.shapes[0]) * node.output[-1]
    return None
