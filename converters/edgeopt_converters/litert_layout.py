# SPDX-License-Identifier: Apache-2.0
"""Remove what litert-torch leaves of changed layouts around padding: two copies of an image for every padded layer.

- A Transpose that undoes the one before it goes, and so does one that undoes it behind a Pad, which then pads the axes
  where they are.
- A Pad of zeros that is what SAME padding of the convolution behind it means becomes that convolution's padding; so does
  one of minus infinity before max pooling, which never looks at its padding.

Values are the same to the bit: nothing is computed otherwise.
"""

from __future__ import annotations

from typing import Any

from edgeopt_converters.litert_file import pack, parse
from edgeopt_converters.litert_graph import type_names

_PADS = ("PAD", "PADV2")
_PADDED = {"CONV_2D": "PAD", "DEPTHWISE_CONV_2D": "PAD", "MAX_POOL_2D": "PADV2"}
"""What can pad by itself, and by which operator its padding is spelled out."""


def tidy(program: bytes) -> bytes:
    """Return the program without them, or the very bytes where it has none."""
    graph = _Graph(program)
    changed = False
    while graph.step():
        changed = True
    return graph.packed() if changed else program


class _Graph:
    """The first subgraph while it is changed."""

    def __init__(self, program: bytes) -> None:
        self.model = parse(program)
        self.graph = self.model.subgraphs[0]
        self.types = type_names(self.model)
        self.outputs = {int(index) for index in self.graph.outputs}
        for operator in self.graph.operators:
            operator.inputs = [int(index) for index in operator.inputs]
            operator.outputs = [int(index) for index in operator.outputs]

    def step(self) -> bool:
        """Change one place; say whether there was one."""
        writers = {
            operator.outputs[0]: n for n, operator in enumerate(self.graph.operators) if operator.outputs
        }
        for number, kind in enumerate(self.types):
            if (kind == "TRANSPOSE" and self._undo(number, writers)) or (
                kind in _PADDED and self._take_in(number, writers)
            ):
                self._drop_unread()
                return True
        return False

    def packed(self) -> bytes:
        """The changed file."""
        return pack(self.model)

    def _undo(self, number: int, writers: dict[int, int]) -> bool:
        last = self.graph.operators[number]
        middle = writers.get(last.inputs[0])
        if middle is None:
            return False
        is_pad = self.types[middle] in _PADS
        first = writers.get(self.graph.operators[middle].inputs[0]) if is_pad else middle
        if first is None or self.types[first] != "TRANSPOSE":
            return False
        begin, end = (self._constant(self.graph.operators[n].inputs[1]) for n in (first, number))
        if begin is None or end is None or [begin[axis] for axis in end] != list(range(len(begin))):
            return False
        source = self.graph.operators[first].inputs[0]
        return self._pad(number, middle, source, begin) if is_pad else self._skip(last.outputs[0], source)

    def _pad(self, number: int, middle: int, source: int, begin: list[int]) -> bool:
        """Let the last Transpose be the Pad, of the axes as they were before the first."""
        pad, last = self.graph.operators[middle], self.graph.operators[number]
        amounts = self._constant(pad.inputs[1])
        if amounts is None:
            return False
        pairs = {axis: amounts[2 * place : 2 * place + 2] for place, axis in enumerate(begin)}
        placed = self._add_constant(pad.inputs[1], [n for axis in sorted(pairs) for n in pairs[axis]])
        last.inputs = [source, placed, *pad.inputs[2:]]
        last.opcodeIndex = pad.opcodeIndex
        last.builtinOptions, last.builtinOptionsType = pad.builtinOptions, pad.builtinOptionsType
        self.types[number] = self.types[middle]
        return True

    def _skip(self, made: int, source: int) -> bool:
        if made in self.outputs:
            return False
        for operator in self.graph.operators:
            operator.inputs = [source if index == made else index for index in operator.inputs]
        return True

    def _take_in(self, number: int, writers: dict[int, int]) -> bool:
        from ai_edge_litert import schema_py_generated as schema

        layer = self.graph.operators[number]
        middle = writers.get(layer.inputs[0])
        options = layer.builtinOptions
        kind = self.types[number]
        if middle is None or self.types[middle] != _PADDED[kind] or options.padding != schema.Padding.VALID:
            return False
        pad = self.graph.operators[middle]
        if kind == "MAX_POOL_2D" and not self._is_endless(pad.inputs[2]):
            return False
        amounts = self._constant(pad.inputs[1])
        size = self.graph.tensors[pad.inputs[0]].shape
        wanted = [0, 0]
        for axis, reach, stride in zip(
            (1, 2), self._reaches(layer), (options.strideH, options.strideW), strict=True
        ):
            total = max((-(-int(size[axis]) // stride) - 1) * stride + reach - int(size[axis]), 0)
            wanted += [total // 2, total - total // 2]
        if amounts != [*wanted, 0, 0]:
            return False
        layer.inputs[0] = pad.inputs[0]
        options.padding = schema.Padding.SAME
        return True

    def _reaches(self, layer: Any) -> tuple[int, int]:
        """How many rows and columns a convolution or a pool looks at."""
        options = layer.builtinOptions
        if hasattr(options, "filterHeight"):
            return options.filterHeight, options.filterWidth
        kernel = self.graph.tensors[layer.inputs[1]].shape
        height, width = (int(size) - 1 for size in kernel[1:3])
        return height * options.dilationHFactor + 1, width * options.dilationWFactor + 1

    def _is_endless(self, index: int) -> bool:
        """Whether a constant is minus infinity."""
        import numpy as np

        data = self.model.buffers[self.graph.tensors[index].buffer].data
        is_stored = data is not None and len(data) == 4
        return is_stored and bool(np.isneginf(np.asarray(data, np.uint8).view(np.float32)[0]))

    def _drop_unread(self) -> None:
        while True:
            read = {index for operator in self.graph.operators for index in operator.inputs} | self.outputs
            kept = [n for n, operator in enumerate(self.graph.operators) if read & set(operator.outputs)]
            if len(kept) == len(self.types):
                return
            self.graph.operators = [self.graph.operators[n] for n in kept]
            self.types = [self.types[n] for n in kept]

    def _constant(self, index: int) -> list[int] | None:
        import numpy as np
        from ai_edge_litert import schema_py_generated as schema

        tensor = self.graph.tensors[index]
        data = self.model.buffers[tensor.buffer].data
        kinds = {schema.TensorType.INT32: np.int32, schema.TensorType.INT64: np.int64}
        if data is None or len(data) == 0 or tensor.type not in kinds:
            return None
        return [int(value) for value in np.asarray(data, np.uint8).view(kinds[tensor.type])]

    def _add_constant(self, like: int, values: list[int]) -> int:
        """A new constant tensor with the shape and type of another."""
        import copy

        import numpy as np
        from ai_edge_litert import schema_py_generated as schema

        tensor = copy.copy(self.graph.tensors[like])
        buffer = copy.copy(self.model.buffers[tensor.buffer])
        kind = np.int32 if tensor.type == schema.TensorType.INT32 else np.int64
        buffer.data = np.array(values, kind).view(np.uint8)
        self.model.buffers.append(buffer)
        tensor.buffer = len(self.model.buffers) - 1
        tensor.name = (tensor.name.decode() + f"_placed_{len(self.graph.tensors)}").encode()
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1
