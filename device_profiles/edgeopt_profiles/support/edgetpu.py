# SPDX-License-Identifier: Apache-2.0
"""Coral Edge TPU: its compiler maps one run of operators, from the input to the first one that it cannot take.

Rules:
- 8-bit integers only, shapes known, and only the three innermost axes of an activation may be larger than 1.
- A QUANTIZE at the head and a DEQUANTIZE at the tail, which float inputs and outputs bring, run on the CPU.
- After the first operator that is left out everything stays on the CPU, supported or not.

Not checked, because operators do not show their attributes: dilations, fused activations, axes of a reduction or a
padding, strides of a slice. The compiler may also leave large reshapes and resizes on the CPU, and then all after them;
with these in a model, the placement is the best case.

Source: coral.ai/docs/edgetpu/models-intro (table of operations) and the older copy of that table in
dgist-datalab/Datalab_Intern, Edge_TPU/convert_model_for_Edge_TPU.md. Operators that neither copy shows (TRANSPOSE,
TRANSPOSE_CONV, SUM, RSQRT, SQUARED_DIFFERENCE) count as unsupported, although later compilers may take some of them.
Compared with what the compiler mapped of six models of google-coral/test_data: five equal, one (with resizes) a best case.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from edgeopt_profiles.operators import Operator, Tensor
from edgeopt_profiles.support import LeftOut, Placement

CACHE_BYTES = 8_000_000
"""Parameters beyond about 8 MB are streamed from the host in every inference, at about 0.4 GB/s."""

MAXIMUM_SOFTMAX = 16_000
_MAPPED = frozenset({
    "ADD", "AVERAGE_POOL_2D", "CONCATENATION", "CONV_2D", "DEPTHWISE_CONV_2D", "EXPAND_DIMS",
    "FULLY_CONNECTED", "L2_NORMALIZATION", "LOGISTIC", "UNIDIRECTIONAL_SEQUENCE_LSTM", "MAXIMUM",
    "MAX_POOL_2D", "MEAN", "MINIMUM", "MUL", "PACK", "PAD", "PRELU", "QUANTIZE", "REDUCE_MAX", "REDUCE_MIN",
    "RELU", "RELU6", "RELU_N1_TO_1", "RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "SLICE",
    "SOFTMAX", "SPACE_TO_DEPTH", "SPLIT", "SQUEEZE", "STRIDED_SLICE", "SUB", "TANH"
})  # fmt: skip
_NOT_OVER_BATCH = frozenset({"MEAN", "REDUCE_MAX", "REDUCE_MIN", "PAD"})
_INTEGERS = ("int8", "uint8", "int16", "int32")


def place(operators: Sequence[Operator]) -> Placement:
    """Tell what the Edge TPU runs from what stays on the CPU."""
    mapped: list[str] = []
    left: list[LeftOut] = []
    stopped_by = ""
    for operator in operators:
        if stopped_by:
            left.append(
                LeftOut(operator.name, operator.type, f"the mapping ends at a {stopped_by} before it")
            )
        elif operator.type == "QUANTIZE" and _is_float(operator.inputs) and not mapped:
            left.append(
                LeftOut(operator.name, operator.type, "it turns float inputs into int8, which the CPU does")
            )
        elif reason := _reason(operator):
            left.append(LeftOut(operator.name, operator.type, reason))
            stopped_by = operator.type
        else:
            mapped.append(operator.name)
    return Placement(tuple(mapped), tuple(left))


def _reason(operator: Operator) -> str:
    """Why the Edge TPU cannot take the operator, or empty."""
    if operator.type == "DEQUANTIZE" and _is_float(operator.outputs):
        return "it turns int8 into float outputs, which the CPU does"
    if operator.type not in _MAPPED:
        return "the Edge TPU has no such operator"
    for tensor in (*operator.inputs, *operator.outputs):
        if tensor.dtype not in _INTEGERS:
            return f"tensor {tensor.name!r} is {tensor.dtype}; only 8-bit integers are taken, quantize the whole model"
        if any(size < 0 for size in tensor.shape):
            return f"tensor {tensor.name!r} has the shape {tensor.shape}; every size must be fixed"
    for tensor in operator.outputs:
        if prod(tensor.shape[:-3]) > 1:
            return f"tensor {tensor.name!r} is {tensor.shape}; only its three last axes may be larger than 1"
    return _own_reason(operator)


def _own_reason(operator: Operator) -> str:
    """What one kind of operator demands."""
    made = operator.outputs[0].shape if operator.outputs else ()
    if operator.type == "SOFTMAX" and (prod(made[:-1]) > 1 or prod(made) > MAXIMUM_SOFTMAX):
        return f"softmax takes one axis of at most {MAXIMUM_SOFTMAX} values, found {made}"
    if operator.type == "FULLY_CONNECTED" and prod(made[:-1]) > 1:
        return f"the output of a fully connected layer must have one axis, found {made}"
    if operator.type in _NOT_OVER_BATCH and operator.inputs and made:
        source = operator.inputs[0].shape
        if len(source) == len(made) and source[0] != made[0]:
            return f"it works over the batch axis ({source} to {made}), which must stay as it is"
    return ""


def _is_float(tensors: Sequence[Tensor]) -> bool:
    return any("float" in tensor.dtype for tensor in tensors)
