# SPDX-License-Identifier: Apache-2.0
"""Round convolution and matrix weights to the int8 grid so that the layer's output changes least.

Nearest rounding is best for each weight alone and bad for their sum. Here each column of a layer's weights is rounded
in turn and its error is spread over the columns that are still free, weighted by the second moments of the layer's
inputs (GPTQ: Frantar et al. 2022, from Optimal Brain Surgeon; for convolutions the inputs are their patches, and
every channel of a depthwise layer has a small problem of its own). What is left of the mean error goes into the bias
(Nagel et al. 2019, section 4.2).

Rules:
- The grid is the one that native quantizers find again: per output channel, symmetric, scale = max|w| / 127. The
  largest weight of a channel is pinned, so that they find the same scale and thus the very same integers.
- Weights stay floats that lie on that grid: decided once, lowered everywhere.
- Memory is bounded: a layer's second moments, one sample's activations, and at most `positions` patches of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_graphs import fold, observer
from edgeopt.onnx_products import attributes
from edgeopt.onnx_select import select
from edgeopt.passes import Order, Result
from edgeopt.simulate.pairs import every_partner
from edgeopt.simulate.safe_rounding import GRID, row_ranges
from edgeopt.weights.feedback import round_with_feedback
from edgeopt_converters.model import Model
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("onnx",)
EXTRA = "onnx"

ROUNDED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Options:
    """How much is looked at.

    `samples`: 48 photos give up to 12,000 patches a layer, enough for the second moments. `positions` are the patches
    of one sample that enter the moments of one layer, evenly spread. `damping` is the share of the mean diagonal that
    is added to it, as in GPTQ: it keeps channels that never fire from breaking the inverse. `pair_safe` chooses
    integers that no x86 CPU overflows (`edgeopt.simulate.pairs`); the quantizer must then use
    `edgeopt.simulate.saturation.narrow_ranges`, so it is for ONNX only.
    """

    samples: int = 48
    positions: int = 256
    damping: float = 0.01
    pair_safe: bool = False

    @classmethod
    def of(cls, given: object) -> Options:
        """The options of an order, or the defaults."""
        return given if isinstance(given, cls) else cls()

    def __post_init__(self) -> None:
        if self.samples < 1 or self.positions < 1 or self.damping <= 0:
            raise ValueError(f"round_weights: samples, positions and damping must be positive, found {self}")


@dataclass
class _Layer:
    """One weight tensor: `groups` problems, each of (outputs, inputs) weights over the same patches."""

    node: Any
    weight: str
    bias: str
    groups: int
    moments: np.ndarray  # (groups, inputs, inputs), sums of x x^T
    means: np.ndarray  # (groups, inputs), sums of x
    count: int = 0
    attributes: Mapping[str, Any] = field(default_factory=dict)


def apply(model: Model, order: Order) -> Result:
    """Round the weights of every Conv, Gemm and MatMul whose weight is a constant of its own.

    `order.exclude` names operators or types that stay as they are; the notes name every layer that was left out.

    Raises:
        RecipeError: There are no calibration samples.
    """
    import onnx

    program = fold(model.program)
    constants = {tensor.name: tensor for tensor in program.graph.initializer}
    uses = Counter(name for node in program.graph.node for name in node.input)
    options = order.options if isinstance(order.options, Options) else Options()
    layers: list[_Layer] = []
    left: list[str] = []
    excluded = select(program, order.exclude)
    for node in program.graph.node:
        if node.op_type in ROUNDED and len(node.input) > 1 and node.input[1] in constants:
            reason = _why_not(node, constants, uses, excluded)
            if reason:
                left.append(f"{node.name} ({reason})")
            else:
                layers.append(_layer(node, constants, uses))
    _gather(program, layers, order, options)
    for layer in layers:
        weight = onnx.numpy_helper.to_array(constants[layer.weight])
        rounded, shift = _round(layer, weight, options.damping, options.pair_safe)
        constants[layer.weight].CopyFrom(onnx.numpy_helper.from_array(rounded, layer.weight))
        if layer.bias:
            bias = onnx.numpy_helper.to_array(constants[layer.bias])
            constants[layer.bias].CopyFrom(
                onnx.numpy_helper.from_array((bias + shift).astype(bias.dtype), layer.bias)
            )
    notes = [f"weights of {len(layers)} layers rounded by second moments"]
    if left:
        notes.append(f"weights rounded to nearest by the quantizer: {', '.join(left)}")
    return Result(replace(model, program=program), tuple(notes))


def walks(order: Order, available: int) -> int:
    """How many samples `apply` walks over, for progress."""
    options = order.options if isinstance(order.options, Options) else Options()
    return min(options.samples, available)


def _why_not(
    node: Any, constants: Mapping[str, Any], uses: Mapping[str, int], excluded: frozenset[str]
) -> str:
    """Why a layer is left to the quantizer's own rounding, or nothing."""
    import onnx

    tensor = constants[node.input[1]]
    given = attributes(node)
    if node.name in excluded:
        return "excluded by the recipe"
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return "not float32"
    if uses[node.input[1]] > 1:
        return "shares its weight with another layer"
    if node.op_type == "Conv":
        if len(tensor.dims) != 4 or given.get("auto_pad", b"NOTSET") not in (b"NOTSET", "NOTSET"):
            return "not a plain 2-D convolution"
    elif len(tensor.dims) != 2 or given.get("transA", 0) or given.get("alpha", 1.0) != 1.0:
        return "not a plain matrix product"
    return ""


