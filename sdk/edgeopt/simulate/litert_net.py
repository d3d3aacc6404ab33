# SPDX-License-Identifier: Apache-2.0
"""What a LiteRT file in int8 gives on a CPU, computed in numpy: every 8-bit tensor, by name.

Sources: the LiteRT 8-bit quantization specification; XNNPACK, which runs nearly all of it (`src/operators/convolution-nhwc.c`:
one float32 multiplier a channel, input scale times weight scale over output scale; `src/xnnpack/requantization.h` and the
"fp32" microkernels: the sum as float32 times that, rounded half to even, clamped). Products and pooled sums are exact;
element-wise kernels of XNNPACK multiply in fixed point and differ from the float arithmetic here by at most one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.simulate.integer import Prediction
from edgeopt.simulate.litert_operators import table
from edgeopt.simulate.litert_values import Call
from edgeopt.simulate.values import Grid, Quantized, Value, real
from edgeopt_converters.litert_file import dtype_name, parse
from edgeopt_converters.litert_graph import operators
from edgeopt_wire.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

_EIGHT_BITS = ("int8", "uint8")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its name, element type, shape, grid if it is quantized, and values if it is constant."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    grid: Grid | None
    constant: np.ndarray | None

    @property
    def value(self) -> Value:
        """The constant, on its grid where it has one."""
        if self.constant is None or self.grid is None:
            return self.constant
        return Quantized(self.constant, self.grid)


@dataclass(frozen=True)
class _Step:
    """An operator: its type, its options, and the numbers of its tensors."""

    type: str
    options: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class LitertNet:
    """An int8 LiteRT file that can be run in numpy; `tensors` names its 8-bit activations in their order."""

    def __init__(self, program: bytes) -> None:
        """Read the first subgraph of a file.

        Raises:
            RecipeError: No LiteRT file.
            UnsupportedError: It has operators or types that are not simulated; all operators are named.
        """
        model = parse(program)
        graph = model.subgraphs[0]
        self._tensors = tuple(_read(model, tensor) for tensor in graph.tensors)
        self._inputs = tuple(int(index) for index in graph.inputs)
        self._outputs = tuple(int(index) for index in graph.outputs)
        kinds = [operator.type for operator in operators(program)]
        self._operators = table()
        self._steps = tuple(
            _Step(
                kind,
                entry.builtinOptions,
                tuple(int(index) for index in entry.inputs),
                tuple(int(index) for index in entry.outputs),
            )
            for kind, entry in zip(kinds, graph.operators, strict=True)
        )
        unknown = sorted({step.type for step in self._steps} - self._operators.keys())
        if unknown:
            raise UnsupportedError(
                f"simulation: these LiteRT operators are not simulated: {', '.join(unknown)}; "
                "leave the parts of the model that hold them out, or judge it by running it"
            )

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the tensors that a run is given."""
        return tuple(self._tensors[index].shape for index in self._inputs)

    @property
    def input_dtypes(self) -> tuple[str, ...]:
        """The element types of the tensors that a run is given."""
        return tuple(self._tensors[index].dtype for index in self._inputs)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors that a run is given."""
        return tuple(self._tensors[index].name for index in self._inputs)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The 8-bit activations that operators compute, by name."""
        made = (self._tensors[index] for step in self._steps for index in step.outputs)
        return tuple(tensor.name for tensor in made if tensor.dtype in _EIGHT_BITS)

    def run(self, inputs: Mapping[str, np.ndarray]) -> Prediction:
        """Run one input; quantized inputs are given, and quantized outputs come, as their integers.

        Raises:
            RecipeError: An input is missing.
        """
        missing = [name for name in self.inputs if name not in inputs]
        if missing:
            raise RecipeError(
                f"simulation: the model wants the inputs {', '.join(self.inputs)}; missing {missing}"
            )
        values: dict[int, Value] = {-1: None}
        for index, tensor in enumerate(self._tensors):
            if tensor.constant is not None:
                values[index] = tensor.value
        for index in self._inputs:
            tensor = self._tensors[index]
            given = inputs[tensor.name]
            values[index] = Quantized(given, tensor.grid) if tensor.grid is not None else given
        for step in self._steps:
            found = self._operators[step.type](self._call(step), [values[index] for index in step.inputs])
            values.update(zip(step.outputs, found, strict=True))
        integers = {
            tensor.name: values[index].integers
            for index, tensor in enumerate(self._tensors)
            if tensor.constant is None and isinstance(values.get(index), Quantized)
        }
        outputs = {self._tensors[index].name: _bare(values[index]) for index in self._outputs}
        return Prediction(outputs, integers)

    def _call(self, step: _Step) -> Call:
        made = [self._tensors[index] for index in step.outputs]
        return Call(
            made[0].name,
            step.type,
            step.options,
            tuple(tensor.shape for tensor in made),
            tuple(tensor.grid if tensor.dtype in _EIGHT_BITS else None for tensor in made),
        )


def _bare(value: Value) -> np.ndarray:
    return value.integers if isinstance(value, Quantized) else real(value)


def _read(model: Any, tensor: Any) -> _Tensor:
    import numpy as np

    name = tensor.name.decode() if isinstance(tensor.name, bytes) else tensor.name or ""
    shape = () if tensor.shape is None else tuple(int(size) for size in tensor.shape)
    dtype = dtype_name(tensor)
    grid = _grid(tensor, dtype)
    data = model.buffers[tensor.buffer].data
    if data is None or len(data) == 0:
        return _Tensor(name, dtype, shape, grid, None)
    if dtype not in ("int8", "uint8", "int32", "int64", "float32", "bool"):
        raise UnsupportedError(f"simulation: the constant {name!r} is {dtype}, which is not simulated")
    constant = np.frombuffer(bytes(data), np.dtype(dtype)).reshape(shape)
    return _Tensor(name, dtype, shape, grid, constant)


def _grid(tensor: Any, dtype: str) -> Grid | None:
    import numpy as np

    found = tensor.quantization
    if dtype not in (*_EIGHT_BITS, "int32") or found is None or found.scale is None or len(found.scale) == 0:
        return None
    scale = np.asarray(found.scale, np.float32)
    zeros = (
        np.zeros(scale.shape, np.int32) if found.zeroPoint is None else np.asarray(found.zeroPoint, np.int32)
    )
    return Grid(np.dtype(dtype), scale, np.broadcast_to(zeros, scale.shape), int(found.quantizedDimension))
