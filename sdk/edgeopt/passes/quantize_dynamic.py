# SPDX-License-Identifier: Apache-2.0
"""Int8 matrix products of an ONNX model, with the ranges of activations found at run time.

No calibration: each product's input is quantized to uint8 by its own smallest and largest value, run after run. That
costs a walk over the input and gains what a fixed range loses on transformers, whose activations differ from input to
input. Weights are int8, symmetric per output channel, scale = max|w| / 127, so weights that lie on that grid already
(`round_weights`) keep their integers.

The file holds standard operators: DynamicQuantizeLinear, MatMulInteger, Cast, Mul, Add. ONNX Runtime makes one
DynamicQuantizeMatMul or MatMulIntegerToFloat of each group, which is as fast as it gets there: products that read one
tensor share its quantization. Source: ONNX Runtime, "Quantize ONNX models", dynamic quantization.

Rules:
- Convolutions stay in float: ConvInteger has no fast kernel (EfficientNet-Lite0 ran 8 times slower than in float).
- Products of two activations stay in float: softmax's small values need more than one step for all, and they are few.
- Tables that are looked up (Gather) have a scale per row and turn float after the lookup, which costs nothing.
- What stays in float is named in the notes with the reason.

Why not MatMulNBits, whose activations have a scale per row? It is more exact (MiniLM: cosine 0.9992) but ran that file
at 1.2 to 1.5 times the speed of float, where run-time ranges for the whole tensor gave about 2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_graphs import fold
from edgeopt.onnx_products import PRODUCTS, attributes, reads, unflatten
from edgeopt.onnx_select import select
from edgeopt.passes import Order, Result
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("onnx",)
EXTRA = "onnx"

GRID = 127


@dataclass(frozen=True)
class Options:
    """How weights are written.

    `per_channel`: a scale for each output channel, or one for the whole matrix. `unsigned_weights` writes the same
    integers plus 128 as uint8: x86 without VNNI adds pairs of uint8 x int8 products in 16 bits, which can saturate,
    and takes a slower, exact kernel for uint8 x uint8. `tables` quantizes looked-up tables, of `table_rows` at least.
    """

    per_channel: bool = True
    unsigned_weights: bool = False
    tables: bool = True
    table_rows: int = 256

    def __post_init__(self) -> None:
        if self.table_rows < 1:
            raise ValueError(f"quantize_dynamic: table_rows must be positive, found {self.table_rows}")


def apply(model: Model, order: Order) -> Result:
    """Quantize every MatMul and Gemm whose weight is a constant matrix, and looked-up tables.

    Inputs and outputs stay as they are. `order.samples` is not looked at.

    Raises:
        RecipeError: An excluded operator does not exist.
        UnsupportedError: The scheme asks for other types, or the model has nothing that this pass quantizes.
    """
    import onnx

    options = order.options if isinstance(order.options, Options) else Options()
    _check_scheme(order.scheme)
    program = unflatten(fold(model.program))
    excluded = select(program, order.exclude)
    graph = _Graph(program, options)
    left: list[str] = []
    counts: Counter[str] = Counter()
    for node in list(program.graph.node):
        reason = graph.why_not(node, excluded)
        if reason is None:
            continue
        if reason:
            left.append(f"{node.name or node.output[0]} ({reason})")
            continue
        counts["tables" if node.op_type == "Gather" else "products"] += 1
        graph.replace(node)
    if not counts:
        raise UnsupportedError(
            "quantize_dynamic: the model has no MatMul, Gemm or Gather with a constant matrix of its own that may be "
            f"quantized; use quantize_static. Left in float: {', '.join(left) or 'nothing to quantize'}"
        )
    graph.finish()
    onnx.checker.check_model(program)
    program.producer_name, program.producer_version = "edgeopt", ""
    notes = [
        f"{counts['products']} matrix products in int8 with ranges found at run time, {counts['tables']} tables in int8"
    ]
    if left:
        notes.append(f"left in float: {', '.join(left)}")
    return Result(replace(model, program=program), tuple(notes))


def _check_scheme(scheme: Scheme | None) -> None:
    if scheme is not None and (scheme.weight_dtype != "int8" or scheme.io != "float32"):
        raise UnsupportedError(
            "quantize_dynamic makes int8 weights and keeps float32 inputs and outputs; "
            f"the scheme asks for {scheme.weight_dtype} weights and {scheme.io} inputs and outputs"
        )


class _Graph:
    """The graph while its products are replaced, in order."""

    def __init__(self, program: Any, options: Options) -> None:
        self._program = program
        self._options = options
        self._constants = {tensor.name: tensor for tensor in program.graph.initializer}
        self._names = set(self._constants) | {
            name for node in program.graph.node for name in (*node.input, *node.output, node.name)
        }
        self._new: dict[str, list[Any]] = {}  # output of an old node -> what stands in its place
        self._quantized: dict[str, tuple[str, str, str]] = {}  # activation -> integers, scale, zero point
        self._weights: dict[tuple[str, bool], tuple[str, str, str]] = {}

    def why_not(self, node: Any, excluded: frozenset[str]) -> str | None:
        """Say why a node with weights stays in float: nothing if it need not, None if it has no weights to speak of."""
        if node.op_type in ("Conv", "ConvTranspose"):
            return "no fast integer kernel with run-time ranges"
        if node.op_type in ("LSTM", "GRU", "RNN"):
            return "recurrent"
        if node.op_type == "Gather":
            return self._why_not_table(node, excluded)
        if node.op_type not in PRODUCTS:
            return None
        if node.name in excluded:
            return "excluded by the recipe"
        return self._why_not_product(node)

    def _why_not_product(self, node: Any) -> str:
        import onnx

        tensor = self._constants.get(node.input[1])
        found = attributes(node)
        if tensor is None or node.input[0] in self._constants:
            return "not an activation by a constant"
        if tensor.data_type != onnx.TensorProto.FLOAT:
            return "not float32"
        if len(tensor.dims) != 2:
            return "its weight is no matrix"
        is_plain = not found.get("transA", 0) and found.get("alpha", 1.0) == 1.0
        return "" if is_plain and found.get("beta", 1.0) == 1.0 else "not a plain matrix product"

    def _why_not_table(self, node: Any, excluded: frozenset[str]) -> str | None:
        import onnx

        tensor = self._constants.get(node.input[0])
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) != 2:
            return None
        is_table = attributes(node).get("axis", 0) == 0 and tensor.dims[0] >= self._options.table_rows
        if not self._options.tables or not is_table:
            return None
        return "excluded by the recipe" if node.name in excluded else ""

    def replace(self, node: Any) -> None:
        """Put the integer form in the node's place, under the same output name."""
        make = self._lookup if node.op_type == "Gather" else self._product
        self._new[node.output[0]] = list(make(node))

    def _product(self, node: Any) -> Iterator[Any]:
        from onnx import helper

        activation = node.input[0]
        if activation not in self._quantized:
            names = tuple(self._name(f"{activation}_{part}") for part in ("quantized", "scale", "zero_point"))
            self._quantized[activation] = (names[0], names[1], names[2])
            yield helper.make_node("DynamicQuantizeLinear", [activation], names, f"{activation}_quantize")
        integers, step, zero = self._quantized[activation]
        transposed = bool(attributes(node).get("transB", 0))
        weight, weight_step, weight_zero = self._weight(node.input[1], transposed)
        out = node.output[0]
        has_bias = len(node.input) > 2 and bool(node.input[2])
        total, real, both = (self._name(f"{out}_{part}") for part in ("integers", "unscaled", "step"))
        result = self._name(f"{out}_product") if has_bias else out
        inputs = [integers, weight, zero, weight_zero]
        yield helper.make_node("MatMulInteger", inputs, [total], f"{node.name}_integer")
        yield helper.make_node("Cast", [total], [real], f"{node.name}_cast", to=1)
        yield helper.make_node("Mul", [step, weight_step], [both], f"{node.name}_steps")
        yield helper.make_node("Mul", [real, both], [result], node.name)
        if has_bias:
            yield helper.make_node("Add", [result, node.input[2]], [out], f"{node.name}_bias")

    def _weight(self, name: str, transposed: bool) -> tuple[str, str, str]:
        """Write a matrix as (inputs, outputs) integers, once: their name, the scale's and the zero point's."""
        import numpy as np
        import onnx

        found = self._weights.get((name, transposed))
        if found:
            return found
        values = onnx.numpy_helper.to_array(self._constants[name])
        integers, scale = on_grid(
            values.T if transposed else values, axis=0, one=not self._options.per_channel
        )
        zero = np.zeros(scale.shape, np.int8)
        if self._options.unsigned_weights:
            integers, zero = (
                (integers.astype(np.int16) + 128).astype(np.uint8),
                np.full(scale.shape, 128, np.uint8),
            )
        base = f"{name}_transposed" if transposed else name
        parts = {"quantized": integers, "scale": scale, "zero_point": zero}
        names = [self._add(f"{base}_{part}", array) for part, array in parts.items()]
        self._weights[name, transposed] = (names[0], names[1], names[2])
        return self._weights[name, transposed]

    def _lookup(self, node: Any) -> Iterator[Any]:
        import onnx
        from onnx import helper

        table, indices, out = node.input[0], node.input[1], node.output[0]
        if (table, False) not in self._weights:
            integers, scale = on_grid(onnx.numpy_helper.to_array(self._constants[table]), axis=1, one=False)
            names = self._add(f"{table}_quantized", integers), self._add(f"{table}_scale", scale[:, None])
            self._weights[table, False] = (*names, "")
        quantized, steps, _ = self._weights[table, False]
        rows, real, step = (self._name(f"{out}_{part}") for part in ("rows", "unscaled", "step"))
        yield helper.make_node("Gather", [quantized, indices], [rows], f"{node.name}_rows", axis=0)
        yield helper.make_node("Cast", [rows], [real], f"{node.name}_cast", to=1)
        yield helper.make_node("Gather", [steps, indices], [step], f"{node.name}_steps", axis=0)
        yield helper.make_node("Mul", [real, step], [out], node.name)

    def finish(self) -> None:
        """Write the nodes back and drop what nobody reads any more."""
        graph = self._program.graph
        nodes = [new for node in graph.node for new in self._new.get(node.output[0], [node])]
        kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
        used = {name for node in kept for name in reads(node)} | {output.name for output in graph.output}
        tensors = [tensor for tensor in self._constants.values() if tensor.name in used]
        copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in tensors]
        del graph.initializer[:]
        graph.initializer.extend(copies)

    def _add(self, name: str, array: np.ndarray) -> str:
        import numpy as np
        import onnx

        name = self._name(name)
        self._constants[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def _name(self, wish: str) -> str:
        name, number = wish, 1
        while name in self._names:
            name, number = f"{wish}_{number}", number + 1
        self._names.add(name)
        return name


def on_grid(weight: np.ndarray, *, axis: int, one: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return a matrix in int8 and its scales: one for each line along `axis`, or all the same value if `one`.

    Lines of zeros get scale 1, so that nothing divides by zero.
    """
    import numpy as np

    wide = weight.astype(np.float64)
    largest = np.abs(wide).max(axis=axis, keepdims=True)
    if one:
        largest = np.full_like(largest, largest.max())
    scale = np.where(largest > 0, largest / GRID, 1.0)
    integers = np.clip(np.rint(wide / scale), -GRID, GRID).astype(np.int8)
    return integers, scale.astype(np.float32).reshape(-1)
