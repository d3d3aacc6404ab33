# SPDX-License-Identifier: Apache-2.0
"""Take the mean error out of an ONNX model's integers: what a layer is off by on average goes into its bias.

Rounded weights and clipped inputs shift the mean of a layer's output, and in small nets with depthwise convolutions the
shifts add up from layer to layer. They are constants per output channel, so a bias can hold them at no cost.

- `fast`: one walk. Every layer sees the float model's inputs once with its float and once with its integer weights; the
  difference of the means is added (`edgeopt.weights.shifts`: Nagel et al. 2019, section 4.2, with samples).
- `full`: layer after layer. A layer's output in the quantized model, whose earlier biases are already corrected, is
  compared with the float model's, so that shifts of activations and of earlier layers are corrected too (the same
  paper, appendix D, "empirical bias correction").

Rules:
- The model at hand is the quantized one (QDQ); the float model that it was made from comes with the order. Or it is a
  float one, and the order's scheme says what its weights will be rounded to (to nearest): then `fast` moves its float
  biases, so that every format that is made of it has them. Whether that helps, its quantized forms must tell.
- Only biases change, so neither size nor speed does. A layer without a bias gets one.
- The output's error of a quantized model is measured before and after, on samples that corrected nothing where there are
  `ENOUGH`. A correction that makes it larger is not kept, and the note says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_graphs import fold
from edgeopt.onnx_products import attributes
from edgeopt.onnx_select import select
from edgeopt.passes import Order, Result
from edgeopt.weights.nearest import nearest
from edgeopt.weights.shifts import LAYERS, add_to_biases, means, shifts
from edgeopt_converters.model import Model
from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("onnx",)
EXTRA = "onnx"

MODES = ("fast", "full")

ENOUGH = 32
"""Samples from which on a quarter of them judges and does not correct."""

_QUANTIZED = "_quantized"
"""What ONNX Runtime's quantizer appends to the name of a weight."""

_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Options:
    """`mode` is one of fast and full; `samples` are walked over once by fast, once a layer by full."""

    mode: str = "full"
    samples: int = 64

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(seam.unknown("bias correction mode", self.mode, MODES))
        if self.samples < 1:
            raise ValueError(f"correct_bias: samples must be positive, found {self.samples}")


@dataclass(frozen=True)
class _Layer:
    """A layer of the quantized model, and what its output is called in both models."""

    node: Any
    exact: str
    output: str


def apply(model: Model, order: Order) -> Result:
    """Correct the biases of every Conv and Gemm that has integer weights, or will have.

    `order.reference` is the float model that a quantized one was made from; without it the model at hand is the float
    one, and `order.scheme` says its grid. What `order.exclude` selects keeps its bias.

    Raises:
        RecipeError: No calibration samples, neither a float model nor a scheme, the model at hand is not quantized, or
            `order.exclude` selects nothing.
    """
    import onnx

    is_float = all(node.op_type != "DequantizeLinear" for node in model.program.graph.node)
    if order.reference is None and (order.scheme is None or not is_float):
        raise RecipeError(
            "correct_bias compares a quantized model with its float model, and none was given; "
            "it runs after quantize_static, or before it with the scheme that it will use"
        )
    options = order.options if isinstance(order.options, Options) else Options()
    samples = list(islice(order.samples, options.samples))
    if not samples:
        raise RecipeError("correct_bias needs calibration samples; give --calibration DATA")
    if order.reference is None:
        return _on_floats(model, order, samples)
    exact = fold(order.reference.program)
    program = onnx.ModelProto()
    program.CopyFrom(model.program)
    graph = _Graph(program)
    layers = graph.layers(exact, order.exclude)
    if not layers:
        raise RecipeError(
            "correct_bias found no layer with integer weights that the float model has too; "
            "give it what quantize_static made and the model that this was made from"
        )
    learning, judging = _parts(samples)
    correct = _fast if options.mode == "fast" else _full
    correct(graph, exact, layers, learning, _Ticks(order))
    for _ in judging if judging is not samples else ():
        order.on_sample()
    before, after = (_error_db(exact, found, judging) for found in (model.program, program))
    unseen = "" if judging is samples else " others"
    said = f"on {len(judging)}{unseen} samples: output {before:.1f} dB before, {after:.1f} dB after"
    if after < before:
        return Result(model, (f"{options.mode} bias correction not kept {said}",))
    return Result(
        replace(model, program=program),
        (f"biases of {len(layers)} layers corrected ({options.mode}) {said}",),
    )


def _parts(samples: list[Any]) -> tuple[list[Any], list[Any]]:
    """The samples that correct, and those that judge: the same where there are few."""
    if len(samples) < ENOUGH:
        return samples, samples
    return [s for n, s in enumerate(samples) if n % 4 != 3], samples[3::4]