def _layer(node: Any, constants: Mapping[str, Any], uses: Mapping[str, int]) -> _Layer:
    import numpy as np

    given = attributes(node)
    shape = tuple(constants[node.input[1]].dims)
    groups = int(given.get("group", 1)) if node.op_type == "Conv" else 1
    if node.op_type == "Conv":
        inputs = int(np.prod(shape[1:]))
    else:
        inputs = shape[1] if given.get("transB", 0) else shape[0]
    bias = node.input[2] if len(node.input) > 2 else ""
    if bias not in constants or uses[bias] > 1 or given.get("beta", 1.0) != 1.0:
        bias = ""  # a bias that something else uses too, or that is scaled, is not corrected
    return _Layer(
        node,
        node.input[1],
        bias,
        groups,
        np.zeros((groups, inputs, inputs)),
        np.zeros((groups, inputs)),
        attributes=given,
    )


def _gather(program: Any, layers: list[_Layer], order: Order, options: Options) -> None:
    """Sum the second moments and means of every layer's input patches over the samples."""
    import numpy as np

    wanted: dict[str, list[_Layer]] = {}
    for layer in layers:
        wanted.setdefault(layer.node.input[0], []).append(layer)
    observe = observer(program, frozenset(wanted))
    shapes = {tensor.name: tuple(tensor.dims) for tensor in program.graph.initializer}
    seen = 0
    for sample in _first(order.samples, options.samples):
        seen += 1
        for name, values in observe(sample):
            for layer in wanted.get(name, ()):
                patches = _patches(layer, values, shapes[layer.weight], options.positions)
                layer.moments += (
                    patches.swapaxes(1, 2) @ patches
                )  # float32 within a sample, float64 over them
                layer.means += patches.sum(1, dtype=np.float64)
                layer.count += patches.shape[1]
        order.on_sample()
    if seen == 0:
        raise RecipeError("round_weights needs calibration samples; give --calibration DATA")


def _first(samples: Any, count: int) -> Iterator[Mapping[str, np.ndarray]]:
    for number, sample in enumerate(samples):
        if number == count:
            return
        yield sample


def _patches(layer: _Layer, values: np.ndarray, shape: tuple[int, ...], positions: int) -> np.ndarray:
    """The layer's input as (groups, positions, inputs), at most `positions` evenly spread ones."""
    import numpy as np

    if layer.node.op_type != "Conv":
        flat = values.reshape(-1, values.shape[-1])
        few: np.ndarray = flat[_spread(len(flat), positions)][None]
        return few
    kernel = shape[2:]
    strides = layer.attributes.get("strides", [1, 1])
    dilations = layer.attributes.get("dilations", [1, 1])
    top, left, bottom, right = layer.attributes.get("pads", [0, 0, 0, 0])
    padded = np.pad(values[0], ((0, 0), (top, bottom), (left, right)))
    span = [dilation * (size - 1) + 1 for dilation, size in zip(dilations, kernel, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, span, axis=(1, 2))
    windows = windows[:, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    channels, height, width = windows.shape[:3]
    chosen = _spread(height * width, positions)
    rows = windows[:, chosen // width, chosen % width]  # (channels, positions, kernel, kernel)
    grouped = rows.reshape(layer.groups, channels // layer.groups, len(chosen), -1)
    return grouped.transpose(0, 2, 1, 3).reshape(layer.groups, len(chosen), -1)


def _spread(count: int, positions: int) -> np.ndarray:
    import numpy as np

    return np.unique(np.linspace(0, count - 1, min(count, positions)).astype(np.int64))


def _round(
    layer: _Layer, weight: np.ndarray, damping: float, is_pair_safe: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounded weight tensor and what the bias must gain, per output channel."""
    import numpy as np

    matrix = _as_rows(layer, weight)  # (groups, outputs, inputs)
    partner = _partner(layer, weight.shape) if is_pair_safe else np.full(matrix.shape[2], -1)
    largest = row_ranges(matrix, partner)
    scale = np.where(largest > 0, largest / GRID, 1.0)
    rounded = round_with_feedback(matrix / scale, layer.moments, damping, partner) * scale
    mean = layer.means / max(layer.count, 1)
    shift = np.einsum("goi,gi->go", matrix - rounded, mean).reshape(-1)
    return _from_rows(layer, rounded, weight), shift


def _as_rows(layer: _Layer, weight: np.ndarray) -> np.ndarray:
    import numpy as np

    wide = weight.astype(np.float64)
    if layer.node.op_type != "Conv":
        return wide[None] if layer.attributes.get("transB", 0) else wide.T[None]
    rows: np.ndarray = wide.reshape(layer.groups, wide.shape[0] // layer.groups, -1)
    return rows


def _from_rows(layer: _Layer, rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    import numpy as np

    if layer.node.op_type != "Conv":
        rows = rows[0] if layer.attributes.get("transB", 0) else rows[0].T
    return np.ascontiguousarray(rows.reshape(weight.shape).astype(weight.dtype))


def _partner(layer: _Layer, shape: tuple[int, ...]) -> np.ndarray:
    """Which weights each one is multiplied with in a pair, on CPUs that add pairs in 16 bits."""
    import numpy as np

    if layer.node.op_type != "Conv":
        return every_partner(layer.moments.shape[1], 1)
    positions = int(np.prod(shape[2:]))
    if shape[1] == 1 and shape[0] == layer.groups:
        return np.full(positions, -1)  # depthwise: one by one
    return every_partner(shape[1], positions)
