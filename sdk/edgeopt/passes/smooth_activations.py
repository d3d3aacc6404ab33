# SPDX-License-Identifier: Apache-2.0
"""Move the outlying channels of an activation into the weights of the matrix products that read it.

An activation has one step for all its channels. In transformers a few channels are tens of times larger than all
others, which then have a few steps left. Dividing channel j by s_j and multiplying row j of the weights by it changes
nothing in float and much in int8, because weights have room (SmoothQuant: Xiao et al. 2022, equation 4:
s_j = max|X_j|^alpha / max|W_j|^(1-alpha)).

Rules:
- Float in, float out, the same output but for float rounding.
- alpha is searched for every activation by itself: the one whose products, computed in int8, err least over the
  samples; where none beats leaving it alone by `gain`, it is left alone.
- The division goes into the layer norm, product or constant that makes the activation if nobody else reads it
  (pre-norm transformers); otherwise one Mul is put before the products (post-norm: the residual reads it too). On
  MiniLM the 18 Muls take 3 % of the time. `insert = false` leaves such activations alone and says so.

Why not `equalize_activations`? That evens out convolutions with residuals and never adds an operator; this one knows
only products and their inputs, and weighs both sides' errors.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_graphs import fold, observer
from edgeopt.onnx_products import PRODUCTS, attributes, unflatten
from edgeopt.passes import Order, Result
from edgeopt_converters.model import Model
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("onnx",)
EXTRA = "onnx"

GRID = 127
STEPS = 255
"""Weights have `GRID` steps on each side of zero, activations have `STEPS` from their smallest to their largest."""

_MOVED = ("folded", "Mul inserted")


@dataclass(frozen=True)
class Options:
    """What is tried, on how much.

    `alphas` are the migration strengths; `peak_samples` give the channels' maxima, `judged_samples` the errors, of at
    most `rows` rows each. `gain`: the error must fall to this share of what it was. `enough_db`: no Mul is inserted
    before products whose own output is already that far above its int8 error.
    """

    alphas: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    peak_samples: int = 128
    judged_samples: int = 16
    rows: int = 64
    gain: float = 0.7
    insert: bool = True
    enough_db: float = 45.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", tuple(self.alphas))
        if not self.alphas or not all(0 < alpha <= 1 for alpha in self.alphas):
            raise ValueError(f"smooth_activations: alphas are above 0 and at most 1, found {self.alphas}")
        if min(self.peak_samples, self.judged_samples, self.rows) < 1 or not 0 < self.gain <= 1:
            raise ValueError(
                f"smooth_activations: samples and rows must be positive and gain above 0 and at most 1, found {self}"
            )


@dataclass
class _Read:
    """An activation and the products that read it, and what was found about it."""

    tensor: str
    products: list[Any]
    peaks: Any = None  # (channels,), largest magnitude over the samples
    factors: dict[float, Any] = field(
        default_factory=dict
    )  # alpha -> (channels,); 0 stands for leaving it alone
    errors: dict[float, float] = field(default_factory=lambda: defaultdict(float))
    power: float = 0.0


def apply(model: Model, order: Order) -> Result:
    """Divide activations before matrix products channel by channel, and multiply the weights' rows.

    `order.exclude` names products that keep their weights, and with them their input and all its other readers.

    Raises:
        RecipeError: There are no calibration samples.
    """
    options = order.options if isinstance(order.options, Options) else Options()
    program = unflatten(fold(model.program))
    graph = _Graph(program)
    reads = graph.reads(order.exclude)
    _find_peaks(program, reads, order, options)
    for read in reads:
        read.factors = _factors(read, graph, options)
    _judge(program, reads, graph, order, options)
    done: list[str] = []
    left: list[str] = []
    for read in reads:
        alpha = _best(read, options)
        where = (
            graph.absorb(read, read.factors[alpha], options, _decibels(read)) if alpha else "nothing gained"
        )
        if where in _MOVED:
            done.append(f"{read.tensor} ({where}, alpha {alpha:g})")
        else:
            left.append(f"{read.tensor} ({where})")
    graph.finish()
    notes = [f"activations smoothed: {len(done)} of {len(reads)}" + (f": {', '.join(done)}" if done else "")]
    if left:
        notes.append(f"activations left as they were: {', '.join(left)}")
    return Result(replace(model, program=program), tuple(notes))


def walks(order: Order, available: int) -> int:
    """How many samples `apply` walks over, for progress."""
    options = order.options if isinstance(order.options, Options) else Options()
    return min(options.peak_samples, available) + min(options.judged_samples, available)


class _Graph:
    """Who makes and reads each tensor, and the weights that take factors."""

    def __init__(self, program: Any) -> None:
        import onnx

        self._program = program
        self._constants = {tensor.name: tensor for tensor in program.graph.initializer}
        self._arrays = onnx.numpy_helper.to_array
        self._writer = {name: node for node in program.graph.node for name in node.output}
        self._readers: dict[str, list[Any]] = defaultdict(list)
        for node in program.graph.node:
            for name in node.input:
                self._readers[name].append(node)
        self._outputs = {output.name for output in program.graph.output}
        self._shapes = {
            info.name: tuple(axis.dim_value for axis in info.type.tensor_type.shape.dim)
            for info in (*program.graph.value_info, *program.graph.output, *program.graph.input)
        }
        self._inserted: list[tuple[Any, Any]] = []  # (a node, the Mul that goes before it)

    def reads(self, exclude: tuple[str, ...]) -> list[_Read]:
        """Activations of which every product may change its weights."""
        found: dict[str, list[Any]] = defaultdict(list)
        blocked: set[str] = set()
        for node in self._program.graph.node:
            if node.op_type in PRODUCTS and node.input[1] in self._constants:
                found[node.input[0]].append(node)
                if node.name in exclude or node.op_type in exclude or not self._is_plain(node):
                    blocked.add(node.input[0])
        return [_Read(name, nodes) for name, nodes in found.items() if name not in blocked]

    def _is_plain(self, node: Any) -> bool:
        """Whether the node is x W or x W^T with a float matrix of its own."""
        tensor = self._constants[node.input[1]]
        found = attributes(node)
        is_matrix = tensor.data_type == 1 and len(tensor.dims) == 2 and node.input[0] not in self._constants
        return is_matrix and self._is_own(node.input[1]) and not found.get("transA", 0)

    def _is_own(self, name: str) -> bool:
        return name in self._constants and len(self._readers[name]) == 1

    def weight(self, node: Any) -> np.ndarray:
        """Return the weight as (inputs, outputs)."""
        values = self._arrays(self._constants[node.input[1]])
        matrix: np.ndarray = values.T if attributes(node).get("transB", 0) else values
        return matrix

    def absorb(self, read: _Read, factors: np.ndarray, options: Options, decibels: float) -> str:
        """Divide the activation by `factors` and multiply its readers' weights; say where the division went."""
        places = self._places(read.tensor, read.products, len(factors))
        if places is None and not options.insert:
            return "others read it, and insert is off"
        if places is None and decibels >= options.enough_db:
            return f"its products are at {decibels:.0f} dB already"
        if places is None:
            self._insert(read, factors)
        else:
            for writer, name, axis in places:
                self._scale(self._own(writer, name), 1 / factors, axis)
        for node in read.products:
            self._scale(node.input[1], factors, 1 if attributes(node).get("transB", 0) else 0)
        return _MOVED[places is None]

    def _places(self, tensor: str, readers: list[Any], size: int) -> list[tuple[Any, str, int]] | None:
        """Return the constants (their reader, their axis) that divide `tensor` if they are divided, or None."""
        writer = self._writer.get(tensor)
        if writer is None or tensor in self._outputs or len(self._readers[tensor]) != len(readers):
            return None
        if writer.op_type in ("Reshape", "Relu", "Identity"):
            before = self._shapes.get(writer.input[0], ())
            return self._places(writer.input[0], [writer], size) if before and before[-1] == size else None
        constants = [name for name in writer.input if name in self._constants]
        if not constants or not all(
            self._is_own(name) or len(self._constants[name].dims) == 1 for name in constants
        ):
            return None
        return self._places_of(writer, constants, size)

    def _places_of(self, writer: Any, constants: list[str], size: int) -> list[tuple[Any, str, int]] | None:
        is_vector = {name: self._constants[name].dims[-1:] == [size] for name in constants}
        if writer.op_type == "LayerNormalization":
            is_last = attributes(writer).get("axis", -1) in (
                -1,
                len(self._shapes.get(writer.input[0], ())) - 1,
            )
            return [(writer, name, -1) for name in constants] if is_last and all(is_vector.values()) else None
        if (
            writer.op_type == "Gemm"
            and writer.input[1] in constants
            and len(constants) == len(writer.input) - 1
        ):
            columns = 0 if attributes(writer).get("transB", 0) else 1
            biases = [(writer, name, -1) for name in constants[1:] if is_vector[name]]
            return [(writer, constants[0], columns), *biases] if len(biases) == len(constants) - 1 else None
        if writer.op_type == "MatMul" and writer.input[1] in constants:
            return [(writer, constants[0], -1)]
        if writer.op_type == "Mul" and is_vector[constants[0]]:
            return [(writer, constants[0], -1)]
        if writer.op_type == "Add" and is_vector[constants[0]]:
            other = next((name for name in writer.input if name not in constants), "")
            before = self._places(other, [writer], size)
            return None if before is None else [(writer, constants[0], -1), *before]
        return None

    def _own(self, node: Any, name: str) -> str:
        """Give the node a copy of a vector that others read too (exporters merge equal ones)."""
        if self._is_own(name):
            return name
        copy = self._free(f"{name}_of_{node.name or node.output[0]}")
        tensor = self._program.graph.initializer.add()
        tensor.CopyFrom(self._constants[name])
        tensor.name = copy
        self._constants[copy] = tensor
        self._readers[name].remove(node)
        self._readers[copy].append(node)
        node.input[:] = [copy if entry == name else entry for entry in node.input]
        return copy

    def _free(self, wish: str) -> str:
        while wish in self._constants or wish in self._readers or wish in self._writer:
            wish += "_"
        return wish

    def _scale(self, name: str, factors: np.ndarray, axis: int) -> None:
        import numpy as np
        import onnx

        tensor = self._constants[name]
        values = self._arrays(tensor).astype(np.float64)
        shape = [1] * values.ndim
        shape[axis] = -1
        scaled = np.ascontiguousarray((values * factors.reshape(shape)).astype(np.float32))
        tensor.CopyFrom(onnx.numpy_helper.from_array(scaled, name))

    def _insert(self, read: _Read, factors: np.ndarray) -> None:
        import numpy as np
        import onnx

        smoothed, name = self._free(f"{read.tensor}_smoothed"), self._free(f"{read.tensor}_smoothing")
        self._constants[name] = onnx.numpy_helper.from_array((1 / factors).astype(np.float32), name)
        self._program.graph.initializer.append(self._constants[name])
        self._readers[smoothed] = read.products
        node = onnx.helper.make_node("Mul", [read.tensor, name], [smoothed], f"{read.tensor}_smooth")
        self._inserted.append((read.products[0], node))
        for product in read.products:
            product.input[0] = smoothed

    def finish(self) -> None:
        """Put the inserted nodes where they belong: before the first product that reads them."""
        before = {product.output[0]: node for product, node in self._inserted}
        nodes: list[Any] = []
        for node in self._program.graph.node:
            if node.output[0] in before:
                nodes.append(before[node.output[0]])
            nodes.append(type(node).FromString(node.SerializeToString()))
        del self._program.graph.node[:]
        self._program.graph.node.extend(nodes)
        del self._program.graph.value_info[:]


