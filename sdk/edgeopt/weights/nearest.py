# SPDX-License-Identifier: Apache-2.0
"""The weights that a native quantizer would make of a float ONNX model: each one on the nearest point of its int8 grid.

Symmetric, scale = max|w| / 127, of a whole tensor or of each output channel (Jacob et al. 2018, section 2.1;
Krishnamoorthi 2018, section 3.1). With `pair_safe` a channel's range is as wide as `narrow_ranges` makes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeopt.simulate.saturation import narrow_ranges, weight_layers

if TYPE_CHECKING:
    import numpy as np

PRODUCTS = ("Conv", "Gemm", "MatMul")
LARGEST = 127


def nearest(
    program: Any, *, per_channel: bool = True, pair_safe: bool = False, products: tuple[str, ...] = PRODUCTS
) -> dict[str, np.ndarray]:
    """The rounded weights of all products whose weight is a constant, by its name, in the type that it has."""
    import numpy as np
    import onnx

    constants = {tensor.name: tensor for tensor in program.graph.initializer}
    wide = narrow_ranges(program, weight_layers(program)) if pair_safe and per_channel else {}
    found: dict[str, np.ndarray] = {}
    for node in program.graph.node:
        if node.op_type not in products or len(node.input) < 2 or node.input[1] not in constants:
            continue
        values = onnx.numpy_helper.to_array(constants[node.input[1]])
        axis = _outputs_axis(node) % values.ndim
        others = tuple(index for index in range(values.ndim) if index != axis or not per_channel)
        largest = np.abs(values).max(axis=others, keepdims=True)
        if node.input[1] in wide:
            shape = [-1 if index == axis else 1 for index in range(values.ndim)]
            largest = np.asarray(wide[node.input[1]].magnitudes, values.dtype).reshape(shape)
        scale = np.where(largest > 0, largest / LARGEST, 1)
        found[node.input[1]] = (np.clip(np.rint(values / scale), -LARGEST, LARGEST) * scale).astype(
            values.dtype
        )
    return found


def _outputs_axis(node: Any) -> int:
    is_rows = node.op_type == "Conv" or any(entry.name == "transB" and entry.i for entry in node.attribute)
    return 0 if is_rows else -1
