# SPDX-License-Identifier: Apache-2.0
"""Give the channels before and behind hard-swish and swish like ranges, through squeeze-and-excite too.

x * gate(x) does not scale with x, so equalizing stops there, and in nets like MobileNetV3 one channel of a hundred then
sets the step of all others. But a factor can pass if only the gate sees x as it was: the layer before makes s * x, the
gate reads (s * x) / s, the product is s * y, and the layers that read it take s back out of their weights (factors per
channel as in Nagel et al. 2019, section 4.1, with the ranges of activations). The price is one multiplication by a
constant, where floats are computed anyway: the runtimes of ONNX have no integer hard-swish.

Below -3 hard-swish is zero, so what lies there need not be told apart: the layer's output is clipped at the lowest value
that matters, which gives all others a finer step.

Rules:
- The float model's output does not change: clipping happens only where the gate is exactly 0.
- Readers are convolutions and matrix products, reached through pooling and through the product with a squeeze-and-excite
  gate. Where a reader cannot take a factor, the factor is taken back behind the product, at a second multiplication.
- ReLU between a layer and such readers passes factors as it is.

On the net of tests/benchmarks/collapsing_net.py int8 loses 0.2 points of top-1 with it and 5.4 without (5,000 images),
at 1.06 to 1.11 times the latency of the int8 file without it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_graphs import channel_extremes, fold, observer
from edgeopt.onnx_products import attributes
from edgeopt.passes import Order, Result
from edgeopt.weights.channels import FLATTENS, Channels
from edgeopt_converters.model import Model
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("onnx",)
EXTRA = "onnx"

_GATES = ("HardSigmoid", "Sigmoid")
_TIES = frozenset({"GlobalAveragePool", "AveragePool", "MaxPool", "Identity"})


@dataclass(frozen=True)
class Options:
    """How far it goes.

    `strength` is the exponent of largest / own range: 1 makes all channels alike and the readers' weights unlike.
    `largest` bounds a factor. `samples` are looked at for the ranges.
    """

    strength: float = 0.7
    largest: float = 64.0
    samples: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1 or self.largest <= 1 or self.samples < 1:
            raise ValueError(
                f"equalize_gates: strength is above 0 to 1, largest above 1, samples positive; found {self}"
            )


@dataclass(frozen=True)
class _Unit:
    """A layer and its activation: `gate` is None where that is ReLU, else `last` is the product with the gate."""

    layer: Any
    gate: Any | None
    last: Any

    @property
    def before(self) -> str:
        """What the layer gives."""
        return str(self.layer.output[0])

    @property
    def behind(self) -> str:
        """What the activation gives."""
        return str(self.last.output[0])

    @property
    def floor(self) -> float:
        """Below this input the activation gives exactly 0."""
        if self.gate is None:
            return 0.0
        if self.gate.op_type == "Sigmoid":
            return float("-inf")
        given = attributes(self.gate)
        return -float(given.get("beta", 0.5)) / float(given.get("alpha", 0.2))


def apply(model: Model, order: Order) -> Result:
    """Move factors per channel through gated activations; what `order.exclude` selects takes part in nothing.

    Raises:
        RecipeError: There are no calibration samples, or `order.exclude` selects nothing.
    """
    options = order.options if isinstance(order.options, Options) else Options()
    program = fold(model.program)
    graph = _Graph(program, order.exclude)
    units = graph.units()
    watched = observer(program, frozenset(unit.before for unit in units))
    seen = channel_extremes(watched, islice(order.samples, options.samples), order.on_sample)
    if units and not seen:
        raise RecipeError("equalize_gates needs calibration samples; give --calibration DATA")
    gates = plain = 0
    for unit in units:
        readers = graph.layers_behind(unit.behind)
        factors, lowest = _factors(unit, seen[unit.before], options)
        if unit.gate is None:
            if readers and graph.passes_gate(unit.behind):
                graph.scale(unit, readers, factors)
                plain += 1
        else:
            graph.scale(unit, readers or (), factors)
            graph.rebuild(unit, factors, lowest, is_absorbed=readers is not None)
            gates += 1
    graph.store()
    return Result(
        replace(model, program=program),
        (
            f"channels of {gates} gated activations and {plain} before squeeze-and-excite brought to like ranges",
        ),
    )


def walks(order: Order, available: int) -> int:
    """How many samples `apply` walks over, for progress."""
    options = order.options if isinstance(order.options, Options) else Options()
    return min(options.samples, available)


def _factors(
    unit: _Unit, extremes: tuple[np.ndarray, np.ndarray], options: Options
) -> tuple[np.ndarray, float]:
    """The factors of a unit's channels, and below what its scaled values matter to no channel."""
    import numpy as np

    low, high = (ends.astype(np.float64) for ends in extremes)
    lowest = (
        unit.floor if unit.floor > float("-inf") else low
    )  # so that no channel's floor is below -reach.max()
    reach = np.maximum(np.maximum(high, -lowest), 0.0)
    alive = reach > reach.max() * 1e-9
    ratio = np.where(alive, reach.max() / np.where(alive, reach, 1.0), 1.0)
    factors: np.ndarray = np.minimum(ratio**options.strength, options.largest)
    return factors, float(unit.floor * factors.max())


