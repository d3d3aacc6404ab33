# SPDX-License-Identifier: Apache-2.0
"""What LiteRT makes of a flatbuffer: the interpreter loads it with its XNNPACK delegate and tells its operators.

Rules:
- LiteRT fuses nothing by type: an operator computes in the types of its tensors, and the loaded interpreter says which
  operators its delegate took. It has no profile that names operators.
- Float activations with integer weights are dynamic: the kernel quantizes the activations in every inference, with or
  without the delegate. Weights that a DEQUANTIZE unpacks are floats. int16 activations are wide.
- Which operators a delegate took is what can be reached backwards from its outputs without passing its inputs; the
  others run in kernels that are right and slow.
- A DEQUANTIZE of constants runs once, when the file is loaded, and is no conversion.

An operator is called after its first output, as LiteRT gives operators no names.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.coverage import Arithmetic, Coverage, Left, Step, tally
from edgeopt.coverage._litert_kernels import has_integer_kernel
from edgeopt_converters.litert_graph import operators as list_operators
from edgeopt_profiles.operators import Operator
from edgeopt_wire.errors import RecipeError, RuntimeFailure

if TYPE_CHECKING:
    import numpy as np

PRODUCTS = frozenset({
    "CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL",
    "UNIDIRECTIONAL_SEQUENCE_LSTM", "UNIDIRECTIONAL_SEQUENCE_RNN", "LSTM", "SVDF",
})  # fmt: skip
MOVES = frozenset({
    "RESHAPE", "SQUEEZE", "EXPAND_DIMS", "TRANSPOSE", "BROADCAST_TO", "SLICE", "STRIDED_SLICE", "SPLIT", "SPLIT_V", "GATHER",
    "GATHER_ND", "PAD", "MIRROR_PAD", "TILE", "DEPTH_TO_SPACE", "SPACE_TO_DEPTH", "PACK", "UNPACK",
})  # fmt: skip
"""They compute nothing, and follow the type of what they move."""

_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")
_DELEGATE = "DELEGATE"
_NARROW = ("int8", "uint8", "int4", "int2")
_WIDE = ("int16",)


def read(
    file: Path, *, reference: Path | None = None, sample: Mapping[str, np.ndarray] | None = None
) -> Coverage:
    """Load `file` on the CPU and read what became of it; its shapes are fixed, so that a sample tells nothing more.

    Raises:
        RuntimeFailure: LiteRT cannot load it.
    """
    del sample
    details = _details(file)
    program = file.read_bytes()
    graph = _Graph(program, list_operators(program), _names(reference))
    inside = _delegated(details)
    found = [
        step
        for index in range(len(graph.operators))
        if (step := _step(graph, index, is_inside=index in inside))
    ]
    conversions = sum(
        operator.type in _CONVERSIONS and not graph.is_constant(operator.inputs[0].name)
        for operator in graph.operators
    )
    version = importlib.metadata.version("ai-edge-litert")
    return tally("litert", version, found, conversions=conversions, failure=_uncounted_graphs(program))


@dataclass
class _Graph:
    """The operators of a file, and who makes each tensor."""

    program: bytes
    operators: Sequence[Operator]
    reference: frozenset[str]

    def __post_init__(self) -> None:
        self._writers = {tensor.name: entry for entry in self.operators for tensor in entry.outputs}
        self._edges = _inputs(self.program)
        self.is_quantized = any(
            tensor.dtype in (*_NARROW, *_WIDE) for entry in self.operators for tensor in entry.inputs
        )

    def writer(self, name: str) -> Operator | None:
        """The operator that makes a tensor."""
        return self._writers.get(name)

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is stored in the file."""
        return name not in self._writers and name not in self._edges

    def label(self, operator: Operator) -> str:
        """What the reference calls an operator: a quantizer puts something behind the name of a tensor."""
        name = operator.name
        near = [known for known in self.reference if name.startswith(known)]
        return max(near, key=len, default=name)


def _details(file: Path) -> list[dict[str, Any]]:
    from ai_edge_litert.interpreter import Interpreter

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            interpreter = Interpreter(model_path=str(file), num_threads=1)
            interpreter.allocate_tensors()
            found: list[dict[str, Any]] = interpreter._get_ops_details()  # noqa: SLF001 - nothing public tells it
    except (ValueError, RuntimeError) as error:
        raise RuntimeFailure(f"litert cannot load {file.name}: {error}") from error
    return found


