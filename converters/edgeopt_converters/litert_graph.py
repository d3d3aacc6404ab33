# SPDX-License-Identifier: Apache-2.0
"""The operators of a LiteRT program.

An operator is named after its first output, because LiteRT gives operators no names. Multiply-accumulates are counted
for what computes with weights or multiplies matrices; everything else counts 0, as in published figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from edgeopt_converters.litert_file import dtype_name, parse
from edgeopt_profiles.operators import Operator, Tensor

_INTEGER_8 = ("int8", "uint8")
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")


def operators(program: bytes) -> tuple[Operator, ...]:
    """List the operators of the first subgraph, in order.

    Raises:
        RecipeError: Not a LiteRT model, or a damaged one.
    """
    model = parse(program)
    graph = model.subgraphs[0]
    types = type_names(model)
    constants = {
        index: len(model.buffers[tensor.buffer].data)
        for index, tensor in enumerate(graph.tensors)
        if model.buffers[tensor.buffer].data is not None
    }
    counted: set[int] = set()
    found = []
    for operator, kind in zip(graph.operators, types, strict=True):
        reads = [int(index) for index in operator.inputs if index >= 0]  # -1 is an optional input left out
        fresh = [index for index in dict.fromkeys(reads) if index in constants and index not in counted]
        counted.update(fresh)
        inputs = tuple(_tensor(graph.tensors[index]) for index in reads)
        outputs = tuple(_tensor(graph.tensors[index]) for index in operator.outputs)
        activations = [tensor for index, tensor in zip(reads, inputs, strict=True) if index not in constants]
        found.append(
            Operator(
                name=outputs[0].name if outputs else kind,
                type=kind,
                inputs=inputs,
                outputs=outputs,
                macs=_macs(kind, inputs, outputs, operator),
                weight_bytes=sum(constants[index] for index in fresh),
                dtype=_dtype(kind, activations, outputs),
            )
        )
    return tuple(found)


def type_names(model: Any) -> list[str]:
    """The types of the operators of the first subgraph of a parsed file, in order."""
    codes = [_type(code) for code in model.operatorCodes]
    return [codes[operator.opcodeIndex] for operator in model.subgraphs[0].operators]


def _type(code: Any) -> str:
    from ai_edge_litert import schema_py_generated as schema

    if code.customCode:
        return code.customCode.decode() if isinstance(code.customCode, bytes) else str(code.customCode)
    names: dict[int, str] = {
        value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)
    }
    number = max(code.builtinCode, code.deprecatedBuiltinCode)  # files before 2020 fill only the old field
    return names.get(number, f"BUILTIN_{number}")


def _tensor(tensor: Any) -> Tensor:
    name = tensor.name.decode() if isinstance(tensor.name, bytes) else tensor.name or ""
    shape = () if tensor.shape is None else tuple(int(size) for size in tensor.shape)
    return Tensor(name, shape, dtype_name(tensor))


def _dtype(kind: str, activations: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    types = [tensor.dtype for tensor in (*activations, *outputs)]
    if kind in _CONVERSIONS or (
        any(dtype in _INTEGER_8 for dtype in types) and not any("float" in dtype for dtype in types)
    ):
        return "int8"
    return outputs[0].dtype if outputs else "none"


def _macs(kind: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], operator: Any) -> int:
    if kind in ("CONV_2D", "FULLY_CONNECTED"):  # weights (out, ..., in)
        return prod(outputs[0].shape) * prod(inputs[1].shape[1:])
    if kind == "DEPTHWISE_CONV_2D":  # weights (1, height, width, channels)
        return prod(outputs[0].shape) * prod(inputs[1].shape[1:3])
    if kind == "TRANSPOSE_CONV":  # output shape, weights (out, height, width, in), activations
        return prod(inputs[2].shape) * prod(inputs[1].shape[:3])
    if kind == "CONV_3D":  # weights (depth, height, width, in, out)
        return prod(outputs[0].shape) * prod(inputs[1].shape[:4])
    if kind == "BATCH_MATMUL":
        return prod(outputs[0].shape) * inputs[0].shape[-2 if operator.builtinOptions.adjX else -1]
    if (
        kind == "UNIDIRECTIONAL_SEQUENCE_LSTM"
    ):  # activations (batch, time, in) or time first; weights are 2-axis
        return prod(inputs[0].shape[:2]) * sum(
            prod(tensor.shape) for tensor in inputs[1:] if len(tensor.shape) == 2
        )
    return 0
