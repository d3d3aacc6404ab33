# SPDX-License-Identifier: Apache-2.0
"""Half precision: float32 weights and activations become float16; inputs and outputs stay float32.

Values that float16 cannot hold are clipped to its range by the converter; the note says how many weights were.
Source: IEEE 754-2008 binary16; ONNX Runtime, "Float16 and mixed precision models".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgeopt.passes import Order, Result
from edgeopt_converters.model import Model

FORMATS = ("onnx",)
EXTRA = "onnx"

LARGEST_FLOAT16 = 65504.0
SMALLEST_FLOAT16 = 2.0**-24
"""The smallest subnormal; what is smaller becomes zero."""


def apply(model: Model, order: Order) -> Result:
    """Cast an ONNX model to float16; `order.exclude` names operators or types that stay in float32."""
    import warnings

    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    source = onnx.ModelProto()
    source.CopyFrom(model.program)
    types = {node.op_type for node in source.graph.node}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns once a tensor about what `_lost` counts
        half = convert_float_to_float16(
            source,
            min_positive_val=SMALLEST_FLOAT16,
            max_finite_val=LARGEST_FLOAT16,
            keep_io_types=True,
            disable_shape_infer=False,
            op_block_list=[name for name in order.exclude if name in types] or None,
            node_block_list=[name for name in order.exclude if name not in types] or None,
        )
    large, small = _lost(model.program)
    notes = []
    if large:
        notes.append(f"{large} weights exceed float16 and were clipped to {LARGEST_FLOAT16:.0f}")
    if small:
        notes.append(f"{small} weights are too small for float16 and became its smallest value")
    return Result(replace(model, program=half), tuple(notes))


def _lost(program: Any) -> tuple[int, int]:
    import numpy as np
    import onnx

    large = small = 0
    for initializer in program.graph.initializer:
        if initializer.data_type == onnx.TensorProto.FLOAT:
            values = np.abs(onnx.numpy_helper.to_array(initializer))
            large += int((values > LARGEST_FLOAT16).sum())
            small += int(((values > 0) & (values < SMALLEST_FLOAT16)).sum())
    return large, small
