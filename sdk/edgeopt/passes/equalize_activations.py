# SPDX-License-Identifier: Apache-2.0
"""Give the channels of an activation like ranges, so that one step for the whole tensor fits them all.

An activation has one step for all its channels, and a channel that uses a tenth of the range loses three bits. Where a
tensor is made and read by layers that can absorb a factor per channel, the factor goes into their weights and the
model's output stays what it was (cross-layer equalization: Nagel et al. 2019, section 4.1, with the activations' ranges
instead of the weights'; SmoothQuant: Xiao et al. 2022, section 4, does it between layer norms and linear layers).

Rules:
- The float model's output does not change: only layers, residual additions, ReLU and pooling take part. What stops at a
  constant (ReLU6) does not scale, so its tensors are left alone.
- Tensors that a residual addition, a ReLU or a pooling ties together share their factors.
- Depthwise weights per channel lose nothing by a factor; other readers' weights do, so there the factor is
  (largest / own)^`strength`. On EfficientNet-Lite0 0.3 was best: activations alone 26.4 dB SQNR instead of 25.5.
- What cannot absorb a factor keeps all its tensors as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_graphs import fold, observer
from edgeopt.onnx_products import attributes
from edgeopt.onnx_select import select
from edgeopt.passes import Order, Result
from edgeopt_converters.model import Model
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("onnx",)
EXTRA = "onnx"

_TIES = frozenset({"Relu", "LeakyRelu", "Add", "GlobalAveragePool", "AveragePool", "MaxPool", "Identity"})
"""Operators whose output scales with their input, channel by channel."""

_FLATTENS = frozenset({"Reshape", "Flatten", "Squeeze"})
"""They tie as well where every channel is one value: (1, C, 1, 1) to (1, C)."""


@dataclass(frozen=True)
class Options:
    """How far it goes.

    `strength` is the exponent where the reader's weights pay for it; `largest` bounds a factor.
    """

    strength: float = 0.3
    largest: float = 16.0
    samples: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1 or self.largest < 1 or self.samples < 1:
            raise ValueError(
                f"equalize_activations: strength is 0 to 1, largest at least 1, samples positive; found {self}"
            )


@dataclass
class _Tied:
    """Tensors that share their factors."""

    tensors: set[str]
    is_free: bool = True  # every reader is depthwise: no weight pays
    blocked: str = ""


def apply(model: Model, order: Order) -> Result:
    """Move factors per channel between layers; `order.exclude` names operators that take part in none.

    Raises:
        RecipeError: There are no calibration samples.
    """
    options = order.options if isinstance(order.options, Options) else Options()
    program = fold(model.program)
    graph = _Graph(program, select(program, order.exclude))
    groups = [group for group in graph.groups() if not group.blocked]
    peaks = _peaks(program, groups, order, options)
    count = 0
    for group in groups:
        factors = _factors(group, peaks, options)
        if factors is not None:
            graph.scale(group.tensors, factors)
            count += 1
    return Result(
        replace(model, program=program),
        (f"channels of {count} groups of activations brought to like ranges",),
    )


def walks(order: Order, available: int) -> int:
    """How many samples `apply` walks over, for progress."""
    options = order.options if isinstance(order.options, Options) else Options()
    return min(options.samples, available)


class _Graph:
    """Who makes and who reads each tensor, and the weights that absorb factors."""

    def __init__(self, program: Any, exclude: frozenset[str]) -> None:
        graph = program.graph
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._exclude = exclude
        self._writer = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[Any]] = defaultdict(list)
        uses: dict[str, int] = defaultdict(int)
        for node in graph.node:
            for name in node.input:
                self._readers[name].append(node)
                uses[name] += 1
        self._shared = {name for name, count in uses.items() if count > 1}
        self._edges = {value.name for value in (*graph.input, *graph.output)}
        self._shapes = {
            info.name: tuple(axis.dim_value for axis in info.type.tensor_type.shape.dim)
            for info in (*graph.value_info, *graph.output, *graph.input)
        }

    def groups(self) -> list[_Tied]:
        """Every set of tied tensors, blocked ones with the reason."""
        parent: dict[str, str] = {}

        def root(name: str) -> str:
            while parent.setdefault(name, name) != name:
                name = parent[name]
            return name

        for node in self._graph.node:
            names = [name for name in (*node.input, *node.output) if name and name not in self._constants]
            for name in names:
                root(name)
            if self._ties(node):
                for name in names[1:]:
                    parent[root(name)] = root(names[0])
        found: dict[str, _Tied] = defaultdict(lambda: _Tied(set()))
        for name in list(parent):
            found[root(name)].tensors.add(name)
        for group in found.values():
            self._inspect(group)
        return list(found.values())

    def _ties(self, node: Any) -> bool:
        if node.op_type in _TIES:
            return not (node.op_type == "Add" and any(name in self._constants for name in node.input))
        if node.op_type in _FLATTENS:
            before, after = self._shapes.get(node.input[0], ()), self._shapes.get(node.output[0], ())
            return len(before) == 4 and before[2:] == (1, 1) and after[:2] == before[:2]
        return False

    def _inspect(self, group: _Tied) -> None:
        for name in sorted(group.tensors):
            writer = self._writer.get(name)
            if name in self._edges:
                group.blocked = "an edge of the model"
            elif writer is None or not (self._ties(writer) or self._is_layer(writer)):
                group.blocked = "made by an operator that takes no factor"
            for reader in self._readers[name]:
                if self._ties(reader):
                    continue
                if not self._is_layer(reader) or reader.input[0] != name:
                    group.blocked = "read by an operator that takes no factor"
                elif not self._is_depthwise(reader):
                    group.is_free = False

    def _is_layer(self, node: Any) -> bool:
        if node.op_type not in ("Conv", "Gemm") or node.name in self._exclude:
            return False
        constant = [name for name in node.input[1:] if name]
        if any(name not in self._constants or name in self._shared for name in constant):
            return False
        given = attributes(node)
        if node.op_type == "Gemm":
            plain = given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0
            return plain and not given.get("transA", 0)
        return given.get("group", 1) == 1 or self._is_depthwise(node)

    def _is_depthwise(self, node: Any) -> bool:
        if node.op_type != "Conv":
            return False
        dims = self._constants[node.input[1]].dims
        return bool(dims[1] == 1 and attributes(node).get("group", 1) == dims[0])

    def scale(self, tensors: set[str], factors: np.ndarray) -> None:
        """Multiply every tensor's channels by `factors`: into who makes them, out of who reads them."""
        for name in tensors:
            writer = self._writer[name]
            if not self._ties(writer):
                for position in range(1, len(writer.input)):
                    self._multiply(writer, position, factors, is_output=True)
            for reader in self._readers[name]:
                if not self._ties(reader):
                    self._multiply(reader, 1, 1 / factors, is_output=False)

    def _multiply(self, node: Any, position: int, factors: np.ndarray, *, is_output: bool) -> None:
        import numpy as np
        import onnx

        if not node.input[position]:
            return
        tensor = self._constants[node.input[position]]
        values = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        axis = 0
        if values.ndim > 1 and node.op_type == "Gemm":
            axis = int(bool(attributes(node).get("transB", 0)) != is_output)
        elif values.ndim > 1 and not is_output and not self._is_depthwise(node):
            axis = 1
        shape = [1] * values.ndim
        shape[axis] = -1
        scaled = (values * factors.reshape(shape)).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(scaled), tensor.name))


