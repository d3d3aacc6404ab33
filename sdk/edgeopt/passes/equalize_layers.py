# SPDX-License-Identifier: Apache-2.0
"""Give the channels of weights like ranges, so that one step for a whole weight tensor fits them all.

Where one layer is read by one other, with nothing between that minds a factor per channel, the first layer's output
channels are divided and the second's input channels multiplied by s = sqrt(r1 / r2), r1 and r2 being the channel's
largest weights in both; then both have sqrt(r1 * r2). Chains (pointwise, depthwise, pointwise) are gone over until
nothing moves. Cross-layer equalization: Nagel et al. 2019, "Data-free quantization through weight equalization and bias
correction", section 4.1; what a bias holds beyond the smallest input of a ReLU moves on into the next bias (section 4.1.3).

For targets with one scale a weight tensor, and for 4 bits. Weights with a scale a channel need it less: there
`equalize_activations` does more.

Rules:
- The float model's output stays what it was. Only Conv and Gemm that nothing else reads take part, with ReLU, LeakyReLU,
  PReLU and pooling between them.
- ReLU6 does not scale. It becomes ReLU where no sample reaches its bound, is left alone elsewhere, and the notes say so.
- Biases move only when asked, as far as the samples allow, and never into a padded convolution, whose border has no
  such input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

_POOLS = ("GlobalAveragePool", "AveragePool", "MaxPool")
_SCALES = frozenset({"Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", *_POOLS})
"""Operators whose output scales with their input, channel by channel, for factors above 0."""

_SHIFTS = _SCALES - {"AveragePool"}
"""Those that pass a constant on as it is, where everything is positive; a padded average does not."""

_FLATTENS = frozenset({"Reshape", "Flatten", "Squeeze"})

_DEAD = 1e-9
"""A channel below this share of its tensor's largest weight is dead: it has no range to bring to another's."""


@dataclass(frozen=True)
class Options:
    """How far it goes.

    `sweeps` over the chains at most, until no factor of a sweep differs from 1 by more than `tolerance`. `absorb` also
    moves high biases on, by the smallest input of each ReLU that the samples show: the float output is the same for
    them and may differ a little for others. `samples` are looked at for this and for ReLU6 that never bind.
    """

    sweeps: int = 100
    tolerance: float = 1e-3
    absorb: bool = False
    samples: int = 32

    def __post_init__(self) -> None:
        if self.sweeps < 1 or self.tolerance <= 0 or self.samples < 1:
            raise ValueError(f"equalize_layers: sweeps, tolerance and samples must be positive, found {self}")


@dataclass(frozen=True)
class _Link:
    """Two layers, and what stands between them."""

    first: Any
    between: tuple[Any, ...]
    second: Any

    @property
    def tensor(self) -> str:
        """What the first layer gives."""
        return str(self.first.output[0])

    @property
    def clips(self) -> tuple[Any, ...]:
        """The ReLU6 between them."""
        return tuple(node for node in self.between if node.op_type == "Clip")


def apply(model: Model, order: Order) -> Result:
    """Equalize the weights of neighbouring layers; what `order.exclude` selects takes part in nothing.

    Without samples every ReLU6 is left alone.

    Raises:
        RecipeError: High biases are to be moved and there are no calibration samples, or `order.exclude` selects
            nothing.
    """
    import numpy as np

    options = order.options if isinstance(order.options, Options) else Options()
    program = fold(model.program)
    graph = _Graph(program, order.exclude)
    links = graph.links()
    watched = observer(program, frozenset(link.tensor for link in links))
    seen = channel_extremes(watched, islice(order.samples, options.samples), order.on_sample)
    if links and options.absorb and not seen:
        raise RecipeError("equalize_layers with absorb needs calibration samples; give --calibration DATA")
    verdicts = [_is_free(link, graph, seen) for link in links]
    bound = [link for link, is_free in zip(links, verdicts, strict=True) if not is_free]
    links = [link for link, is_free in zip(links, verdicts, strict=True) if is_free]
    freed = sum(len(link.clips) for link in links)
    graph.free(links)
    total = {link.tensor: np.ones(graph.outputs(link.first)) for link in links}
    sweeps = _equalize(graph, links, total, options)
    high = 0
    if options.absorb:
        lowest = {link.tensor: seen[link.tensor][0] / total[link.tensor] for link in links}
        high = sum(graph.absorb(link, np.maximum(lowest[link.tensor], 0.0)) for link in links)
    graph.store()
    notes = [f"weights of {len(links)} pairs of layers equalized in {sweeps} sweeps"]
    if freed:
        notes.append(f"{freed} ReLU6 that no sample reached the bound of became ReLU")
    if bound:
        names = ", ".join(clip.name or clip.output[0] for link in bound for clip in link.clips)
        notes.append(f"left alone at a ReLU6 that clips, or of which no sample tells: {names}")
    if high:
        notes.append(f"{high} high biases moved into the next layer")
    return Result(replace(model, program=program), tuple(notes))


def pairs(model: Model, exclude: tuple[str, ...] = ()) -> int:
    """How many pairs of layers there are that might share their ranges: where there are none, nothing is to be tried."""
    return len(_Graph(fold(model.program), exclude).links())


def walks(order: Order, available: int) -> int:
    """How many samples `apply` walks over, for progress."""
    options = order.options if isinstance(order.options, Options) else Options()
    return min(options.samples, available)


def _is_free(link: _Link, graph: _Graph, seen: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bool:
    """Whether no clip stands between two layers of which a sample reaches the upper bound, or might."""
    highest = float(seen[link.tensor][1].max()) if link.tensor in seen else float("inf")
    bounds = [graph.bounds(clip)[1] for clip in link.clips]
    return all(highest < bound or bound == float("inf") for bound in bounds)


def _equalize(
    graph: _Graph, links: Sequence[_Link], total: Mapping[str, np.ndarray], options: Options
) -> int:
    """Sweep over the links until nothing moves; `total` gathers the factors. Returns the number of sweeps."""
    import numpy as np

    for sweep in range(options.sweeps):
        moved = 0.0
        for link in links:
            before, after = graph.output_ranges(link.first), graph.input_ranges(link.second)
            alive = (before > _DEAD * before.max()) & (after > _DEAD * after.max())
            ratio = np.where(alive, before, 1.0) / np.where(alive, after, 1.0)
            factors = np.where(alive, np.sqrt(ratio), 1.0)
            graph.scale(link, factors)
            total[link.tensor][:] *= factors
            moved = max(moved, float(np.abs(factors - 1).max()))
        if moved <= options.tolerance:
            return sweep + 1
    return options.sweeps


class _Graph(Channels):
    """Which layers follow which."""

    def links(self) -> list[_Link]:
        """Every pair of layers of which the second alone reads the first."""
        return [link for node in self.layers.values() if (link := self._follow(node)) is not None]

    def _follow(self, first: Any) -> _Link | None:
        name = first.output[0]
        between: list[Any] = []
        is_flat = first.op_type == "Gemm"
        while len(self.readers[name]) == 1 and name not in self.edges:
            node = self.readers[name][0]
            if id(node) in self.layers:
                fits = node.input[0] == name and is_flat == (node.op_type == "Gemm")
                return _Link(first, tuple(between), node) if fits else None
            if self.flattens(node, name) and not is_flat:
                is_flat = True
            elif not self._scales(node, name) or (is_flat and node.op_type in _POOLS):
                return None
            between.append(node)
            name = node.output[0]
        return None

    def _scales(self, node: Any, name: str) -> bool:
        if node.op_type == "Clip":
            low, high = self.bounds(node)
            return low == 0.0 < high
        if node.op_type == "PRelu" and node.input[1] not in self.constants:
            return False
        is_alone = len([output for output in node.output if output]) == 1
        return node.op_type in _SCALES and node.input[0] == name and is_alone

    def bounds(self, clip: Any) -> tuple[float, float]:
        """The bounds of a Clip; NaN where they are not constants."""
        import onnx

        given = attributes(clip)
        found = [given.get("min", float("-inf")), given.get("max", float("inf"))]
        for position, name in enumerate(clip.input[1:3]):
            if name in self.constants:
                found[position] = float(onnx.numpy_helper.to_array(self.constants[name]))
            elif name:
                found[position] = float("nan")
        return found[0], found[1]

    def free(self, links: Sequence[_Link]) -> None:
        """Make every Clip between these layers a Relu."""
        for link in links:
            for clip in link.clips:
                del clip.input[1:]
                del clip.attribute[:]
                clip.op_type = "Relu"

    def outputs(self, node: Any) -> int:
        """The number of a layer's output channels."""
        return len(self.output_ranges(node))

    def output_ranges(self, node: Any) -> np.ndarray:
        """The largest weight of every output channel."""
        import numpy as np

        rows, _ = self.blocks(node)
        found: np.ndarray = np.abs(rows).max(axis=(2, 3)).reshape(-1)
        return found

    def input_ranges(self, node: Any) -> np.ndarray:
        """The largest weight of every input channel."""
        import numpy as np

        rows, _ = self.blocks(node)
        found: np.ndarray = np.abs(rows).max(axis=(1, 3)).reshape(-1)
        return found

    def scale(self, link: _Link, factors: np.ndarray) -> None:
        """Divide the first layer's outputs by `factors` and multiply the second's inputs by them."""
        self.scale_outputs(link.first, 1 / factors)
        self.scale_inputs(link.second, factors)

    def absorb(self, link: _Link, high: np.ndarray) -> int:
        """Take `high` out of the first layer's bias and give the second's what it makes of it; say how many moved."""
        import numpy as np

        biases = self.bias(link.first), self.bias(link.second)
        passes_on = all(node.op_type in _SHIFTS | FLATTENS for node in link.between)
        if not all(biases) or not passes_on or _is_padded(link.second):
            return 0
        rows, groups = self.blocks(link.second)
        self.values[biases[0]] -= high
        self.values[biases[1]] += np.einsum("goik,gi->go", rows, high.reshape(groups, -1)).reshape(-1)
        return int((high > 0).sum())

    def store(self) -> None:
        """Write the weights back."""
        self.write()
        used = {name for node in self.graph.node for name in node.input} | self.edges
        for tensor in [tensor for tensor in self.graph.initializer if tensor.name not in used]:
            self.graph.initializer.remove(tensor)


def _is_padded(node: Any) -> bool:
    given = attributes(node)
    automatic = given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    return automatic or any(given.get("pads", ()))
