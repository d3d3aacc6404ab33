# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates of the products that ONNX Runtime writes into an optimized graph.

Standard operators are counted by `edgeopt_converters.onnx_macs`; here are ONNX Runtime's own, and what layout changes:
its channels may stand last, or be padded to a multiple of its block, so that convolutions are counted by their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from edgeopt.coverage._optimized import FLOAT_PRODUCTS, Values
from edgeopt_converters.onnx_macs import macs as standard_macs
from edgeopt_profiles.operators import Tensor

NOT_PRODUCTS = ("QLinearAdd", "QLinearMul")
_PRODUCTS = FLOAT_PRODUCTS | {
    "QLinearConv", "QLinearConvTranspose", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "QMoE", "MatMulNBits", "MatMulBnb4",
}  # fmt: skip
_WEIGHTS_AT = {"QLinearConv": 3, "QLinearConvTranspose": 3, "QLinearMatMul": 3, "QGemm": 3}
_CONVOLUTIONS = ("Conv", "FusedConv", "QLinearConv", "ConvInteger")
_CHANNELS_LAST = "channels_last"


def is_product(op_type: str) -> bool:
    """Whether operators of this type are convolutions or matrix products."""
    return op_type in _PRODUCTS


def count(node: Any, values: Values, source: Sequence[int] | None) -> int | None:
    """Count for one run; None where a shape is unknown. `source` are the dimensions of the file's own weights."""
    output = values.get(next(iter(node.output), ""))
    shapes = [values[name][0] if name in values else None for name in node.input]
    if output is None:
        return None
    if node.op_type in _CONVOLUTIONS:
        weights = source or _at(shapes, _WEIGHTS_AT.get(node.op_type, 1))
        return None if weights is None else _convolution(node, output[0], weights)
    counted = _COUNTS.get(node.op_type)
    if counted is not None:
        return counted(node, shapes, output[0])
    if any(shape is None for shape, name in zip(shapes, node.input, strict=True) if name):
        return None
    tensors = [Tensor(name, *values[name]) for name in node.input if name]
    return standard_macs(node, tensors, [Tensor(node.output[0], *output)])


def _convolution(node: Any, output: Sequence[int], weights: Sequence[int]) -> int:
    """Output pixels times weights: however channels are laid out or padded, each weight is used once for a pixel."""
    is_last = any(entry.name == _CHANNELS_LAST and entry.i for entry in node.attribute)
    pixels = prod(output[1:-1]) if is_last else prod(output[2:])
    return output[0] * pixels * prod(weights)


def _product(node: Any, shapes: Sequence[Sequence[int] | None], output: Sequence[int]) -> int | None:
    first = shapes[0]
    if not first:
        return None
    is_transposed = any(entry.name == "transA" and entry.i for entry in node.attribute)
    return prod(output) * (first[-2] if is_transposed else first[-1])


def _transposed_convolution(_: Any, shapes: Sequence[Sequence[int] | None], __: Sequence[int]) -> int | None:
    first, weights = shapes[0], _at(shapes, 3)
    return None if first is None or weights is None else prod(first) * prod(weights[1:])


def _recurrent(_: Any, shapes: Sequence[Sequence[int] | None], __: Sequence[int]) -> int | None:
    first, weights, recurrence = (_at(shapes, position) for position in range(3))
    if first is None or weights is None or recurrence is None:
        return None
    return prod(first[:2]) * (prod(weights) + prod(recurrence))


def _attention(_: Any, shapes: Sequence[Sequence[int] | None], output: Sequence[int]) -> int | None:
    """The three projections at once, then scores and their sum: two products of (sequence, sequence, hidden)."""
    first, weights = shapes[0], _at(shapes, 1)
    if first is None or weights is None or len(first) != 3:
        return None
    return prod(first[:2]) * prod(weights) + 2 * prod(output) * first[1]


def _at(shapes: Sequence[Sequence[int] | None], position: int) -> Sequence[int] | None:
    return shapes[position] if position < len(shapes) else None


_Count = Callable[[Any, Sequence[Sequence[int] | None], Sequence[int]], int | None]
_COUNTS: Mapping[str, _Count] = {
    "QLinearConvTranspose": _transposed_convolution,
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), _recurrent),
    **dict.fromkeys(("Attention", "QAttention"), _attention),
    **dict.fromkeys(
        (
            "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat",
            "DynamicQuantizeMatMul", "MatMulNBits", "MatMulBnb4",
        ),
        _product,
    ),
}  # fmt: skip
