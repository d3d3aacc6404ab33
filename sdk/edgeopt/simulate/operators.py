# SPDX-License-Identifier: Apache-2.0
"""The operators of the integer simulation, each a function of an ONNX node and its values.

Rules:
- What only moves entries moves integers and keeps their grid (ONNX Runtime drops Q and DQ around it).
- Sums of products stay exact sums until a QuantizeLinear rounds them.
- Everything else is float32 arithmetic on dequantized values: ONNX Runtime's integer kernels for it (`QLinearSigmoid`,
  ...) differ from that at ties of rounding, by 1.
- An operator that is in no table here is refused by name, never guessed.

Why `onnx.reference` for the plain ones? It is the standard's own definition, in numpy, and it follows the opset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgeopt.simulate import sums
from edgeopt.simulate.layers import Node
from edgeopt.simulate.values import Accumulated, Added, Quantized, Shares, Value, real
from edgeopt_wire.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np

_MOVES = """
DepthToSpace Expand Flatten Gather GatherElements Identity Reshape Slice SpaceToDepth Split Squeeze
Tile Transpose Unsqueeze
"""
MOVES = frozenset(_MOVES.split())
"""Operators whose first input's entries come out unchanged."""

_PLAIN = """
Abs Add And ArgMax ArgMin BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape ConvTranspose Cos Div
Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish
InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Max Mean Min Mish
Mul Neg Not Or PRelu Pad Pow Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
Relu Round Selu Shape Sigmoid Sign Sin Size Softplus Softsign Sqrt Sub Sum Tanh
ThresholdedRelu Where
"""
PLAIN = frozenset(_PLAIN.split())
"""Operators that are computed on float32 values, or on shapes."""

Operator = Callable[[Node, Sequence[Value]], tuple[Value, ...]]


def global_average_pool(_node: Node, values: Sequence[Value]) -> tuple[Value, ...]:
    """Sum integers over the image; the mean is rounded once."""
    import numpy as np

    (value,) = values
    axes = tuple(range(2, np.ndim(real(value)) if not isinstance(value, Quantized) else value.integers.ndim))
    if not isinstance(value, Quantized) or value.grid.scale.size != 1:
        return (real(value).mean(axes, np.float64, keepdims=True).astype(np.float32),)
    centred = value.integers.astype(np.int64) - int(value.grid.zero_point.reshape(()))
    count = int(np.prod(value.integers.shape[2:]))
    scale = np.asarray(value.grid.scale.reshape(()) / np.float32(count), np.float32)
    return (Accumulated(centred.sum(axes, keepdims=True), scale),)


def average_pool(node: Node, values: Sequence[Value]) -> tuple[Value, ...]:
    """Average what each window sees, padding counted only if the node says so."""
    import numpy as np

    image = real(values[0])
    window = sums.window_of(node.attributes, tuple(node.attributes["kernel_shape"]), image.shape[2:])
    counts = np.ones((1, 1, *image.shape[2:]), np.float64)
    if node.attributes.get("count_include_pad", 0):
        if node.attributes.get("ceil_mode", 0):
            raise UnsupportedError(
                f"simulation: AveragePool {node.name!r} counts padding and rounds its output size up; "
                "ONNX Runtime's releases disagree on what it divides by"
            )
        counted = window.pad(counts, 1.0)
    else:
        counted = window.pad(counts, 0.0)
    padded = window.pad(image.astype(np.float64), 0.0)
    total, seen = sum(window.views(padded)), sum(window.views(counted))
    return (np.asarray(total / seen, np.float32),)


def add(opsets: Sequence[object]) -> Operator:
    """Add; a sum of two 8-bit tensors is rounded in its own way (`Added`)."""
    plain = reference("Add", opsets)

    def run(node: Node, values: Sequence[Value]) -> tuple[Value, ...]:
        first, second = values
        if is_single(first) and is_single(second) and first.integers.dtype == second.integers.dtype:
            return (Added(first, second),)
        return plain(node, values)

    return run


def is_single(value: Value) -> bool:
    """Whether a value is 8-bit integers with one scale."""
    return isinstance(value, Quantized) and value.grid.scale.size == 1 and value.integers.dtype.itemsize == 1


