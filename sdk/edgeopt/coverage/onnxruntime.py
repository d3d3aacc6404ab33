# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime makes of an ONNX file: its own optimized graph is saved, run once, and read.

All optimizations are on, as on a device, with the CPU's own layouts. Operators are called as in the file, though the
optimizer renames and merges them. Shapes are those of one profiled run; what did not run (a branch not taken) has those
of shape inference, or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.coverage import Arithmetic, Coverage, Left, Step, _optimized, _products, tally
from edgeopt.coverage._axes import has_scales_along_inputs
from edgeopt.coverage._causes import Causes
from edgeopt.coverage._cuts import DEQUANTIZE, QUANTIZE, Scope, scopes
from edgeopt.coverage._repairs import Said
from edgeopt_wire.errors import RuntimeFailure

if TYPE_CHECKING:
    import numpy as np

CONVERSIONS = frozenset({QUANTIZE, DEQUANTIZE, "DynamicQuantizeLinear"})
MOVES = frozenset({
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Expand", "ReorderInput", "ReorderOutput", "Slice",
    "Split", "Gather", "GatherElements", "GatherND", "Pad", "Tile", "DepthToSpace", "SpaceToDepth", "ScatterND",
})  # fmt: skip
"""They compute nothing, and follow the type of what they move."""

_SUFFIX = re.compile(r"_token_\d+$|_nchwc$|_nhwc$|/\w+Fusion/$")
"""What the layout optimizers put behind a name."""
_NAMED_BY_TENSOR = "_nchwc"
_EIGHT_BITS = ("int8", "uint8")
_SIXTEEN_BITS = ("int16", "uint16")
_GIVEN_INTEGERS = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat")
"""They take integers as they come, from a search of ranges or from a QuantizeLinear of a known one."""
_INTEGER_ACTIVATIONS = 4  # MatMulNBits, attribute accuracy_level
_SCALING_STEPS = 4  # Cast, two Mul, and the Add of a bias stand behind a ConvInteger


def read(
    file: Path, *, reference: Path | None = None, sample: Mapping[str, np.ndarray] | None = None
) -> Coverage:
    """Load `file` on the CPU and read what became of it.

    Raises:
        RuntimeFailure: ONNX Runtime cannot load it, or cannot run it on the sample.
    """
    import onnxruntime as ort

    source, model = _source(file)
    program = _optimized.optimize(model)
    view = _View(program, _Origins(tuple(scopes(source)), _names(reference)))
    values, failure = _values(program, sample)
    view.see(values)
    causes = Causes(ort.__version__)
    steps = [step for node in view.nodes if (step := _step(view, node, causes)) is not None]
    conversions = sum(node.op_type in CONVERSIONS for node in view.nodes)
    return tally("onnxruntime", str(ort.__version__), steps, conversions=conversions, failure=failure)


