# SPDX-License-Identifier: Apache-2.0
"""Which operators at the ends of a LiteRT graph stay out of fixed 8-bit grids, because outputs lose most there.

- A fully connected layer that makes an output takes int8 weights and multiplies integers, but finds the range of its
  inputs at run time and writes floats (dynamic range). Logits on a grid were 0.6 dB of EfficientNet-Lite0's error, and
  what is on no grid cannot be clipped.
- What follows it computes in floats (a softmax on a grid knows 256 probabilities).
- So does the pooling in front of it: LiteRT's int8 average pooling writes on the grid of what it reads, which is many
  times coarser than averages need (ResNet8: 23.4 dB of SQNR with it, 29.4 dB without).

The same holds for pooling elsewhere, where the averages are that small. All of it together is a few thousandths of a net's work. A device that takes nothing but integers has no such ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeopt.ranges import Range
from edgeopt_converters.litert_file import parse
from edgeopt_converters.litert_graph import type_names

DYNAMIC = "dynamic"
"""Weights of 8 bits per channel, activations quantized in every inference, floats at both sides."""

FLOATS = "fp32"

_POOLS = frozenset({"MEAN", "AVERAGE_POOL_2D"})
MOVES = frozenset({"RESHAPE", "SQUEEZE", "EXPAND_DIMS", "TRANSPOSE"})
"""They compute nothing, in whatever type."""

_CURVES = frozenset({"SOFTMAX", "LOG_SOFTMAX", "LOGISTIC", "TANH", "L2_NORMALIZATION"})


def find_ends(program: bytes) -> dict[str, str]:
    """The level of every operator at the ends of the first subgraph, by the name of the operator's first output.

    Walks backwards from the outputs as long as all readers of what an operator makes belong to the ends.
    """
    model = parse(program)
    graph = model.subgraphs[0]
    types = type_names(model)
    leaves = {int(index) for index in graph.outputs}
    readers: dict[int, set[int]] = {}
    for number, operator in enumerate(graph.operators):
        for index in operator.inputs:
            readers.setdefault(int(index), set()).add(number)
    levels: dict[int, str] = {}
    before: set[int] = set()
    for number in reversed(range(len(graph.operators))):
        operator = graph.operators[number]
        makes = [int(index) for index in operator.outputs]
        after = set().union(*(readers.get(index, set()) for index in makes))
        if not after <= levels.keys() or not (after or leaves & set(makes)):
            continue
        is_before = any(levels[reader] == DYNAMIC or reader in before for reader in after)
        level = _level(model, operator, types[number], is_before=is_before)
        if level:
            levels[number] = level
            before |= {number} if is_before else set()
    names = {number: graph.tensors[graph.operators[number].outputs[0]].name.decode() for number in levels}
    return {names[number]: levels[number] for number in sorted(levels)}


def find_coarse_pools(program: bytes, ranges: Mapping[str, Range]) -> dict[str, str]:
    """Average pooling inside a graph whose values span less than half of the grid that it would have to write on."""
    model = parse(program)
    graph = model.subgraphs[0]
    found: dict[str, str] = {}
    for operator, kind in zip(graph.operators, type_names(model), strict=True):
        reads, makes = (graph.tensors[at[0]].name.decode() for at in (operator.inputs, operator.outputs))
        if kind == "AVERAGE_POOL_2D" and {reads, makes} <= ranges.keys():
            is_coarse = 2 * _span(ranges[makes]) < _span(ranges[reads])
            found |= {makes: FLOATS} if is_coarse else {}
    return found


def _span(found: Range) -> float:
    return found.high - found.low


def _level(model: Any, operator: Any, kind: str, *, is_before: bool) -> str:
    if kind in _POOLS | MOVES or (kind in _CURVES and not is_before):
        return FLOATS
    if kind == "FULLY_CONNECTED" and not is_before and has_constant_weights(model, operator):
        return DYNAMIC
    return ""


def has_constant_weights(model: Any, operator: Any) -> bool:
    """Whether what a layer, a convolution or a lookup multiplies or picks is stored in the file."""
    tensor = model.subgraphs[0].tensors[operator.inputs[1]]
    data = model.buffers[tensor.buffer].data
    return data is not None and len(data) > 0