class _Graph(Channels):
    """Units, who reads them, and the nodes that gates need to see their input as it was."""

    def __init__(self, program: Any, exclude: tuple[str, ...]) -> None:
        super().__init__(program, exclude)
        self._inserted: dict[int, list[Any]] = defaultdict(list)  # before the node with this id

    def units(self) -> list[_Unit]:
        """Every layer that only a ReLU, or only a gate and its product read."""
        return [unit for node in self.layers.values() if (unit := self._unit(node)) is not None]

    def _unit(self, layer: Any) -> _Unit | None:
        name = layer.output[0]
        found = self.readers[name]
        if name in self.edges or len(self.shapes.get(name, ())) not in (2, 4):
            return None
        if len(found) == 1 and found[0].op_type == "Relu":
            return _Unit(layer, None, found[0])
        gates = [node for node in found if node.op_type in _GATES]
        products = [node for node in found if node.op_type == "Mul"]
        if len(found) != 2 or len(gates) != 1 or len(products) != 1 or gates[0].output[0] in self.edges:
            return None
        is_own = (
            set(products[0].input) == {name, gates[0].output[0]}
            and len(self.readers[gates[0].output[0]]) == 1
        )
        return _Unit(layer, gates[0], products[0]) if is_own else None

    def layers_behind(self, name: str) -> tuple[Any, ...] | None:
        """The layers that read a tensor through what scales with it, or None where something else reads it."""
        found: list[Any] = []
        tied, todo = {name}, [name]
        products: list[Any] = []
        while todo:
            now = todo.pop()
            if now in self.edges:
                return None
            for node in self.readers[now]:
                if id(node) in self.layers and node.input[0] == now:
                    found.append(node)
                elif self._ties(node, now):
                    products.extend([node] if node.op_type == "Mul" else [])
                    tied.add(node.output[0])
                    todo.append(node.output[0])
                else:
                    return None
        if any(set(node.input) <= tied for node in products):
            return None
        return tuple({id(node): node for node in found}.values())

    def passes_gate(self, name: str) -> bool:
        """Whether a product reads the tensor."""
        return any(node.op_type == "Mul" for node in self.readers[name])

    def _ties(self, node: Any, name: str) -> bool:
        before, after = self.shapes.get(name, ()), self.shapes.get(node.output[0], ())
        if node.op_type in _TIES:
            return len(before) == 4 and len(node.output) == 1
        if node.op_type in FLATTENS:
            return self.flattens(node, name)
        if node.op_type != "Mul" or len(before) != 4 or after != before:
            return False
        others = [entry for entry in node.input if entry != name]
        return len(others) == 1 and self.shapes.get(others[0], ()) == (*before[:2], 1, 1)

    def scale(self, unit: _Unit, readers: Sequence[Any], factors: np.ndarray) -> None:
        """Multiply what the unit's layer gives by `factors`, and divide what the readers make of it."""
        self.scale_outputs(unit.layer, factors)
        for reader in readers:
            self.scale_inputs(reader, 1 / factors)

    def rebuild(self, unit: _Unit, factors: np.ndarray, lowest: float, *, is_absorbed: bool) -> None:
        """Clip what matters to no channel, and let the gate see its input as it was."""
        from onnx import helper

        name = unit.before
        if lowest > float("-inf"):
            floor = self._constant(f"{name}/floor", lowest)
            clip = helper.make_node("Clip", [name, floor], [f"{name}/clipped"], f"{name}/clip")
            self._insert(unit.gate, clip)
            name = clip.output[0]
        shape = (1, -1, 1, 1) if len(self.shapes[unit.before]) == 4 else (1, -1)
        back = self._constant(f"{unit.before}/back", (1 / factors).reshape(shape))
        undo = helper.make_node("Mul", [name, back], [f"{unit.before}/own"], f"{unit.before}/undo")
        self._insert(unit.gate, undo)
        gate: Any = unit.gate
        gate.input[0] = undo.output[0]
        seen = name if is_absorbed else undo.output[0]
        for position, entry in enumerate(unit.last.input):
            if entry == unit.before:
                unit.last.input[position] = seen

    def _insert(self, before: Any, node: Any) -> None:
        self._inserted[id(before)].append(node)

    def _constant(self, name: str, values: Any) -> str:
        import numpy as np
        import onnx

        self.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values, np.float32), name))
        return name

    def store(self) -> None:
        """Write weights and new nodes back."""
        import onnx

        self.write()
        nodes: list[Any] = []
        for node in self.graph.node:
            nodes.extend(self._inserted.get(id(node), ()))
            nodes.append(node)
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(kept)