@dataclass
class _Origins:
    """Finds the operator of the file behind one of the optimized graph."""

    scopes: Sequence[Scope]
    reference: Mapping[str, str]
    by_name: dict[str, tuple[Scope, int]] = field(default_factory=dict)
    by_tensor: dict[str, tuple[Scope, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for scope in self.scopes:
            for index, node in enumerate(scope.nodes):
                self.by_name[node.name] = (scope, index)
                self.by_tensor.update(dict.fromkeys(node.output, (scope, index)))

    def find(self, node: Any) -> tuple[Scope, int] | None:
        """The operator that gave `node` its name; for a product the product among those merged into it."""
        found = self._named(node)
        if found is None or not _products.is_product(node.op_type):
            return found
        scope, index = found
        while not _products.is_product(scope.nodes[index].op_type):
            source = scope.writers.get(next(iter(scope.nodes[index].input), ""))
            if source is None:
                return None
            index = source
        return scope, index

    def label(self, node: Any, found: tuple[Scope, int] | None) -> tuple[str, str]:
        """Name and type of the operator behind `node`, as the reference calls it if it knows the tensor."""
        if found is None:
            return node.name or next(iter(node.output), node.op_type), str(node.op_type)
        origin = found[0].nodes[found[1]]
        return self.reference.get(next(iter(origin.output), ""), origin.name), str(origin.op_type)

    def weights(self, found: tuple[Scope, int] | None) -> Sequence[int] | None:
        """The dimensions of a product's weights as the file has them."""
        if found is None or len(found[0].nodes[found[1]].input) < 2:
            return None
        scope, index = found
        node = scope.nodes[index]
        name = node.input[3 if node.op_type == "QLinearConv" else 1]
        writer = scope.writer(name)
        tensor = scope.constants.get(
            writer.input[0] if writer is not None and writer.op_type == DEQUANTIZE else name
        )
        return tuple(tensor.dims) if tensor is not None else None

    def _named(self, node: Any) -> tuple[Scope, int] | None:
        for given in (node.name, *node.output):
            is_tensor = given.endswith(_NAMED_BY_TENSOR)
            maps = (self.by_tensor, self.by_name) if is_tensor else (self.by_name, self.by_tensor)
            for name in _shortened(given):
                for known in maps:
                    if name in known:
                        return known[name]
        return None


class _View:
    """The optimized graph: every node, who makes each tensor, and what each is."""

    def __init__(self, program: Any, origins: _Origins) -> None:
        self.origins = origins
        self.nodes = list(_optimized.walk(program.graph))
        self.constants = {tensor.name for tensor in _optimized.constants(program.graph)}
        self.writers = {name: node for node in self.nodes for name in node.output if name}
        self.values: _optimized.Values = {}
        self.dtypes: dict[str, str] = {}
        for scope in origins.scopes:
            for name, value in scope.types.items():
                self._note(name, value.type.tensor_type)
        self.is_quantized = any(
            node.op_type in CONVERSIONS
            or _optimized.is_integer_type(node.op_type)
            or node.op_type in ("MatMulNBits", "MatMulBnb4")
            for node in self.nodes
        )

    def see(self, values: _optimized.Values) -> None:
        """Take what a run showed: it is right where inference was wrong."""
        self.values |= values
        self.dtypes |= {name: dtype for name, (_, dtype) in values.items()}

    def is_float(self, name: str) -> bool:
        """Whether a tensor is of floats; what is not known is, unless its writer makes integers."""
        if name in self.dtypes:
            return "float" in self.dtypes[name]
        writer = self.writers.get(name)
        return writer is None or not (
            writer.op_type == QUANTIZE or _optimized.is_integer_type(writer.op_type)
        )

    def _note(self, name: str, tensor: Any) -> None:
        import onnx

        if not tensor.elem_type or tensor.elem_type == onnx.TensorProto.STRING:
            return
        self.dtypes[name] = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        shape = tuple(axis.dim_value for axis in tensor.shape.dim)
        if tensor.HasField("shape") and all(shape):
            self.values[name] = (shape, self.dtypes[name])


def _shortened(name: str) -> Iterator[str]:
    """A name, and the names that it may have had before optimizers put something behind it."""
    while name:
        yield name
        shorter = _SUFFIX.sub("", name)
        name = shorter if shorter != name else ""


def _source(file: Path) -> tuple[Any, Path | bytes]:
    """The file's own ModelProto, and what to load: the file, or a copy in which every operator has a name of its own."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        source = onnx.load(file)
    except (DecodeError, OSError) as error:
        raise RuntimeFailure(f"onnxruntime cannot load {file.name}: {error}") from error
    known = {""}
    unnamed = []
    for node in _optimized.walk(source.graph):
        if node.name in known:
            unnamed.append(node)
        known.add(node.name)
    if not unnamed:
        return source, file
    for number, node in enumerate(unnamed):
        node.name = f"{node.name or node.op_type}~{number}"
    return source, source.SerializeToString()


def _names(reference: Path | None) -> dict[str, str]:
    """Who makes each tensor of the reference."""
    import onnx

    if reference is None:
        return {}
    try:
        graph = onnx.load(reference, load_external_data=False).graph
    except OSError as error:
        raise RuntimeFailure(f"cannot read the reference {reference}: {error.strerror}") from error
    return {name: node.name for node in _optimized.walk(graph) for name in node.output if name and node.name}


def _values(program: Any, sample: Mapping[str, np.ndarray] | None) -> tuple[_optimized.Values, str]:
    """Shapes and types that a run shows; and what the runtime said where it could not run on zeros."""
    try:
        return _optimized.observe(program, sample), ""
    except RuntimeFailure as error:
        if sample is not None:
            raise
        return {}, f"{error}; give a sample of real inputs, and if that fails too the file cannot be used"


def _step(view: _View, node: Any, causes: Causes) -> Step | None:
    arithmetic = _arithmetic(view, node)
    if arithmetic is None:
        return None
    origin = view.origins.find(node)
    name, kind = view.origins.label(node, origin)
    is_product = _products.is_product(node.op_type)
    macs = _products.count(node, view.values, view.origins.weights(origin)) if is_product else 0
    left = None
    if arithmetic is Arithmetic.FLOAT:
        said = _why(view, node, origin, causes)
        left = Left(name, kind, macs or 0, said.why, said.remedy, said.key)
    shown = kind if arithmetic is Arithmetic.FLOAT else str(node.op_type)
    is_wrong = arithmetic is Arithmetic.INTEGER and origin is not None and has_scales_along_inputs(*origin)
    return Step(name, shown, arithmetic, macs, is_product, left, is_wrong=is_wrong)


def _arithmetic(view: _View, node: Any) -> Arithmetic | None:
    """What a node computes with; None for conversions, control flow, and what only moves or handles shapes."""
    if node.op_type in CONVERSIONS | MOVES or any(True for _ in _optimized.inner_graphs(node)):
        return None
    if _is_dynamic(view, node):
        return Arithmetic.DYNAMIC
    if _optimized.is_integer_type(node.op_type):
        return Arithmetic.INTEGER
    made = [name for name in node.output if name]
    if any(view.is_float(name) for name in made):
        computes = any(name and view.is_float(name) for name in node.input)
        return Arithmetic.FLOAT if computes or _products.is_product(node.op_type) else None
    types = {view.dtypes.get(name, "") for name in (*made, *(name for name in node.input if name))}
    if types.intersection(_SIXTEEN_BITS):
        return Arithmetic.WIDE
    return Arithmetic.INTEGER if types.intersection(_EIGHT_BITS) else None


def _is_dynamic(view: _View, node: Any) -> bool:
    if node.op_type not in _GIVEN_INTEGERS:
        quantizes = node.op_type in _optimized.DYNAMIC
        return quantizes or _attribute(node, "accuracy_level") == _INTEGER_ACTIVATIONS
    writer = view.writers.get(node.input[0])
    while writer is not None and writer.op_type in MOVES:
        writer = view.writers.get(writer.input[0])
    return writer is not None and writer.op_type == "DynamicQuantizeLinear"


def _attribute(node: Any, name: str) -> int | None:
    return next((int(entry.i) for entry in node.attribute if entry.name == name), None)


def _why(view: _View, node: Any, origin: tuple[Scope, int] | None, causes: Causes) -> Said:
    if not view.is_quantized:
        return Said("not quantized", "the file is not quantized", "quantize it")
    if node.op_type in ("MatMulNBits", "MatMulBnb4"):
        return Said(
            "weights only",
            "its weights are unpacked to floats, which it multiplies",
            "this saves memory; for speed on a CPU set accuracy_level 4, which multiplies integers",
        )
    scaled = _scaled(view, node)
    if scaled is not None:
        return Said(
            "scaling",
            f"it scales what comes from {scaled.op_type} {scaled.name!r}, as ranges are found at run time",
            "calibrate and quantize statically, so that the product scales and rounds its own sums",
        )
    if origin is None:
        return Said(
            "unknown",
            "no operator of the file has its name: ONNX Runtime made it of several",
            "look for it in the optimized graph",
        )
    return causes.find(*origin)


def _scaled(view: _View, node: Any) -> Any:
    """The ConvInteger, MatMulInteger or search of ranges that a Cast, Mul or Add (of a constant) scales, or None."""
    for _ in range(_SCALING_STEPS):
        if node.op_type not in ("Cast", "Mul", "Add"):
            return None
        inputs = [view.writers.get(name) for name in node.input if name not in view.constants]
        if node.op_type == "Add" and len(inputs) != 1:
            return None
        for writer in _writers(inputs):
            if writer.op_type in (*_optimized.DYNAMIC, "DynamicQuantizeLinear"):
                return writer
        node = next((writer for writer in _writers(inputs) if writer.op_type in ("Cast", "Mul")), None)
        if node is None:
            return None
    return None


def _writers(found: Sequence[Any]) -> Iterator[Any]:
    return (writer for writer in found if writer is not None)