def _find_peaks(program: Any, reads: list[_Read], order: Order, options: Options) -> None:
    """Set the largest magnitude of every channel of every activation over the samples."""
    import numpy as np

    wanted = {read.tensor: read for read in reads}
    observe = observer(program, frozenset(wanted))
    seen = 0
    for sample in islice(order.samples, options.peak_samples):
        seen += 1
        for name, values in observe(sample):
            peak = np.abs(values).reshape(-1, values.shape[-1]).max(0).astype(np.float64)
            read = wanted[name]
            read.peaks = peak if read.peaks is None else np.maximum(read.peaks, peak)
        order.on_sample()
    if not seen:
        raise RecipeError("smooth_activations needs calibration samples; give --calibration DATA")


def _factors(read: _Read, graph: _Graph, options: Options) -> dict[float, np.ndarray]:
    """Return the candidates: alpha -> factors, 1 on average; 0 leaves the activation alone."""
    import numpy as np

    rows = np.max([np.abs(graph.weight(node)).max(1) for node in read.products], axis=0).astype(np.float64)
    found = {0.0: np.ones_like(rows)}
    is_alive = (read.peaks > 1e-6 * read.peaks.max()) & (rows > 1e-6 * rows.max())
    if not is_alive.any() or not np.isfinite(read.peaks).all():
        return found
    for alpha in options.alphas:
        factors = read.peaks[is_alive] ** alpha / rows[is_alive] ** (1 - alpha)
        found[alpha] = np.ones_like(rows)
        found[alpha][is_alive] = factors / np.exp(np.log(factors).mean())
    return found


