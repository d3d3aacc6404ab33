# SPDX-License-Identifier: Apache-2.0
"""A float model whose tensors can be quantized one by one, in one session, without building it again.

Every tensor that a quantizer would make integer gets a grid that is an input of the model: a step, a lowest and a
highest value. A grid so fine that float32 cannot tell is "off"; the same grid with finite ends clips and does not
round. Weights are inputs with defaults, so that a layer's can be exchanged for one run. What a run differs by from the
float model is then the error of exactly what was switched on (fake quantization: Jacob et al. 2018, section 3).

Which tensors those are is read off a quantized model of the same program, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt_wire.errors import RuntimeFailure

if TYPE_CHECKING:
    import numpy as np

FINE = 2.0**-30
"""A step that changes no value by more than 2^-31: below float32's own rounding for all that matters."""

_RAW, _STEP, _LOW, _HIGH = "edgeopt.raw.", "edgeopt.step.", "edgeopt.low.", "edgeopt.high."
_LAST = "_QuantizeLinear_Input"
"""What ONNX Runtime's quantizer calls an output of the model before its QuantizeLinear."""


@dataclass(frozen=True)
class Grid:
    """The values that a tensor can take: multiples of `step` from `low` to `high`, zero among them."""

    step: float
    low: float
    high: float

    @classmethod
    def of_range(cls, low: float, high: float, bits: int = 8, *, symmetric: bool = False) -> Grid:
        """The grid of `bits` bits over a range that holds zero; a range of nothing gives the grid of one step.

        Affine: 2^bits - 1 steps from low to high, moved so that zero is on it. Symmetric: 2^bits - 2 steps.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            return cls(1.0, 0.0, 0.0)
        if symmetric:
            largest = 2 ** (bits - 1) - 1
            step = max(-low, high) / largest
            return cls(step, -largest * step, largest * step)
        step = (high - low) / (2**bits - 1)
        zero_point = round(-low / step)
        return cls(step, -zero_point * step, (2**bits - 1 - zero_point) * step)

    @property
    def clip_only(self) -> Grid:
        """The same ends with no rounding between them."""
        return Grid(FINE, self.low, self.high)


OFF = Grid(FINE, float("-inf"), float("inf"))


@dataclass(frozen=True)
class Quantized:
    """What a quantized model did: a grid for every activation, the rounded values of every weight, by float name."""

    grids: Mapping[str, Grid]
    weights: Mapping[str, np.ndarray]


def read_quantized(program: Any) -> Quantized:
    """Read grids and weights off an ONNX model in QDQ form.

    Raises:
        RuntimeFailure: It holds no QuantizeLinear.
    """
    import numpy as np
    import onnx

    constants = {tensor.name: tensor for tensor in program.graph.initializer}
    grids: dict[str, Grid] = {}
    weights: dict[str, np.ndarray] = {}
    for node in program.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = onnx.numpy_helper.to_array(constants[node.input[1]]).astype(np.float64)
        zero = onnx.numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 else np.uint8(0)
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            kind = np.iinfo(zero.dtype)
            step, point = float(scale), int(zero)
            name = node.input[0].removesuffix(_LAST)
            grids[name] = Grid(step, (kind.min - point) * step, (kind.max - point) * step)
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
            values = onnx.numpy_helper.to_array(constants[node.input[0]]).astype(np.float64)
            shape = [1] * values.ndim
            if scale.ndim and scale.size > 1:
                shape[axis] = -1
            name = node.input[0].removesuffix("_quantized")
            weights[name] = ((values - zero.reshape(shape)) * scale.reshape(shape)).astype(np.float32)
    if not grids:
        raise RuntimeFailure("this ONNX model holds no QuantizeLinear; quantize it first")
    return Quantized(grids, weights)


class FakeQuantized:
    """One session over `program` (folded, float32) with a switch at every tensor in `tensors`.

    Weights in `weights` can be exchanged. Calling `run` again and again costs what the float model costs, about twice.
    """

    def __init__(self, program: Any, tensors: Iterable[str], weights: Iterable[str] = ()) -> None:
        import onnxruntime as ort

        self._tensors = tuple(sorted(set(tensors)))
        model = _switchable(program, frozenset(self._tensors), frozenset(weights))
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.log_severity_level = 3
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        grids: Mapping[str, Grid] | None = None,
        weights: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run one sample with these tensors on their grids and these weights exchanged; all else stays float."""
        import numpy as np

        feeds: dict[str, np.ndarray] = {**inputs, **(weights or {})}
        for name in self._tensors:
            grid = (grids or {}).get(name, OFF)
            feeds[_STEP + name] = np.asarray(grid.step, np.float32)
            feeds[_LOW + name] = np.asarray(grid.low, np.float32)
            feeds[_HIGH + name] = np.asarray(grid.high, np.float32)
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))


def _switchable(program: Any, tensors: frozenset[str], weights: frozenset[str]) -> Any:
    import onnx
    from onnx import TensorProto, helper

    model = onnx.ModelProto()
    model.CopyFrom(program)
    graph = model.graph
    edges = {value.name for value in graph.input}
    missing = tensors - {name for node in graph.node for name in node.output} - edges
    if missing:
        raise RuntimeFailure(f"the float model has no tensor {min(missing)!r} that the quantized one has")
    nodes = [switch for name in sorted(tensors & edges) for switch in _switch(name, _RAW + name)]
    for source in program.graph.node:
        nodes.extend(_switched(source, tensors, edges))
    del graph.node[:]
    graph.node.extend(nodes)
    for name in sorted(tensors):
        for prefix in (_STEP, _LOW, _HIGH):
            graph.input.append(helper.make_tensor_value_info(prefix + name, TensorProto.FLOAT, []))
    for tensor in graph.initializer:
        if tensor.name in weights and tensor.name not in edges:
            graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return model


def _switched(source: Any, tensors: frozenset[str], edges: set[str]) -> list[Any]:
    """A node that reads switched inputs of the model, with a switch behind each of its outputs that has one."""
    import onnx

    node = onnx.NodeProto()
    node.CopyFrom(source)
    for position, name in enumerate(source.input):
        if name in tensors and name in edges:
            node.input[position] = _RAW + name
    found = [node]
    for position, name in enumerate(source.output):
        if name in tensors:
            node.output[position] = _RAW + name
            found.extend(_switch(_RAW + name, name))
    return found


def _switch(source: str, target: str) -> list[Any]:
    """Clip(Round(x / step) * step, low, high)."""
    from onnx import helper

    name = target.removeprefix(_RAW)
    ratio, whole, back = (f"{target}/{part}" for part in ("ratio", "whole", "back"))
    return [
        helper.make_node("Div", [source, _STEP + name], [ratio]),
        helper.make_node("Round", [ratio], [whole]),
        helper.make_node("Mul", [whole, _STEP + name], [back]),
        helper.make_node("Clip", [back, _LOW + name, _HIGH + name], [target]),
    ]
