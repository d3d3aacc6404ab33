# SPDX-License-Identifier: Apache-2.0
"""Normalizations inside a LiteRT graph, which compute in floats: eight bits cannot hold a square and a root of it.

LiteRT has no layer norm. What a lowered one consists of (means, squared differences, a reciprocal root, products and
sums) has int8 kernels, one by one, and ai-edge-quantizer uses them: a text recognizer had 10 dB of SQNR so, and 17 dB
with its five norms in floats, where ONNX Runtime, which fuses them and never quantizes them, had 15.6 dB.

A norm is found from its root: backwards to what it measures, forwards through what scales and shifts by constants.
"""

from __future__ import annotations

from typing import Any

from edgeopt.litert_ends import FLOATS
from edgeopt_converters.litert_file import parse
from edgeopt_converters.litert_graph import type_names

_ROOTS = frozenset({"RSQRT", "SQRT"})
_STATISTICS = frozenset({"MEAN", "SUM", "SQUARED_DIFFERENCE", "SUB", "RESHAPE", "SQUARE"})
_SCALES = frozenset({"MUL", "SUB", "DIV", "RESHAPE"})
_SHIFTS = frozenset({"ADD"})


def find_norms(program: bytes) -> dict[str, str]:
    """The level of every operator that belongs to a normalization, by the name of the operator's first output."""
    graph = _Graph(program)
    found: set[int] = set()
    for number, kind in enumerate(graph.types):
        if kind in _ROOTS and (measured := graph.behind(number)):
            found |= graph.ahead(measured)
    return {graph.name(number): FLOATS for number in sorted(found)}


class _Graph:
    """Who makes and who reads each tensor of the first subgraph."""

    def __init__(self, program: bytes) -> None:
        self._model = parse(program)
        self._graph = self._model.subgraphs[0]
        self.types = type_names(self._model)
        self._writers = {int(op.outputs[0]): n for n, op in enumerate(self._graph.operators)}
        self._stored = {
            index
            for index, tensor in enumerate(self._graph.tensors)
            if (data := self._model.buffers[tensor.buffer].data) is not None and len(data) > 0
        }

    def name(self, number: int) -> str:
        """What `litert_levels` calls an operator."""
        name: str = self._graph.tensors[self._graph.operators[number].outputs[0]].name.decode()
        return name

    def behind(self, root: int) -> set[int]:
        """The root and what it is computed from, up to what is measured; nothing where no mean is among it."""
        found, waiting = {root}, [root]
        while waiting:
            for index in self._reads(waiting.pop()):
                writer = self._writers.get(index, -1)
                if writer >= 0 and writer not in found and self._is_statistic(writer):
                    found.add(writer)
                    waiting.append(writer)
        return found if any(self.types[number] in ("MEAN", "SUM") for number in found) else set()

    def ahead(self, measured: set[int]) -> set[int]:
        """`measured` with what follows it; operators stand in the order in which they run."""
        found = set(measured)
        for number, kind in enumerate(self.types):
            inside = [self._writers.get(index, -1) in found for index in self._reads(number)]
            if (kind in _SCALES and any(inside)) or (kind in _SHIFTS and inside and all(inside)):
                found.add(number)
        return found

    def _is_statistic(self, number: int) -> bool:
        operator = self._graph.operators[number]
        kind = self.types[number]
        is_square = kind == "MUL" and operator.inputs[0] == operator.inputs[1]
        has_constant = kind in ("ADD", "MUL", "MAXIMUM") and len(self._reads(number)) == 1
        return kind in _STATISTICS or is_square or has_constant

    def _reads(self, number: int) -> list[int]:
        inputs: Any = self._graph.operators[number].inputs
        return [int(index) for index in inputs if index >= 0 and int(index) not in self._stored]
