# SPDX-License-Identifier: Apache-2.0
"""Half precision: float32 weights and activations become float16 or bfloat16; inputs and outputs stay float32.

- float16 (11 bits of precision, up to 65504): weights beyond it are clipped and counted; operators that make larger
  activations with the calibration samples stay in float32 and are named. Without samples a note says that nobody looked.
  The host would not notice: ONNX Runtime's CPU provider computes float16 in float32 from end to end.
- bfloat16 (8 bits of precision, float32's range): nothing can overflow. It runs on TensorRT 9 and later from Ampere on
  (Jetson Orin), not on the CPU provider of ONNX Runtime (`edgeopt.bfloat16`), and LiteRT has no kernels for it.
Sources: IEEE 754-2008 binary16; ONNX Runtime, "Float16 and mixed precision models"; Kalamkar et al. 2019; NVIDIA
TensorRT 10.1, support matrix, table 2 (hardware and precision).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from edgeopt.bfloat16 import to_bfloat16
from edgeopt.onnx_graphs import observer
from edgeopt.passes import Order, Result
from edgeopt_converters.model import Model

FORMATS = ("onnx",)
EXTRA = "onnx"

LARGEST_FLOAT16 = 65504.0
SMALLEST_FLOAT16 = 2.0**-24
"""The smallest subnormal; what is smaller becomes zero."""

UNSEEN = "no calibration samples: nobody looked whether activations exceed float16's 65504"


@dataclass(frozen=True)
class Options:
    """`type` is float16 or bfloat16; a build sets it by the precision that it makes."""

    type: str = "float16"

    def __post_init__(self) -> None:
        if self.type not in ("float16", "bfloat16"):
            raise ValueError(f"cast_floats: type is float16 or bfloat16, found {self.type!r}")


def apply(model: Model, order: Order) -> Result:
    """Cast an ONNX model; `order.exclude` names operators or types that stay in float32.

    Raises:
        UnsupportedError: bfloat16, and the model has branches or operators that ONNX opset 22 lacks.
    """
    options = order.options if isinstance(order.options, Options) else Options()
    if options.type == "bfloat16":
        small, left = to_bfloat16(model.program, order.exclude)
        notes = (f"{len(left)} operators stay in float32: {', '.join(left[:5])}",) if left else ()
        return Result(replace(model, program=small), notes)
    return _float16(model, order)


def walks(order: Order, available: int) -> int:
    """How many samples `apply` walks over: all for float16, which can overflow, none for bfloat16."""
    is_wide = isinstance(order.options, Options) and order.options.type == "bfloat16"
    return 0 if is_wide else available


def _float16(model: Model, order: Order) -> Result:
    import warnings

    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    large, seen = _overflowing(model.program, order)
    source = onnx.ModelProto()
    source.CopyFrom(model.program)
    # the converter would turn what is below float16's smallest value into that value instead of rounding it
    clipped = _round_weights(source)
    types = {node.op_type for node in source.graph.node}
    excluded = [name for name in order.exclude if name in types]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns once a tensor about values that were rounded above
        half = convert_float_to_float16(
            source,
            min_positive_val=SMALLEST_FLOAT16,
            max_finite_val=LARGEST_FLOAT16,
            keep_io_types=True,
            disable_shape_infer=False,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *excluded] if excluded else None,
            node_block_list=[*(name for name in order.exclude if name not in types), *large] or None,
        )
    notes = [f"{clipped} weights exceed float16 and were clipped"] if clipped else []
    if large:
        notes.append(f"kept in float32, for their values exceed float16's 65504: {', '.join(large)}")
    if not seen:
        notes.append(UNSEEN)
    return Result(replace(model, program=_join(half)), tuple(notes))


def _join(program: Any) -> Any:
    """Let two neighbours in float32 pass float32 on: the converter casts to float16 and back between them."""
    import onnx

    graph = program.graph
    casts = {n.output[0]: n for n in graph.node if n.op_type == "Cast"}
    small = {name for name, n in casts.items() if n.attribute[0].i == onnx.TensorProto.FLOAT16}
    behind = {
        name: casts[n.input[0]].input[0]
        for name, n in casts.items()
        if n.attribute[0].i == onnx.TensorProto.FLOAT and n.input[0] in small
    }
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = behind.get(name, name)
    outputs = {output.name for output in graph.output}
    for unread in (behind.keys(), small):
        read = outputs | {name for node in graph.node for name in node.input}
        for name in sorted(unread - read):
            graph.node.remove(casts[name])
    return program


def _overflowing(program: Any, order: Order) -> tuple[list[str], bool]:
    """The operators that read or write values beyond float16 with some sample, and whether there was a sample."""
    import numpy as np
    import onnx

    inferred = onnx.shape_inference.infer_shapes(program)
    peaks: dict[str, float] = {}
    seen = False
    observe = observer(inferred) if order.samples else None
    for sample in order.samples if observe else ():
        seen = True
        for name, values in observe(sample) if observe else ():
            finite = np.abs(values[np.isfinite(values)])
            peaks[name] = max(peaks.get(name, 0.0), float(finite.max(initial=0.0)))
        order.on_sample()
    beyond = {name for name, peak in peaks.items() if peak > LARGEST_FLOAT16}
    found = [node.name for node in program.graph.node if beyond & {*node.input, *node.output}]
    return found, seen


def _round_weights(program: Any) -> int:
    """Round float32 weights to the nearest float16 in place (ties to even, overflow clipped); count the clipped."""
    import numpy as np
    import onnx

    clipped = 0
    for initializer in program.graph.initializer:
        if initializer.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(initializer)
            clipped += int((np.abs(values) > LARGEST_FLOAT16).sum())
            kept = np.clip(values, -LARGEST_FLOAT16, LARGEST_FLOAT16).astype(np.float16).astype(np.float32)
            initializer.CopyFrom(onnx.numpy_helper.from_array(kept, initializer.name))
    return clipped
