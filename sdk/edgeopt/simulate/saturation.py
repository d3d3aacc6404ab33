# SPDX-License-Identifier: Apache-2.0
"""What a quantized model loses on x86 CPUs without VNNI, and which layers to narrow so that it loses nothing.

Every layer is judged by its own: its exact inputs, its output once exact and once with saturating pairs. The whole
net is run twice, so that losses add up as they do on such a CPU. Arithmetic, sources and what is certain of them:
`edgeopt.simulate.pairs`. What is simulated is ONNX Runtime; that nothing *can* saturate is said of OpenVINO too.

What does not help, so that nobody tries it: int8 activations (s8s8). ONNX Runtime makes them uint8 on x86, with a
zero point near 128, and pairs saturate more often. What helps without a change of the weights: the session option
`session.x64quantprecision` = "1". It costs what int8 had gained, on CPUs with VNNI too, so it is no default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from edgeopt.simulate.integer import IntegerNet
from edgeopt.simulate.layers import LAYER_TYPES, Layer, is_depthwise, output_axis, parse, weight_matrix
from edgeopt.simulate.pairs import can_saturate, excess, orders, safe_ranges, worst_sum
from edgeopt.simulate.values import Accumulated, quantize
from edgeopt_converters.model import Model
from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

CEILING_DB = 200.0
"""SQNR of two equal tensors, which have no noise: above what float32 can tell."""

DEFAULT_LIMIT_DB = 50.0
"""A layer whose saturation noise is below this is left alone: 8-bit rounding itself leaves 30 to 45 dB a layer."""


class Advice(Enum):
    """What to do about a layer."""

    NOTHING = "nothing"  # exact on every CPU, by its weights or its kernel
    WATCH = "watch"  # some input can overflow it, none of the samples did
    NARROW = "narrow"  # it saturates on the samples: give its weights 7 bits where they need it


@dataclass(frozen=True)
class LayerSaturation:
    """One integer layer on a CPU without VNNI.

    `worst_sum` is the largest pair sum that its weights can give with any input (int16 ends at 32767). `clipped` of
    `pair_sums` left int16 on the samples. `sqnr_db` compares its output with and without that, rounded to its own
    integers where it has some.
    """

    name: str
    op_type: str
    worst_sum: int
    can_saturate: bool
    pair_sums: int
    clipped: int
    sqnr_db: float

    @property
    def share(self) -> float:
        """The share of pair sums that saturate."""
        return self.clipped / self.pair_sums if self.pair_sums else 0.0

    @property
    def advice(self) -> Advice:
        """What to do about it."""
        if not self.can_saturate:
            return Advice.NOTHING
        return Advice.NARROW if self.clipped else Advice.WATCH


@dataclass(frozen=True)
class SaturationReport:
    """A model on a CPU without VNNI.

    `sqnr_db` compares the model's outputs there with its outputs elsewhere. The other two compare both with the
    float model, if it was given: how good the quantized model is anyway, and how good there.
    """

    layers: tuple[LayerSaturation, ...]
    samples: int
    sqnr_db: float
    exact_sqnr_db: float | None = None
    saturated_sqnr_db: float | None = None

    @property
    def is_safe(self) -> bool:
        """Whether no input at all can saturate: the weights alone say so."""
        return not any(layer.can_saturate for layer in self.layers)

    def sentence(self) -> str:
        """Say it in one line, for a report."""
        can = sum(layer.can_saturate for layer in self.layers)
        does = [layer for layer in self.layers if layer.clipped]
        if not can:
            return f"none of {len(self.layers)} integer layers can saturate on x86 without VNNI"
        worst = min(does, key=lambda layer: layer.sqnr_db, default=None)
        tail = f"; worst {worst.name} ({worst.sqnr_db:.1f} dB)" if worst else ""
        return (
            f"x86 without VNNI: {can} of {len(self.layers)} integer layers can saturate, {len(does)} do on "
            f"{self.samples} samples, outputs {self.sqnr_db:.1f} dB from exact{tail}"
        )


def check_saturation(
    model: Model, samples: Iterable[Mapping[str, np.ndarray]], *, original: Model | None = None
) -> SaturationReport:
    """Simulate a QDQ model with and without saturation; `original` is the float model, to judge both against.

    The samples are not walked if the weights alone rule saturation out.

    Raises:
        RecipeError: There is no sample, or it lacks an input.
        UnsupportedError: The model is no ONNX model, or has operators that are not simulated.
    """
    if model.format != "onnx":
        raise UnsupportedError(f"check_saturation wants an ONNX model in QDQ form, found {model.format!r}")
    net = IntegerNet(model.program)
    tallies = {layer.name: _Tally(layer) for layer in net.layers}
    at_risk = {name: tally for name, tally in tallies.items() if tally.can_saturate}
    if not at_risk:
        return SaturationReport(tuple(tally.result() for tally in tallies.values()), 0, CEILING_DB)
    whole, exact_noise, saturated_noise = _Ratio(), _Ratio(), _Ratio()
    reference = _session(original) if original is not None else None
    count = 0
    for sample in samples:
        count += 1
        exact = net.run(sample, adjust=lambda *given: _observe(at_risk, *given)).outputs
        saturated = net.run(sample, adjust=lambda *given: _saturate(at_risk, *given)).outputs
        expected = reference(sample) if reference else {}
        for name, values in exact.items():
            whole.add(values, saturated[name])
            if name in expected:
                exact_noise.add(expected[name], values)
                saturated_noise.add(expected[name], saturated[name])
    if not count:
        raise RecipeError("check_saturation needs at least one sample, found none")
    return SaturationReport(
        tuple(tally.result() for tally in tallies.values()),
        count,
        whole.db(),
        exact_noise.db() if reference else None,
        saturated_noise.db() if reference else None,
    )


def seven_bit_layers(report: SaturationReport, limit_db: float = DEFAULT_LIMIT_DB) -> tuple[str, ...]:
    """Name the layers whose weights to narrow: those that lose more than `limit_db` allows on the samples.

    With `limit_db` infinite, all that any input can saturate: then the model is exact on every CPU.
    """
    return tuple(layer.name for layer in report.layers if layer.can_saturate and layer.sqnr_db < limit_db)


@dataclass(frozen=True)
class WeightRanges:
    """What to quantize a weight in: a magnitude for each output channel, and the axis that they lie along."""

    axis: int
    magnitudes: tuple[float, ...]


def narrow_ranges(program: Any, layers: Iterable[str]) -> dict[str, WeightRanges]:
    """For layers of a *float* ONNX model, the ranges to quantize their weights in so that they cannot saturate.

    By the name of the weight's initializer. Quantized symmetrically to int8 with scale = magnitude / 127, each to the
    nearest, no pair overflows with any input. A channel without a dangerous pair keeps its range, the worst one gets
    twice that: 7 bits. A weight that several layers share gets the widest. A layer that is exact anyway (depthwise)
    is left out.

    Raises:
        RecipeError: There is no such layer.
        UnsupportedError: The layer has no constant weights, or shares them along another axis.
    """
    import numpy as np
    from onnx import numpy_helper

    nodes = {node.name: node for node in map(parse, program.graph.node) if node.op_type in LAYER_TYPES}
    constants = {tensor.name: tensor for tensor in program.graph.initializer}
    found: dict[str, WeightRanges] = {}
    for name in layers:
        if name not in nodes:
            raise RecipeError(f"narrow_ranges: {seam.unknown('layer', name, tuple(nodes))}")
        node = nodes[name]
        weight = node.inputs[1]
        values = numpy_helper.to_array(constants[weight]) if weight in constants else None
        matrix = weight_matrix(node, values) if values is not None else None
        if values is None or matrix is None:
            raise UnsupportedError(f"narrow_ranges: layer {name!r} has no constant weights that are a matrix")
        if is_depthwise(node, values.shape):
            continue
        channels = values.shape[1] if node.op_type == "Conv" else matrix.shape[1]
        widest = np.max([safe_ranges(ordered) for ordered in orders(matrix, channels)], axis=0)
        ranges = WeightRanges(output_axis(node), tuple(widest.reshape(-1).tolist()))
        found[weight] = _widest(weight, found.get(weight, ranges), ranges)
    return found


def weight_layers(program: Any) -> tuple[str, ...]:
    """Name the layers of a *float* ONNX model that `narrow_ranges` can take: those with a constant weight matrix."""
    from onnx import TensorProto

    ranks = {
        tensor.name: len(tensor.dims)
        for tensor in program.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
    }
    return tuple(
        node.name
        for node in map(parse, program.graph.node)
        if node.op_type in LAYER_TYPES and (node.op_type == "Conv" or ranks.get(node.inputs[1]) == 2)
        if node.inputs[1] in ranks
    )


def _widest(weight: str, first: WeightRanges, second: WeightRanges) -> WeightRanges:
    if first.axis != second.axis or len(first.magnitudes) != len(second.magnitudes):
        raise UnsupportedError(f"narrow_ranges: weight {weight!r} is shared by layers along different axes")
    return WeightRanges(first.axis, tuple(map(max, first.magnitudes, second.magnitudes)))


class _Ratio:
    """Signal to noise, added up over samples."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, exact: np.ndarray, found: np.ndarray) -> None:
        import numpy as np

        wide = exact.astype(np.float64)
        self.signal += float((wide**2).sum())
        self.noise += float(((wide - found.astype(np.float64)) ** 2).sum())

    def db(self) -> float:
        if self.noise == 0:
            return CEILING_DB
        return min(CEILING_DB, 10 * math.log10(self.signal / self.noise)) if self.signal else -CEILING_DB


