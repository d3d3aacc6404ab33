# SPDX-License-Identifier: Apache-2.0
"""Work: what of an operator decides about its time, counted without a device.

Kinds are what runtimes have kernels of their own for: a depthwise convolution reaches a third to a seventh of the
multiply-accumulates a second of a dense one. Elements, not bytes: what an element costs is the precision's coefficient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from edgeopt_profiles.operators import Operator

FEATURES = (
    "overhead",
    "operators",
    "stem",
    "dense",
    "pointwise",
    "depthwise",
    "product",
    "activations",
    "weights",
)
"""What a latency is a sum of: one inference, operators, multiply-accumulates by kind, elements read and written."""

KINDS = ("stem", "dense", "pointwise", "depthwise", "product", "elementwise")

FEW = 4
"""Channels of a photo: the first convolution reaches a fraction of what later ones do."""

_FREE = frozenset(
    {
        *("Relu", "Clip", "BatchNormalization", "QuantizeLinear", "DequantizeLinear", "Flatten", "Reshape"),
        *("Identity", "Dropout", "Squeeze", "Unsqueeze", "Shape", "Constant", "Cast"),
        *("RELU", "RELU6", "RESHAPE", "QUANTIZE", "DEQUANTIZE", "SQUEEZE", "EXPAND_DIMS"),
    }
)
"""What runtimes fuse into a neighbour, or that only renames elements."""

_PRODUCTS = ("MatMul", "Gemm", "MatMulNBits", "FULLY_CONNECTED", "BATCH_MATMUL", "MatMulInteger")


@dataclass(frozen=True)
class Work:
    """One operator: its kind, multiply-accumulates, and elements of activations (read and written) and weights."""

    kind: str
    macs: int
    activations: int
    weights: int = 0


def features(work: Iterable[Work]) -> tuple[float, ...]:
    """What a latency is estimated from, in the order of `FEATURES`; in millions, operators in thousands."""
    entries = tuple(work)
    macs = {kind: sum(entry.macs for entry in entries if entry.kind == kind) / 1e6 for kind in KINDS}
    return (
        1.0,
        len(entries) / 1e3,
        *(macs[kind] for kind in KINDS[:-1]),
        sum(entry.activations for entry in entries) / 1e6,
        sum(entry.weights for entry in entries) / 1e6,
    )


def convolution(before: tuple[int, int], after: tuple[int, int], kernel: int, groups: int) -> Work:
    """A convolution of photos (channels, side) with a square kernel."""
    weights = after[0] * before[0] // groups * kernel**2
    kind = _convolution(before[0] // groups, is_depthwise=groups == before[0] > 1, is_point=kernel == 1)
    moved = before[0] * before[1] ** 2 + after[0] * after[1] ** 2
    return Work(kind, weights * after[1] ** 2, moved, weights)


def product(before: int, after: int) -> Work:
    """A fully connected layer of one row."""
    return Work("product", before * after, before + after, before * after)


def elementwise(elements: int) -> Work:
    """An operator that only reads and writes."""
    return Work("elementwise", 0, elements)


def work_of(operators: Iterable[Operator]) -> tuple[Work, ...]:
    """The work of a model's graph, without what runtimes fuse away."""
    return tuple(_work(operator) for operator in operators if operator.type not in _FREE)


def _work(operator: Operator) -> Work:
    produced = sum(_count(tensor.shape) for tensor in operator.outputs)
    if not operator.macs:
        return elementwise(produced + sum(_count(tensor.shape) for tensor in operator.inputs))
    weight = operator.inputs[1].shape if len(operator.inputs) > 1 else ()
    if operator.type.startswith("QLinear") and len(operator.inputs) > 3:
        weight = operator.inputs[3].shape
    read = _count(operator.inputs[0].shape)
    kind = _kind(operator, weight)
    is_constant = operator.weight_bytes > 0
    moved = produced + read + (0 if is_constant else _count(weight))
    return Work(kind, operator.macs, moved, _count(weight) if is_constant else 0)


def _kind(operator: Operator, weight: tuple[int, ...]) -> str:
    if operator.type.startswith("DEPTHWISE"):
        return "depthwise"
    if operator.type in _PRODUCTS or len(weight) < 3:
        return "product"
    if operator.type.isupper():  # LiteRT: (out, height, width, in)
        return _convolution(weight[-1], is_depthwise=False, is_point=set(weight[1:-1]) == {1})
    is_depthwise = weight[1] == 1 and operator.inputs[0].shape[1:2] != (1,)
    return _convolution(weight[1], is_depthwise=is_depthwise, is_point=set(weight[2:]) == {1})


def _convolution(channels: int, *, is_depthwise: bool, is_point: bool) -> str:
    """The kind of a convolution that reads `channels` an output; few of them fill no vector."""
    if is_depthwise:
        return "depthwise"
    if is_point:
        return "pointwise"
    return "stem" if channels <= FEW else "dense"


def _count(shape: tuple[int, ...]) -> int:
    return prod(shape) if all(axis >= 0 for axis in shape) else 0
