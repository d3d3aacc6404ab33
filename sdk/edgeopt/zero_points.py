# SPDX-License-Identifier: Apache-2.0
"""Activations that need zero point 0, so that OpenVINO multiplies them in integers (`Scheme.zero_products`).

Rules, asked of OpenVINO 2026.4 one operator at a time (`edgeopt.coverage._openvino_causes`):
- A transposed convolution wants zero point 0 at its input; a product of two activations wants it at the first, and the
  second symmetric.
- An activation that is never negative has zero point 0 in uint8 anyway and stays so, but for the second of a product.
- What moves an activation shares its grid, so the whole way back to what computes it is meant.

All other tensors keep their zero point: a decoder and an attention block lost nothing to the tenth of a decibel, and took
0.31 and 0.41 of the float file's time instead of 0.52 and 0.57; symmetric everywhere costs 0.7 dB. Not for CPUs without
VNNI, where products of int8 with int8 overflow (the decoder: 23.6 dB, the safe file 31.7).
Repeat: `tests/edgeopt/passes/time_zero_points.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from edgeopt.ranges import Range
from edgeopt_profiles.profile import Scheme

_MOVES = frozenset({
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Slice", "Split", "Gather", "MaxPool",
    "DepthToSpace", "SpaceToDepth", "Expand",
})  # fmt: skip


def suited(scheme: Scheme | None, program: Any) -> Scheme | None:
    """The scheme without `zero_products` where a float program has nothing that it would change: the same file then."""
    if scheme is None or not scheme.zero_products or _wanted(program, ()):
        return scheme
    return replace(scheme, zero_products=False)


def symmetric_tensors(
    program: Any, ranges: Mapping[str, Range], exclude: Collection[str] = ()
) -> tuple[str, ...]:
    """Tensors of a folded float program that become int8 with zero point 0; operators named in `exclude` want nothing."""
    return tuple(
        name
        for name, is_second in _wanted(program, exclude).items()
        if is_second or (name in ranges and ranges[name].low < 0)
    )


def _wanted(program: Any, exclude: Collection[str]) -> dict[str, bool]:
    """Tensor -> whether it is the second of a product somewhere."""
    writers = {name: node for node in program.graph.node for name in node.output}
    constants = frozenset(tensor.name for tensor in program.graph.initializer)
    found: dict[str, bool] = {}
    for node in program.graph.node:
        if node.name in exclude:
            continue
        for place, name in enumerate(_inputs(node, constants)):
            for tensor in _way_back(name, writers):
                found[tensor] = found.get(tensor, False) or place == 1
    return found


def _inputs(node: Any, constants: frozenset[str]) -> tuple[str, ...]:
    if node.op_type == "ConvTranspose" and node.input[1] in constants:
        return (node.input[0],)
    if node.op_type == "MatMul" and not constants & set(node.input):
        return tuple(node.input)
    return ()


def _way_back(name: str, writers: Mapping[str, Any]) -> tuple[str, ...]:
    found = [name]
    while (writer := writers.get(found[-1])) is not None and writer.op_type in _MOVES:
        found.append(writer.input[0])
    return tuple(found)