def max_pool(node: Node, values: Sequence[Value]) -> tuple[Value, ...]:
    """Take the largest that each window sees: integers stay integers."""
    import numpy as np

    value = values[0]
    if len(node.outputs) > 1:
        raise UnsupportedError(f"simulation: MaxPool {node.name!r} gives indices, which is not simulated")
    image = value.integers if isinstance(value, Quantized) else real(value)
    window = sums.window_of(node.attributes, tuple(node.attributes["kernel_shape"]), image.shape[2:])
    lowest = np.iinfo(image.dtype).min if image.dtype.kind in "iu" else -np.inf
    largest: np.ndarray | None = None
    for view in window.views(window.pad(image, lowest)):
        largest = view.copy() if largest is None else np.maximum(largest, view, out=largest)
    return (Quantized(_array(largest), value.grid) if isinstance(value, Quantized) else largest,)


def softmax(opsets: Sequence[object]) -> Operator:
    """Share 1 out; what an integer input gives is rounded in its own way (`Shares`)."""
    plain = reference("Softmax", opsets)

    def run(node: Node, values: Sequence[Value]) -> tuple[Value, ...]:
        (found,) = plain(node, values)
        return (Shares(found) if isinstance(values[0], Quantized) else found,)

    return run


def resize(opsets: Sequence[object]) -> Operator:
    """Repeat entries (nearest); other modes round integers in ways of their own and are refused on them."""
    move = moved("Resize", opsets)

    def run(node: Node, values: Sequence[Value]) -> tuple[Value, ...]:
        mode = node.attributes.get("mode", b"nearest")
        if isinstance(values[0], Quantized) and mode != b"nearest":
            raise UnsupportedError(
                f"simulation: Resize {node.name!r} interpolates ({mode.decode()}) integers, which is not simulated"
            )
        return move(node, values)

    return run


def moved(op_type: str, opsets: Sequence[object]) -> Operator:
    """Run an operator on the integers of its first input, and give its outputs that input's grid."""
    plain = reference(op_type, opsets)

    def run(node: Node, values: Sequence[Value]) -> tuple[Value, ...]:
        first = values[0]
        if not isinstance(first, Quantized) or first.grid.scale.size != 1:
            return plain(node, values)
        outputs = plain(node, [first.integers, *values[1:]])
        return tuple(Quantized(output, first.grid) for output in outputs)

    return run


def reference(op_type: str, opsets: Sequence[object]) -> Operator:
    """Run an operator as ONNX's reference implementation defines it, in the type of its inputs."""
    from onnx import TypeProto, helper
    from onnx.reference import ReferenceEvaluator

    evaluators: dict[str, ReferenceEvaluator] = {}

    def run(node: Node, values: Sequence[Value]) -> tuple[Value, ...]:
        key = node.outputs[0]
        if key not in evaluators:
            inputs = [
                helper.make_value_info(name, TypeProto()) for name in dict.fromkeys(node.inputs) if name
            ]
            outputs = [helper.make_value_info(name, TypeProto()) for name in node.outputs if name]
            graph = helper.make_graph([node.proto], op_type, inputs, outputs)
            evaluators[key] = ReferenceEvaluator(helper.make_model(graph, opset_imports=list(opsets)))
        feeds = {name: real(value) for name, value in zip(node.inputs, values, strict=True) if name}
        found = iter(evaluators[key].run(None, feeds))
        return tuple(next(found) if name else None for name in node.outputs)

    return run


def table(opsets: Sequence[object]) -> dict[str, Operator]:
    """All operators but those that multiply weights, by ONNX name; opsets as the model imports them."""
    found: dict[str, Operator] = {name: reference(name, opsets) for name in PLAIN}
    found |= {name: moved(name, opsets) for name in MOVES}
    found |= {
        "Add": add(opsets),
        "GlobalAveragePool": global_average_pool,
        "AveragePool": average_pool,
        "MaxPool": max_pool,
        "Resize": resize(opsets),
        "Softmax": softmax(opsets),
    }
    return found


def _array(values: np.ndarray | None) -> np.ndarray:
    import numpy as np

    return np.asarray(values)
