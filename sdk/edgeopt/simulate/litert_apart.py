# SPDX-License-Identifier: Apache-2.0
"""A LiteRT file taken apart at its 8-bit tensors: each becomes an output of the operator that makes it, and an input.

The interpreter (and XNNPACK in it) then computes every operator from integers that are given, by the kernels that it
takes in the whole file. For checking a prediction only: nothing here is shipped.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt_converters.litert_file import dtype_name, parse

if TYPE_CHECKING:
    import numpy as np

_EIGHT_BITS = ("int8", "uint8")


@dataclass(frozen=True)
class LitertPieces:
    """A file and the tensors that it is given and shows, by name; one in pieces shows all its 8-bit activations."""

    program: bytes
    inputs: Mapping[str, int]
    """Name -> number of the tensor that is to be given: the model's inputs, and the copies of `tensors`."""
    outputs: Mapping[str, int]
    """Name -> number of the tensor that shows it."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of what it shows, in the order in which operators make it."""
        return tuple(self.outputs)

    def run(self, given: Mapping[str, np.ndarray], *, threads: int = 1) -> dict[str, np.ndarray]:
        """What the runtime makes of every tensor, each operator from the `given` values of its inputs."""
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_content=self.program, num_threads=threads)
        interpreter.allocate_tensors()
        for name, index in self.inputs.items():
            interpreter.set_tensor(index, given[name])
        interpreter.invoke()
        return {name: interpreter.get_tensor(index) for name, index in self.outputs.items()}


def take_apart(program: bytes) -> LitertPieces:
    """Cut a file at every 8-bit activation that an operator makes and another reads."""
    import flatbuffers  # type: ignore[import-untyped]

    model = parse(program)
    graph = model.subgraphs[0]
    inputs = {_name(graph.tensors[index]): int(index) for index in graph.inputs}
    outputs: dict[str, int] = {}
    copies: dict[int, int] = {}
    for operator in graph.operators:
        operator.inputs = [copies.get(int(index), int(index)) for index in operator.inputs]
        for index in (int(number) for number in operator.outputs):
            tensor = graph.tensors[index]
            if dtype_name(tensor) in _EIGHT_BITS:
                outputs[_name(tensor)] = index
                copies[index] = len(graph.tensors)
                inputs[_name(tensor)] = copies[index]
                graph.tensors.append(_copy(tensor))
    read = {index for operator in graph.operators for index in operator.inputs}
    inputs = {name: index for name, index in inputs.items() if index in read}
    graph.inputs = list(inputs.values())
    graph.outputs = list(outputs.values())
    model.signatureDefs = None
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return LitertPieces(bytes(builder.Output()), inputs, outputs)


def as_it_is(program: bytes) -> LitertPieces:
    """The file in one piece, with the model's inputs and outputs by the names of the file's tensors."""
    graph = parse(program).subgraphs[0]
    inputs, outputs = (
        {_name(graph.tensors[index]): int(index) for index in edge} for edge in (graph.inputs, graph.outputs)
    )
    return LitertPieces(program, inputs, outputs)


def _copy(tensor: Any) -> Any:
    made = copy.copy(tensor)
    made.name = _name(tensor) + "/given"
    return made


def _name(tensor: Any) -> str:
    return tensor.name.decode() if isinstance(tensor.name, bytes) else tensor.name or ""
