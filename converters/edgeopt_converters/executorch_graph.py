# SPDX-License-Identifier: Apache-2.0
"""The operators of an ExecuTorch program, in the order in which they run: those of delegates, and kernels of its own.

Rules:
- An operator of the XNNPACK delegate is called as its schema calls it without the prefix ("Conv2d"), a kernel of
  ExecuTorch by its ATen name ("aten::bmm.out"). A file has no names for operators, so that they count: "Conv2d#3".
- Types of tensors are ours; a value that is quantized in every inference is "dynamic int8".
- What another delegate holds is one operator of its name with nothing known of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from edgeopt_converters.executorch_file import XNNPACK, dtype_name, method, parse, xnnpack_graph
from edgeopt_profiles.operators import Operator, Tensor

DYNAMIC = "dynamic int8"

_TYPES = {
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "pfp32": "float32", "qint8": "int8", "quint8": "uint8",
    "qcint8": "int8", "qint32": "int32", "qcint32": "int32", "qcint4": "int4", "qbint4": "int4", "qdint8": DYNAMIC,
    "qpint8": DYNAMIC, "int32": "int32",
}  # fmt: skip
_INPUTS = ("input", "query", "key", "value", "scale", "mask", "filter", "bias")
_ABSENT = 2**32 - 1  # XNN_INVALID_VALUE_ID: a bias that is not there


def operators(program: bytes) -> tuple[Operator, ...]:
    """List the operators of the method `forward`.

    Raises:
        RecipeError: Not an ExecuTorch program, or a damaged one.
        UnsupportedError: ExecuTorch is not installed.
    """
    file = parse(program)
    plan = method(file)
    counts: Counter[str] = Counter()
    found = []
    for kind, inputs, outputs, macs, weight_bytes in _steps(file, plan):
        name = f"{kind}#{counts[kind]}"
        counts[kind] += 1
        found.append(Operator(name, kind, inputs, outputs, macs, weight_bytes, _dtype(inputs, outputs)))
    return tuple(found)


_Step = tuple[str, tuple[Tensor, ...], tuple[Tensor, ...], int, int]


def _steps(file: Any, plan: Any) -> Iterator[_Step]:
    for chain in plan.chains:
        for instruction in chain.instructions:
            call = instruction.instr_args
            if hasattr(call, "op_index"):
                yield _kernel(plan, call)
            elif hasattr(call, "delegate_index"):
                delegate = plan.delegates[call.delegate_index]
                if delegate.id == XNNPACK:
                    data = file.program.backend_delegate_data[delegate.processed.index].data
                    yield from _delegated(xnnpack_graph(bytes(data)))
                else:
                    yield delegate.id, (), (), 0, 0


def _kernel(plan: Any, call: Any) -> _Step:
    operator = plan.operators[call.op_index]
    kind = f"{operator.name}.{operator.overload}" if operator.overload else str(operator.name)
    tensors = [
        Tensor(f"value_{index}", tuple(int(size) for size in value.sizes), dtype_name(value))
        for index in call.args
        if hasattr(value := plan.values[index].val, "sizes")
    ]
    # the last tensor is the one that is written, and stands there once more as what is given back
    written = tensors[-1:]
    inputs = tuple(tensor for tensor in tensors if tensor.name != tensors[-1].name)
    return kind, inputs, tuple(written), _kernel_macs(kind, inputs, tuple(written)), 0


def _kernel_macs(kind: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    name = kind.removeprefix("aten::").partition(".")[0]
    if name == "convolution":
        return prod(outputs[0].shape) * prod(inputs[1].shape[1:])
    if name in ("mm", "bmm", "linear"):
        return prod(outputs[0].shape) * inputs[0].shape[-1]
    if name == "addmm":
        return prod(outputs[0].shape) * inputs[1].shape[-1]
    return 0


def _delegated(graph: Mapping[str, Any]) -> Iterator[_Step]:
    values: dict[int, Tensor] = {}
    constants: dict[int, int] = {}
    for entry in graph["xvalues"]:
        value = entry["xvalue_union"]
        value = value.get("tensor_value", value)
        number = int(value["id_out"])
        values[number] = Tensor(
            f"xnn_{number}", tuple(map(int, value["dims"])), _type_name(value["datatype"])
        )
        if value["constant_buffer_idx"]:
            constants[number] = int(graph["constant_data"][value["constant_buffer_idx"]]["size"])
    for entry in graph["xnodes"]:
        kind = str(entry["xnode_union_type"]).removeprefix("XNN")
        node = entry["xnode_union"]
        reads = [
            int(number)
            for key, number in node.items()
            if key.endswith("_id") and key.startswith(_INPUTS) and number != _ABSENT and int(number) in values
        ]
        makes = [
            int(number) for key, number in node.items() if key.startswith("output") and key.endswith("_id")
        ]
        inputs, outputs = (tuple(values[number] for number in listed) for listed in (reads, makes))
        weights = sum(constants.pop(number, 0) for number in reads)
        count = _MACS.get(kind)
        yield kind, inputs, outputs, count(node, inputs, outputs) if count else 0, weights


def _convolution(node: Any, _: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    kernel = int(node["kernel_height"]) * int(node["kernel_width"])
    return prod(outputs[0].shape) * kernel * int(node["group_input_channels"])


def _transposed_convolution(node: Any, inputs: Sequence[Tensor], _: Sequence[Tensor]) -> int:
    kernel = int(node["kernel_height"]) * int(node["kernel_width"])
    return prod(inputs[0].shape) * kernel * int(node["group_output_channels"])


def _fully_connected(_: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    return prod(outputs[0].shape) * inputs[1].shape[1]  # weights (out, in)


def _batched_product(_: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    return prod(outputs[0].shape) * inputs[0].shape[-1]


def _attention(_: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    query, key = inputs[0].shape, inputs[1].shape
    return prod(query) * key[-2] + prod(outputs[0].shape) * key[-2]


_MACS: Mapping[str, Callable[[Any, Sequence[Tensor], Sequence[Tensor]], int]] = {
    "Conv2d": _convolution,
    "DepthwiseConv2d": _convolution,
    "ConvTranspose2d": _transposed_convolution,
    "FullyConnected": _fully_connected,
    "BatchMatrixMultiply": _batched_product,
    "ScaledDotProductAttention": _attention,
}


def _type_name(datatype: str) -> str:
    name = str(datatype).removeprefix("xnn_datatype_")
    return _TYPES.get(name, name)


def _dtype(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    """The numbers that an operator computes in: those that it writes, or integers where it multiplies dynamic ones."""
    if any(tensor.dtype == DYNAMIC for tensor in inputs):
        return "int8"
    return outputs[0].dtype if outputs else "unknown"