def _peaks(program: Any, groups: list[_Tied], order: Order, options: Options) -> dict[str, np.ndarray]:
    """The largest magnitude of every channel over the samples: tensor -> (channels,)."""
    import numpy as np

    wanted = frozenset(name for group in groups for name in group.tensors)
    observe = observer(program, wanted)
    found: dict[str, np.ndarray] = {}
    for sample in islice(order.samples, options.samples):
        for name, values in observe(sample):
            peak = np.abs(values).max(axis=(0, *range(2, values.ndim)))
            found[name] = np.maximum(found[name], peak) if name in found else peak
        order.on_sample()
    if not found and groups:
        raise RecipeError("equalize_activations needs calibration samples; give --calibration DATA")
    return found


def _factors(group: _Tied, peaks: Mapping[str, np.ndarray], options: Options) -> np.ndarray | None:
    """The factors of a group, or None where its tensors do not agree on the number of channels or all are alike."""
    import numpy as np

    sizes = {peaks[name].shape for name in group.tensors}
    if len(sizes) != 1:
        return None
    peak = np.max([peaks[name] for name in group.tensors], axis=0).astype(np.float64)
    if not np.isfinite(peak).all() or peak.max() <= 0:
        return None
    strength = 1.0 if group.is_free else options.strength
    alive = peak > peak.max() * 1e-6
    factors = np.where(alive, (peak.max() / np.where(alive, peak, 1.0)) ** strength, 1.0)
    factors = np.minimum(factors, options.largest)
    return None if np.allclose(factors, 1.0) else factors