def _judge(program: Any, reads: list[_Read], graph: _Graph, order: Order, options: Options) -> None:
    """Sum, for every candidate, the squared errors of the products in int8."""
    import numpy as np

    wanted = {read.tensor: read for read in reads}
    weights = {read.tensor: _weights(read, graph) for read in reads}
    observe = observer(program, frozenset(wanted))
    for sample in islice(order.samples, options.judged_samples):
        for name, values in observe(sample):
            read = wanted[name]
            rows = values.reshape(-1, values.shape[-1])
            chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), options.rows)).astype(np.int64))
            exact = rows[chosen] @ weights[name][0.0][0]
            read.power += float(np.square(exact).sum())
            for alpha, (_, rounded) in weights[name].items():
                smooth = _on_grid(rows / read.factors[alpha].astype(np.float32), chosen)
                read.errors[alpha] += float(np.square(smooth @ rounded - exact).sum())
        order.on_sample()


def _weights(read: _Read, graph: _Graph) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """Return alpha -> all products' weights side by side, (inputs, outputs): as they are, and in int8."""
    import numpy as np

    weight = np.concatenate([graph.weight(node) for node in read.products], axis=1)
    found = {}
    for alpha, factors in read.factors.items():
        scaled = weight * factors[:, None]
        scale = np.maximum(np.abs(scaled).max(0) / GRID, 1e-30)
        found[alpha] = weight, (np.rint(scaled / scale) * scale).astype(np.float32)
    return found


def _on_grid(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the chosen rows on the grid of all rows' range, which holds zero (DynamicQuantizeLinear)."""
    import numpy as np

    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    step = (high - low) / STEPS or 1.0
    zero = round(-low / step)
    rounded: np.ndarray = (np.clip(np.rint(values[chosen] / step) + zero, 0, STEPS) - zero) * step
    return rounded.astype(np.float32)


def _best(read: _Read, options: Options) -> float:
    alpha: float = min(read.errors, key=lambda key: (read.errors[key], key), default=0.0)
    return alpha if read.errors[alpha] <= options.gain * read.errors[0.0] else 0.0


def _decibels(read: _Read) -> float:
    """How far the products' output is above their int8 error if nothing is done."""
    import math

    return 10 * math.log10(read.power / read.errors[0.0]) if read.power and read.errors[0.0] else math.inf