def _on_floats(model: Model, order: Order, samples: Sequence[Mapping[str, np.ndarray]]) -> Result:
    """Move the biases of a float model by what rounding its weights to nearest will be off by."""
    program = fold(model.program)
    scheme = order.scheme
    assert scheme is not None  # for the type checker: `apply` has seen to it
    rounded = nearest(program, per_channel=scheme.per_channel, pair_safe=scheme.pair_safe, products=LAYERS)
    left = select(program, order.exclude)
    changed = {
        node.output[0]: rounded[node.input[1]]
        for node in program.graph.node
        if node.op_type in LAYERS
        and node.input[1] in rounded
        and node.name not in left
        and attributes(node).get("beta", 1.0) == 1.0
    }
    count = add_to_biases(program, shifts(program, changed, samples, order.on_sample)) if changed else 0
    note = f"float biases of {count} layers moved by the mean error of rounding their weights to nearest"
    return Result(replace(model, program=program), (note,))


def walks(order: Order, available: int) -> int:
    """How many samples `apply` walks over, for progress."""
    options = order.options if isinstance(order.options, Options) else Options()
    return min(options.samples, available)


class _Ticks:
    """Spread one walk's progress over as many walks as there are."""

    def __init__(self, order: Order) -> None:
        self._tell = order.on_sample
        self._done = 0

    def tick(self, walks: int) -> None:
        """One sample of one of `walks` walks is done."""
        self._done += 1
        if self._done % walks == 0:
            self._tell()


class _Graph:
    """The quantized model: its layers, and the int32 biases that change."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self._constants = {tensor.name: tensor for tensor in program.graph.initializer}
        self._writer = {name: node for node in program.graph.node for name in node.output}
        self._uses: dict[str, int] = {}
        for node in program.graph.node:
            for name in node.input:
                self._uses[name] = self._uses.get(name, 0) + 1

    def layers(self, exact: Any, exclude: tuple[str, ...]) -> list[_Layer]:
        """Layers with integer weights that the float model has too, in the order of the graph.

        They are found by their weights: the quantizer calls a layer's output as the ReLU that it fused into it.
        """
        known: dict[str, list[Any]] = {}
        for node in exact.graph.node:
            if node.op_type in LAYERS:
                known.setdefault(node.input[1], []).append(node)
        left = select(exact, exclude)
        found = []
        for node in self.program.graph.node:
            if node.op_type not in LAYERS or node.name in left:
                continue
            if not (self._is_integer(node, 1) and self._can_shift(node)):
                continue
            weight = self._writer[node.input[1]].input[0].removesuffix(_QUANTIZED)
            twins = known.get(weight, [])
            if len(twins) > 1:  # a weight that layers share
                twins = [twin for twin in twins if twin.name == node.name]
            if len(twins) == 1 and twins[0].op_type == node.op_type:
                found.append(_Layer(node, twins[0].output[0], node.output[0]))
        return found

    def weight(self, layer: _Layer) -> np.ndarray:
        """The weights that the integers stand for."""
        return self._real(layer.node.input[1])

    def shift(self, layer: _Layer, shift: np.ndarray) -> None:
        """Add `shift` (channels,) to the layer's bias, on the bias's own grid where it has one."""
        import numpy as np
        import onnx

        node = layer.node
        if len(node.input) < 3 or not node.input[2]:
            self._add_bias(node, len(shift))
        name = node.input[2]
        if name in self._constants:
            values = onnx.numpy_helper.to_array(self._constants[name])
            self._set(name, (values + shift).astype(values.dtype))
            return
        source, scale = self._writer[name].input[:2]
        values = onnx.numpy_helper.to_array(self._constants[source]).astype(np.int64)
        step = onnx.numpy_helper.to_array(self._constants[scale]).astype(np.float64).reshape(-1)
        moved = values + np.rint(shift / step).astype(np.int64)
        self._set(source, np.clip(moved, -_INT32, _INT32).astype(np.int32))

    def _add_bias(self, node: Any, channels: int) -> None:
        """Give a layer a bias of zeros on the grid that its accumulator has: input scale times weight scale."""
        import numpy as np
        import onnx

        steps = [self._scale(name) for name in node.input[:2]]
        scale = np.broadcast_to(steps[0] * steps[1], (channels,)).astype(np.float32)
        stem = f"{node.output[0]}_bias"
        for name, values in (
            (f"{stem}_quantized", np.zeros(channels, np.int32)),
            (f"{stem}_scale", np.ascontiguousarray(scale)),
        ):
            self.program.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
            self._constants[name] = self.program.graph.initializer[-1]
            self._uses[name] = 1
        restore = onnx.helper.make_node(
            "DequantizeLinear",
            [f"{stem}_quantized", f"{stem}_scale"],
            [stem],
            f"{stem}_DequantizeLinear",
            axis=0,
        )
        place = next(n for n, other in enumerate(self.program.graph.node) if other is node or other == node)
        while len(node.input) < 3:
            node.input.append("")
        node.input[2] = stem
        self.program.graph.node.insert(place, restore)
        self._writer[stem] = restore

    def _can_shift(self, node: Any) -> bool:
        """Whether the layer has a bias of its own, or can get one."""
        if len(node.input) < 3 or not node.input[2]:
            return self._is_integer(node, 0, constant=False)
        name = node.input[2]
        if name in self._constants:
            return self._uses[name] == 1
        writer = self._writer.get(name)
        return (
            writer is not None
            and writer.op_type == "DequantizeLinear"
            and writer.input[0] in self._constants
            and self._uses[name] == self._uses[writer.input[0]] == 1
        )

    def _is_integer(self, node: Any, position: int, *, constant: bool = True) -> bool:
        writer = self._writer.get(node.input[position])
        if writer is None or writer.op_type != "DequantizeLinear":
            return False
        return not constant or writer.input[0] in self._constants

    def _scale(self, name: str) -> np.ndarray:
        import numpy as np
        import onnx

        tensor = self._constants[self._writer[name].input[1]]
        found: np.ndarray = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        return found

    def _real(self, name: str) -> np.ndarray:
        import numpy as np
        import onnx

        writer = self._writer[name]
        values = onnx.numpy_helper.to_array(self._constants[writer.input[0]]).astype(np.float64)
        scale = self._scale(name)
        zero = np.zeros(1)
        if len(writer.input) > 2 and writer.input[2]:
            zero = onnx.numpy_helper.to_array(self._constants[writer.input[2]]).astype(np.float64)
        shape = [1] * values.ndim
        if scale.size > 1:
            shape[attributes(writer).get("axis", 1)] = -1
        real: np.ndarray = (
            values - zero.reshape(shape if zero.size > 1 else [1] * values.ndim)
        ) * scale.reshape(shape if scale.size > 1 else [1] * values.ndim)
        return real.astype(np.float32)

    def _set(self, name: str, values: np.ndarray) -> None:
        import onnx

        self._constants[name].CopyFrom(onnx.numpy_helper.from_array(values, name))


def _fast(
    graph: _Graph,
    exact: Any,
    layers: Sequence[_Layer],
    samples: Sequence[Mapping[str, np.ndarray]],
    ticks: _Ticks,
) -> None:
    """Compare every float layer with itself on integer weights, both on the float model's inputs."""
    changed = {layer.exact: graph.weight(layer) for layer in layers}
    found = shifts(exact, changed, samples, lambda: ticks.tick(1))
    for layer in layers:
        graph.shift(layer, found[layer.exact])


