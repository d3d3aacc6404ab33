# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates of an ONNX operator.

Counted is what multiplies by weights or multiplies matrices; everything else is 0, as in published figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from edgeopt_profiles.operators import Tensor

Tensors = Sequence[Tensor]


def macs(node: Any, inputs: Tensors, outputs: Tensors) -> int:
    """Count for one run with these (static) shapes; 0 for operators that have none."""
    count = _COUNTS.get(node.op_type)
    return 0 if count is None or not outputs else count(node, inputs, outputs)


def _convolution(_: Any, inputs: Tensors, outputs: Tensors) -> int:
    return prod(outputs[0].shape) * prod(inputs[1].shape[1:])  # weights (out, in / group, ...)


def _quantized_convolution(_: Any, inputs: Tensors, outputs: Tensors) -> int:
    return prod(outputs[0].shape) * prod(inputs[3].shape[1:])  # x, scale, zero point, weights


def _transposed_convolution(_: Any, inputs: Tensors, __: Tensors) -> int:
    return prod(inputs[0].shape) * prod(inputs[1].shape[1:])  # weights (in, out / group, ...)


def _product(_: Any, inputs: Tensors, outputs: Tensors) -> int:
    return prod(outputs[0].shape) * (inputs[0].shape[-1] if inputs[0].shape else 1)


def _gemm(node: Any, inputs: Tensors, outputs: Tensors) -> int:
    is_transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return prod(outputs[0].shape) * inputs[0].shape[0 if is_transposed else 1]


def _einsum(node: Any, inputs: Tensors, _: Tensors) -> int:
    if len(inputs) < 2:
        return 0
    equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation")
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if any("." in term for term in terms):
        return max(prod(tensor.shape) for tensor in inputs)
    sizes = {
        letter: size
        for term, tensor in zip(terms, inputs, strict=True)
        for letter, size in zip(term, tensor.shape, strict=True)
    }
    return prod(sizes.values())


def _recurrent(_: Any, inputs: Tensors, __: Tensors) -> int:
    steps_and_batch = prod(inputs[0].shape[:2])  # x (time, batch, in) or batch first
    return steps_and_batch * (prod(inputs[1].shape) + prod(inputs[2].shape))


_COUNTS: dict[str, Callable[[Any, Tensors, Tensors], int]] = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "QLinearConv": _quantized_convolution,
    "ConvTranspose": _transposed_convolution,
    "MatMul": _product,
    "MatMulInteger": _product,
    "QLinearMatMul": _product,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}
