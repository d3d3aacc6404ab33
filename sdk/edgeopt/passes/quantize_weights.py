# SPDX-License-Identifier: Apache-2.0
"""Quantize weights only: 4 or 8 bits in groups for matrix products, int8 for all others; activations stay float.

For models whose weights are their size (language models, wide perceptrons, recurrent nets) and whose activations do
not survive int8. What each operator becomes, and why, stands in `edgeopt.weights.lowering`; the methods are the modules
of `edgeopt.weights`.

Rules:
- Weights of Constant nodes and of branches are found too (`edgeopt_converters.onnx_subgraphs`).
- A narrow product is not put in groups, as it would run slower than in float; its weight is stored in int8.
- AWQ inserts nothing: an input whose maker cannot take the scale is left unscaled, and a note names it.
- What stays in float is named with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_graphs import fold
from edgeopt.passes import Order, Result
from edgeopt.weights import awq, gptq, hqq, lowering, moments, mse, rtn
from edgeopt.weights.folding import Folding
from edgeopt.weights.grid import BITS, Grid, Grouped
from edgeopt_converters.model import Model
from edgeopt_converters.onnx_subgraphs import graphs, specialise

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("onnx",)
EXTRA = "onnx"

METHODS = ("rtn", "mse", "hqq", "gptq", "awq")
SAMPLED = ("gptq", "awq")  # the methods that look at what reaches a layer
ACCURACY_LEVELS = (0, 1, 4)
PRODUCTS = ("Gemm", "MatMul")
STORED = ("Conv", "ConvTranspose", "LSTM", *PRODUCTS)
MIB = 1 << 20


@dataclass(frozen=True)
class Options:
    """What is quantized and how.

    `bits` and `group` are for matrix products; `embedding_bits` for tables, which only store. `accuracy_level` is
    ONNX Runtime's: 4 multiplies in int8, the others unpack to float and are slower than float. Products of fewer than
    `skip_k_below` inputs ran slower in groups than in float (256 x 256, 16 rows: 1.2 times; 384 x 1536: 0.7).
    `store_rest` keeps all other weights in int8, unpacked at loading; `smallest` is the number of elements below which
    a weight is not worth it. `samples`, `positions` and `moments_mib` bound what the methods that use samples look at.
    """

    bits: int = 4
    group: int = 64
    method: str = "gptq"
    symmetric: bool = True
    accuracy_level: int = 4
    skip_k_below: int = 320
    embedding_bits: int = 8
    store_rest: bool = True
    smallest: int = 1024
    samples: int = 128
    positions: int = 256
    moments_mib: int = 1024

    def __post_init__(self) -> None:
        Grid(self.bits, self.group, self.symmetric)
        Grid(self.embedding_bits, self.group, self.symmetric)
        if self.method not in METHODS:
            raise ValueError(
                f"quantize_weights: method is one of {', '.join(METHODS)}, found {self.method!r}"
            )
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise ValueError(
                f"quantize_weights: accuracy_level is one of {ACCURACY_LEVELS}, found {self.accuracy_level}"
            )
        if min(self.samples, self.positions, self.moments_mib) < 1:
            raise ValueError(
                f"quantize_weights: samples, positions and moments_mib must be positive, found {self}"
            )

    @property
    def grid(self) -> Grid:
        """The grid of matrix products."""
        return Grid(self.bits, self.group, self.symmetric)


@dataclass
class _Product:
    """One weight, and all products that multiply with it."""

    weight: str
    is_rows: bool  # (outputs, inputs), as Gemm with transB keeps it
    nodes: list[Any] = field(default_factory=list)
    values: tuple[str, ...] = ()  # what is multiplied with the weight, seen through changes of shape


@dataclass
class _Work:
    """A program on its way, and what is to be said about it."""

    program: Any
    options: Options
    exclude: tuple[str, ...]
    products: dict[tuple[str, bool], _Product] = field(default_factory=dict)
    lowered: dict[str, lowering.Lowered] = field(
        default_factory=dict
    )  # by node output, or by weight if stored
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.constants = {tensor.name: tensor for tensor in self.program.graph.initializer}

    def array(self, name: str) -> np.ndarray:
        """The values of a constant."""
        import onnx

        values: np.ndarray = onnx.numpy_helper.to_array(self.constants[name])
        return values

    def nodes(self) -> Iterator[Any]:
        """All nodes of all graphs."""
        for graph in graphs(self.program):
            yield from graph.node


def apply(model: Model, order: Order) -> Result:
    """Quantize the weights of matrix products, embeddings, recurrent nets and convolutions.

    `order.exclude` names operators or types that stay in float. Samples are needed for `gptq` and `awq` only.

    Raises:
        RecipeError: The method needs calibration samples and there are none.
    """
    options = order.options if isinstance(order.options, Options) else Options()
    program, _ = specialise(fold(model.program))
    before = program.ByteSize()
    work = _Work(program, options, order.exclude)
    _choose(work)
    _quantize_products(work, order)
    _store(work)
    lowering.swap(program, work.lowered)
    work.notes.append(
        f"{before:,} bytes before, {program.ByteSize():,} after ({program.ByteSize() / before:.3f})"
    )
    if work.left:
        work.notes.append(f"in float: {', '.join(dict.fromkeys(work.left))}")
    return Result(replace(model, program=program), tuple(work.notes))


def walks(order: Order, available: int) -> int:
    """How many samples `apply` walks over, for progress; only the first walk is reported."""
    options = order.options if isinstance(order.options, Options) else Options()
    return min(options.samples, available) if options.method in SAMPLED else 0


def _choose(work: _Work) -> None:
    """Find the products whose weights are put in groups, and lower tables and recurrent nets."""
    for node in work.nodes():
        if node.op_type in PRODUCTS and len(node.input) > 1 and node.input[1] in work.constants:
            reason = _why_not(work, node)
            if reason == "":
                is_rows = _attribute(node, "transB", 0) == 1
                key = (node.input[1], is_rows)
                work.products.setdefault(key, _Product(*key)).nodes.append(node)
            elif reason != NARROW:
                work.left.append(f"{_label(node)} ({reason})")
        elif node.op_type == "Gather" and _is_table(work, node):
            grid = Grid(work.options.embedding_bits, work.options.group, work.options.symmetric)
            rounding = mse if grid.bits == min(BITS) else rtn  # at 8 bits clipping gains next to nothing
            work.lowered[node.output[0]] = lowering.table(
                node, rounding.quantize(work.array(node.input[0]), grid)
            )
        elif node.op_type == "LSTM" and _is_plain_lstm(work, node):
            weights = (work.array(node.input[1]), work.array(node.input[2]))
            work.lowered[lowering.key(node)] = lowering.recurrent(node, *weights)
    tables = [node for node in work.nodes() if node.op_type == "Gather" and node.output[0] in work.lowered]
    recurrent = [
        node for node in work.nodes() if node.op_type == "LSTM" and lowering.key(node) in work.lowered
    ]
    if tables:
        work.notes.append(f"{len(tables)} tables in {work.options.embedding_bits} bits")
    if recurrent:
        work.notes.append(f"{len(recurrent)} LSTM in int8, a scale for each gate of each unit")


NARROW = "narrow"


def _why_not(work: _Work, node: Any) -> str:
    """Why a product's weight is not put in groups, or nothing."""
    import onnx

    tensor = work.constants[node.input[1]]
    if node.name in work.exclude or node.op_type in work.exclude:
        return "excluded by the recipe"
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return "not float32"
    plain = all(_attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if len(tensor.dims) != 2 or _attribute(node, "transA", 0) or not plain:
        return "not a plain matrix product"
    if len(node.input) > 2 and node.input[2] and not _is_bias(work, node):
        return "its bias is no constant vector"
    inputs = tensor.dims[1] if _attribute(node, "transB", 0) else tensor.dims[0]
    if inputs < work.options.skip_k_below:
        return NARROW
    return ""


def _is_bias(work: _Work, node: Any) -> bool:
    bias, weight = work.constants.get(node.input[2]), work.constants[node.input[1]]
    outputs = weight.dims[0] if _attribute(node, "transB", 0) else weight.dims[1]
    return bias is not None and list(bias.dims) == [outputs]


def _is_table(work: _Work, node: Any) -> bool:
    tensor = work.constants.get(node.input[0])
    return (
        tensor is not None
        and tensor.data_type == 1
        and len(tensor.dims) == 2
        and _attribute(node, "axis", 0) == 0
        and tensor.dims[0] * tensor.dims[1] >= work.options.smallest
        and tensor.dims[1] % work.options.group == 0
        and node.name not in work.exclude
        and node.op_type not in work.exclude
    )


def _is_plain_lstm(work: _Work, node: Any) -> bool:
    """What DynamicQuantizeLSTM takes: constant weights, time first, no excluding word of the recipe."""
    known = all(name in work.constants and work.constants[name].data_type == 1 for name in node.input[1:3])
    return (
        known
        and _attribute(node, "layout", 0) == 0
        and node.name not in work.exclude
        and node.op_type not in work.exclude
    )


def _quantize_products(work: _Work, order: Order) -> None:
    """Round every product's weight by the method, batch by batch of what has to be remembered."""
    options = work.options
    seen = {name for node in work.program.graph.node for name in node.output}
    seen |= {entry.name for entry in work.program.graph.input}
    folding = Folding(work.program)
    for product in work.products.values():
        product.values = tuple(folding.root(node.input[0], _inputs(work, product)) for node in product.nodes)
    widths = {
        value: _inputs(work, product)
        for product in work.products.values()
        for value in product.values
        if value in seen and options.method in SAMPLED
    }
    float_program = type(work.program)()
    float_program.CopyFrom(work.program)
    activity: dict[str, np.ndarray] = {}  # AWQ needs no more than the diagonal once an input is scaled
    on_sample = order.on_sample
    for names in moments.batches(widths, options.moments_mib * MIB):
        walk = moments.watched(iter(order.samples), options.samples, on_sample)
        found = moments.second_moments(float_program, names, walk, options.positions)
        on_sample = _silent
        if options.method == "awq":
            activity |= _scale_inputs(work, found, folding)
        else:
            _lower_products(work, found)
    _lower_products(work, activity)
    rest = [product for product in work.products.values() if not _is_lowered(work, product)]
    for product in rest:
        _lower_product(work, product, None)
    _say_products(work, rest)


def _silent() -> None:
    """Nothing is reported."""


def _lower_products(work: _Work, found: Mapping[str, np.ndarray]) -> None:
    """Lower the products whose inputs are in `found`."""
    for product in work.products.values():
        moments_seen = [found[value] for value in product.values if value in found]
        if moments_seen and not _is_lowered(work, product):
            _lower_product(work, product, sum(moments_seen[1:], moments_seen[0]))


def _is_lowered(work: _Work, product: _Product) -> bool:
    return lowering.key(product.nodes[0]) in work.lowered


def _say_products(work: _Work, rest: list[_Product]) -> None:
    options = work.options
    if not work.products:
        return
    kind = "symmetric" if options.symmetric else "with zero points"
    work.notes.append(
        f"{len(work.products)} matrix weights in {options.bits} bits, groups of {options.group}, {kind}, by "
        f"{options.method}; ONNX Runtime accuracy level {options.accuracy_level}"
    )
    if options.method in SAMPLED and rest:
        names = ", ".join(product.weight for product in rest)
        work.notes.append(f"inside branches, rounded without samples: {names}")


def _scale_inputs(work: _Work, found: Mapping[str, np.ndarray], folding: Folding) -> dict[str, np.ndarray]:
    """Scale the inputs whose maker can be divided; return how active each one is afterwards, and note the others."""
    import numpy as np

    unscaled = []
    activity = {}
    for name, seen in found.items():
        scale = _scale_input(work, name, seen, folding)
        if scale is None:
            unscaled.append(name)
        activity[name] = np.diag(seen) if scale is None else np.diag(seen) / scale**2
    if unscaled:
        work.notes.append(
            f"AWQ could not scale {len(unscaled)} inputs without a new operator: {', '.join(unscaled)}"
        )
    return activity


def _scale_input(work: _Work, value: str, seen: np.ndarray, folding: Folding) -> np.ndarray | None:
    """Scale the inputs of all products that read `value`; None where its maker cannot be divided."""
    import numpy as np
    import onnx

    readers = [product for product in work.products.values() if value in product.values]
    read = [node.input[0] for product in readers for node in product.nodes]
    places = folding.places(value, folding.only_for(value, read))
    if not places or any(len(product.nodes) > 1 for product in readers):
        return None
    rows = [_rows(work, product) for product in readers]
    scale = awq.input_scale(rows, work.options.grid, seen)
    folding.divide(places, scale)
    for product, weight in zip(readers, rows, strict=True):
        scaled = (weight * scale).astype(np.float32)
        kept = np.ascontiguousarray(scaled if product.is_rows else scaled.T)
        work.constants[product.weight].CopyFrom(onnx.numpy_helper.from_array(kept, product.weight))
    return scale


def _rows(work: _Work, product: _Product) -> np.ndarray:
    weight = work.array(product.weight)
    return weight if product.is_rows else weight.T


def _inputs(work: _Work, product: _Product) -> int:
    return int(work.constants[product.weight].dims[1 if product.is_rows else 0])


def _lower_product(work: _Work, product: _Product, seen: np.ndarray | None) -> None:
    weight = _rows(work, product)
    grouped = _rounded(weight, work.options, seen)
    for node in product.nodes:
        work.lowered[node.output[0]] = lowering.product(
            node, grouped, weight.shape[1], work.options.accuracy_level
        )


def _rounded(weight: np.ndarray, options: Options, seen: np.ndarray | None) -> Grouped:
    """Apply the method; `seen` is the second moments of the inputs, for AWQ their diagonal."""
    if options.method == "rtn":
        return rtn.quantize(weight, options.grid)
    if options.method == "hqq":
        return hqq.quantize(weight, options.grid)
    if seen is None:
        return mse.quantize(weight, options.grid)
    if options.method == "gptq":
        return gptq.quantize(weight, options.grid, seen)
    return mse.quantize(weight, options.grid, seen)


def _store(work: _Work) -> None:
    """Keep in int8 what is not in groups: convolutions, narrow products, recurrent nets that are not plain."""
    stored = []
    for node in work.nodes():
        if node.op_type not in STORED or lowering.key(node) in work.lowered:
            continue
        for name in node.input[1 : 3 if node.op_type == "LSTM" else 2]:
            tensor = work.constants.get(name)
            if tensor is None or tensor.data_type != 1 or name in work.lowered:
                continue
            if not work.options.store_rest or {node.name, node.op_type} & set(work.exclude):
                work.left.append(f"{_label(node)} (excluded by the recipe)")
            elif len(tensor.dims) >= 2 and _elements(tensor) >= work.options.smallest:
                work.lowered[name] = lowering.stored(
                    name, work.array(name), _channels(node, len(tensor.dims))
                )
                stored.append(name)
    if stored:
        work.notes.append(
            f"{len(stored)} weights stored in int8 per channel and unpacked at loading; they run in float"
        )


def _channels(node: Any, axes: int) -> tuple[int, ...]:
    """The axes of a weight that have a scale of their own."""
    if node.op_type == "LSTM":
        return (0, 1)
    if node.op_type == "ConvTranspose":
        return (1,) if _attribute(node, "group", 1) == 1 else (0, 1)
    if node.op_type == "Conv" or _attribute(node, "transB", 0):
        return (0,)
    return (axes - 1,)


def _label(node: Any) -> str:
    return str(node.name or lowering.key(node))


def _elements(tensor: Any) -> int:
    return math.prod(tensor.dims)


def _attribute(node: Any, name: str, default: Any) -> Any:
    import onnx

    return next(
        (onnx.helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default
    )