def _full(
    graph: _Graph,
    exact: Any,
    layers: Sequence[_Layer],
    samples: Sequence[Mapping[str, np.ndarray]],
    ticks: _Ticks,
) -> None:
    """Correct layer after layer, each against the quantized model as it is by then."""
    count = len(layers) + 1
    wanted = means(exact, frozenset(layer.exact for layer in layers), samples, lambda: ticks.tick(count))
    for layer in layers:
        until = _until(graph.program, layer.output)
        found = means(until, frozenset({layer.output}), samples, lambda: ticks.tick(count))
        graph.shift(layer, wanted[layer.exact] - found[layer.output])


def _until(program: Any, name: str) -> Any:
    """The part of a model that makes one tensor."""
    import onnx

    writer = {output: node for node in program.graph.node for output in node.output}
    needed, open_names = set(), [name]
    while open_names:
        now = open_names.pop()
        if now not in needed:
            needed.add(now)
            open_names.extend(writer[now].input if now in writer else ())
    part = onnx.ModelProto()
    part.CopyFrom(program)
    nodes = [node for node in program.graph.node if any(output in needed for output in node.output)]
    tensors = [tensor for tensor in program.graph.initializer if tensor.name in needed]
    for field, kept in ((part.graph.node, nodes), (part.graph.initializer, tensors)):
        del field[:]
        field.extend(kept)
    del part.graph.output[:]
    part.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return part


def _error_db(exact: Any, program: Any, samples: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Signal over noise of all outputs together, as ONNX Runtime runs the quantized model."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    pair = [
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for model in (exact, program)
    ]
    names = [output.name for output in exact.graph.output]
    signal = noise = 0.0
    for sample in samples:
        wanted, found = (session.run(names, dict(sample)) for session in pair)
        for one, other in zip(wanted, found, strict=True):
            signal += float(np.square(one, dtype=np.float64).sum())
            noise += float(np.square(one.astype(np.float64) - other).sum())
    return 10 * math.log10(signal / noise) if signal and noise else math.inf