def _uncounted_graphs(program: bytes) -> str:
    """What to say of control flow: the interpreter tells the operators of the first graph only."""
    from ai_edge_litert import schema_py_generated as schema

    count = int(schema.Model.GetRootAs(program, 0).SubgraphsLength()) - 1
    if not count:
        return ""
    return (
        f"the operators of {count} further graphs (branches, loop bodies or signatures) are not counted: LiteRT tells "
        "those of the first only; judge them by a model without control flow"
    )


def _inputs(program: bytes) -> frozenset[str]:
    """The names of the inputs as the graph's tensors have them."""
    from ai_edge_litert import schema_py_generated as schema

    graph = schema.ModelT.InitFromObj(schema.Model.GetRootAs(program, 0)).subgraphs[0]
    return frozenset(graph.tensors[index].name.decode() for index in graph.inputs)


def _names(reference: Path | None) -> frozenset[str]:
    if reference is None:
        return frozenset()
    try:
        return frozenset(operator.name for operator in list_operators(reference.read_bytes()))
    except (OSError, RecipeError) as error:
        raise RuntimeFailure(f"cannot read the reference {reference}: {error}") from error


def _step(graph: _Graph, index: int, *, is_inside: bool) -> Step | None:
    operator = graph.operators[index]
    arithmetic = _arithmetic(operator)
    if arithmetic is None:
        return None
    name = graph.label(operator)
    left = None
    if arithmetic is Arithmetic.FLOAT:
        cause, why, remedy = _why(graph, index)
        left = Left(name, operator.type, operator.macs, why, remedy, cause)
    return Step(
        name,
        operator.type,
        arithmetic,
        operator.macs,
        operator.type in PRODUCTS,
        left,
        is_outside=not is_inside,
    )


def _arithmetic(operator: Operator) -> Arithmetic | None:
    """What an operator computes with; None for conversions and for what only moves or handles shapes."""
    if operator.type in _CONVERSIONS or operator.type in MOVES:
        return None
    reads = [tensor.dtype for tensor in operator.inputs]
    makes = [tensor.dtype for tensor in operator.outputs]
    if any("float" in dtype for dtype in makes):
        if operator.type in PRODUCTS and any(dtype in _NARROW for dtype in reads[1:]):
            return Arithmetic.DYNAMIC
        return Arithmetic.FLOAT
    if any(dtype in _WIDE for dtype in makes):
        return Arithmetic.WIDE
    return Arithmetic.INTEGER if any(dtype in _NARROW for dtype in (*reads, *makes)) else None


def _why(graph: _Graph, index: int) -> tuple[str, str, str]:
    """Cause, why and what would help."""
    operator = graph.operators[index]
    if not graph.is_quantized:
        return "not quantized", "the file is not quantized", "quantize it"
    for tensor in operator.inputs:
        unpacked = graph.writer(tensor.name)
        if (
            unpacked is not None
            and unpacked.type == "DEQUANTIZE"
            and graph.is_constant(unpacked.inputs[0].name)
        ):
            return (
                "weights only",
                f"its weights are {unpacked.inputs[0].dtype} in the file and unpacked to floats when it is loaded",
                "quantize its activations too, or let its weights stay integers (dynamic range)",
            )
    if not has_integer_kernel(graph.program, index):
        return (
            "no integer kernel",
            f"LiteRT refuses a {operator.type} like this one with int8 tensors",
            f"leave this {operator.type} in floats on purpose, or use an operator that runs in integers",
        )
    return (
        "left in floats",
        f"its tensors are {operator.outputs[0].dtype} in the file, though LiteRT has this {operator.type} in int8",
        "quantize it: is this operator or its type excluded, or left out by the quantizer?",
    )


def _delegated(details: Sequence[Mapping[str, Any]]) -> set[int]:
    """The operators that delegates took, found by walking back from their outputs."""
    makers = {
        int(name): entry for entry in details if entry["op_name"] != _DELEGATE for name in entry["outputs"]
    }
    found: set[int] = set()
    for delegate in (entry for entry in details if entry["op_name"] == _DELEGATE):
        edge = {int(name) for name in delegate["inputs"]}
        waiting = [int(name) for name in delegate["outputs"]]
        while waiting:
            maker = makers.get(waiting.pop())
            if maker is not None and maker["index"] not in found:
                found.add(maker["index"])
                waiting.extend(int(name) for name in maker["inputs"] if int(name) not in edge)
    return found
