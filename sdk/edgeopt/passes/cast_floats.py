# SPDX-License-Identifier: Apache-2.0
"""Half precision: float32 weights and activations become float16; inputs and outputs stay float32.

Weights that float16 cannot hold are clipped to its range, and a note says how many.
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
    # the converter would turn what is below float16's smallest value into that value instead of rounding it
    clipped = _round_weights(source)
    types = {node.op_type for node in source.graph.node}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns once a tensor about values that were rounded above
        half = convert_float_to_float16(
            source,
            min_positive_val=SMALLEST_FLOAT16,
            max_finite_val=LARGEST_FLOAT16,
            keep_io_types=True,
            disable_shape_infer=False,
            op_block_list=[name for name in order.exclude if name in types] or None,
            node_block_list=[name for name in order.exclude if name not in types] or None,
        )
    return Result(
        replace(model, program=half),
        (f"{clipped} weights exceed float16 and were clipped",) if clipped else (),
    )


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