class _Tally:
    """What one layer does over the samples."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        ways = orders(layer.matrix, layer.channels) if layer.is_paired else ()
        self.worst_sum = max(map(worst_sum, ways), default=0)
        self.can_saturate = any(map(can_saturate, ways))
        self.pair_sums = self.clipped = 0
        self.ratio = _Ratio()

    def result(self) -> LayerSaturation:
        layer = self.layer
        return LayerSaturation(
            layer.name,
            layer.op_type,
            self.worst_sum,
            self.can_saturate,
            self.pair_sums,
            self.clipped,
            self.ratio.db(),
        )


def _observe(
    tallies: Mapping[str, _Tally], layer: Layer, rows: np.ndarray, sums: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """Note what saturation would do to a layer whose inputs are exact, and let it give its exact sums."""
    tally = tallies.get(layer.name)
    if tally is None:
        return sums
    lost = excess(rows, layer.matrix)
    tally.pair_sums += rows.shape[0] * rows.shape[1] * math.ceil(rows.shape[2] / 2) * sums.shape[2]
    tally.clipped += lost.clipped
    tally.ratio.add(*(_rounded(layer, values, scale) for values in (sums, sums - lost.sums)))
    return sums


def _saturate(
    tallies: Mapping[str, _Tally], layer: Layer, rows: np.ndarray, sums: np.ndarray, _scale: np.ndarray
) -> np.ndarray:
    import numpy as np

    return np.asarray(sums - excess(rows, layer.matrix).sums) if layer.name in tallies else sums


def _rounded(layer: Layer, sums: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """A layer's output as the next layer sees it, relative to its zero point."""
    import numpy as np

    value = Accumulated(sums, scale)
    if layer.grid is None or layer.grid.scale.size != 1:
        return value.real()
    return np.asarray(quantize(value, layer.grid).astype(np.int32) - layer.grid.zero_point.reshape(()))


def _session(model: Model) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.program.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]

    def run(sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, dict(sample)), strict=True))

    return run
