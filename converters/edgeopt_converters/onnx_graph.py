# SPDX-License-Identifier: Apache-2.0
"""The operators of an ONNX program, seen through the QuantizeLinear and DequantizeLinear around them.

Rules:
- A tensor that a DequantizeLinear made stands for the integers behind it: the operator lists those.
- A QuantizeLinear or DequantizeLinear is an operator only where a float operator or an edge of the model needs it.
- Branches and bodies of control flow are listed like the rest, each once.
- An axis that shape inference cannot tell is -1, and what depends on it counts no multiply-accumulates (logged).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from edgeopt_converters.onnx_macs import macs
from edgeopt_profiles.operators import Operator, Tensor
from edgeopt_wire.errors import RecipeError

_log = logging.getLogger(__name__)
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_FUSED_CLIPS = ("Relu", "Clip")
_BIASED = ("Conv", "ConvTranspose", "Gemm")
_PARAMETERS = {"Clip": (1, 2), "Resize": (1, 2), "Pad": (2,), "Dropout": (1,)}
"""Float inputs that are parameters, not tensors to compute with: they need no DequantizeLinear."""


def operators(program: Any) -> tuple[Operator, ...]:
    """List the operators of the graph and of the graphs inside it, in order.

    Raises:
        RecipeError: Shape inference finds a contradiction.
    """
    import onnx

    try:
        program = onnx.shape_inference.infer_shapes(program, strict_mode=False, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise RecipeError(f"this is not a correct ONNX model: {error}") from error
    tensors: dict[str, Tensor] = {}
    weights: dict[str, int] = {}
    nodes = list(_walk(program.graph, tensors, weights))
    return tuple(_View(nodes, tensors, weights, {value.name for value in program.graph.output}).operators())


class _View:
    """Who writes and who reads each tensor."""

    def __init__(
        self, nodes: Sequence[Any], tensors: Mapping[str, Tensor], weights: Mapping[str, int], edges: set[str]
    ) -> None:
        self._nodes = nodes
        self._tensors = tensors
        self._weights = weights
        self._edges = edges
        self._writer = {name: node for node in nodes for name in node.output if name}
        self._readers: dict[str, list[Any]] = defaultdict(list)
        for node in nodes:
            for name in node.input:
                self._readers[name].append(node)

    def operators(self) -> Iterator[Operator]:
        counted: set[str] = set()
        for index, node in enumerate(self._nodes):
            if node.op_type in (_QUANTIZE, _DEQUANTIZE) and self._is_folded(node):
                continue
            is_integer = self._is_integer(node)
            sources = [self._behind(name) for name in node.input if name]
            outputs = [self._ahead(name) if is_integer else name for name in node.output if name]
            fresh = [name for name in dict.fromkeys(sources) if name in self._weights and name not in counted]
            counted.update(fresh)
            inputs = tuple(self._tensor(name) for name in sources)
            made = tuple(self._tensor(name) for name in outputs)
            name = node.name or f"{node.op_type}_{index}"
            yield Operator(
                name=name,
                type=node.op_type,
                inputs=inputs,
                outputs=made,
                macs=_counted_macs(name, node, inputs, made),
                weight_bytes=sum(self._weights[name] for name in fresh),
                dtype="int8" if is_integer else (made[0].dtype if made else "none"),
            )

    def _tensor(self, name: str) -> Tensor:
        return self._tensors.get(name) or Tensor(name, (), "unknown")

    def _behind(self, name: str) -> str:
        """The integers that a DequantizeLinear gave `name`, or `name`."""
        writer = self._writer.get(name)
        return str(writer.input[0]) if writer is not None and writer.op_type == _DEQUANTIZE else name

    def _ahead(self, name: str) -> str:
        """The integers that `name` becomes, or `name`."""
        readers = self._readers[name]
        return str(readers[0].output[0]) if readers and readers[0].op_type == _QUANTIZE else name

    def _is_integer(self, node: Any) -> bool:
        if node.op_type in (_QUANTIZE, _DEQUANTIZE, "DynamicQuantizeLinear"):
            return True
        if node.op_type.startswith("QLinear") or node.op_type.endswith("Integer"):
            return True
        floats = [
            name
            for position, name in enumerate(node.input)
            if name
            and position not in _PARAMETERS.get(node.op_type, ())
            and "float" in self._tensor(name).dtype
        ]
        if not floats:
            return False
        fused = node.op_type in _FUSED_CLIPS and (writer := self._writer.get(floats[0])) is not None
        if fused and writer is not None and writer.op_type not in (_QUANTIZE, _DEQUANTIZE):
            return self._is_integer(writer)
        return all(self._is_dequantized(name) for name in floats) and all(
            self._is_quantized(name) for name in node.output if name
        )

    def _is_dequantized(self, name: str) -> bool:
        writer = self._writer.get(name)
        return writer is not None and writer.op_type == _DEQUANTIZE

    def _is_quantized(self, name: str) -> bool:
        readers = self._readers[name]
        if name in self._edges or not readers:
            return False
        if len(readers) == 1 and readers[0].op_type in _FUSED_CLIPS:
            return self._is_quantized(readers[0].output[0])
        return all(reader.op_type == _QUANTIZE for reader in readers)

    def _is_folded(self, node: Any) -> bool:
        """Whether only integer operators (or constants) stand on the float side of a Q or DQ."""
        if node.op_type == _QUANTIZE:
            writer = self._writer.get(node.input[0])
            return node.input[0] in self._weights or (writer is not None and self._is_integer(writer))
        readers = self._readers[node.output[0]]
        is_needed = node.output[0] in self._edges or not all(
            self._is_integer(reader) and reader.op_type != _QUANTIZE for reader in readers
        )
        return not is_needed or node.input[0] in self._weights


def _walk(graph: Any, tensors: dict[str, Tensor], weights: dict[str, int]) -> Iterator[Any]:
    """Give every node, Constants aside, and note tensors and constants on the way."""
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensors.setdefault(value.name, _value(value))
    for initializer in graph.initializer:
        _note_weight(initializer.name, initializer, tensors, weights)
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    _note_weight(node.output[0], attribute.t, tensors, weights)
            continue
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _walk(inner, tensors, weights)


def _note_weight(name: str, tensor: Any, tensors: dict[str, Tensor], weights: dict[str, int]) -> None:
    shape = tuple(tensor.dims)
    bits = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2}
    dtype = _dtype(tensor.data_type)
    tensors[name] = Tensor(name, shape, dtype)
    weights[name] = -(-prod(shape) * bits.get(dtype, 8 * _item_bytes(tensor.data_type)) // 8)


def _value(value: Any) -> Tensor:
    tensor = value.type.tensor_type
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in tensor.shape.dim)
    return Tensor(value.name, shape, _dtype(tensor.elem_type))


def _dtype(number: int) -> str:
    import onnx

    if number == onnx.TensorProto.STRING:
        return "string"
    return onnx.helper.tensor_dtype_to_np_dtype(number).name if number else "unknown"


def _item_bytes(number: int) -> int:
    import onnx

    return int(onnx.helper.tensor_dtype_to_np_dtype(number).itemsize)


def _counted_macs(name: str, node: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    counted = inputs[:2] if node.op_type in _BIASED else inputs  # a bias multiplies nothing
    if any(axis < 0 for tensor in (*counted, *outputs) for axis in tensor.shape):
        _log.warning(
            "%s %s: shapes are not known, its multiply-accumulates are not counted", node.op_type, name
        )
        return 0
    return macs(node, inputs, outputs)
