# SPDX-License-Identifier: Apache-2.0
"""The scale of every output channel of a float ONNX model's weights, found for a whole tensor at once.

ONNX Runtime's quantizer finds the same ones in a loop over channels, which is most of its time on a small model.

Symmetric int8, scale = max|w| / 127 (Krishnamoorthi 2018, section 3.1), in ONNX Runtime's own arithmetic
(`compute_scale_zp`): the difference of the ends in float64, divided, then rounded to float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from edgeopt.simulate.layers import output_axis, parse
from edgeopt.simulate.saturation import narrow_ranges, weight_layers

LARGEST = 127


def channel_scales(
    program: Any, layers: Collection[str], *, pair_safe: bool
) -> dict[str, list[dict[str, Any]]]:
    """Give `TensorQuantOverrides` for the weights of these layers of a *float* model: one entry a channel, by weight.

    With `pair_safe` a channel's scale is widened only as far as its worst pair of weights needs, so that no x86 CPU
    overflows. A weight that something else uses too is left to the quantizer, unless it must be widened.
    """
    import numpy as np
    from onnx import numpy_helper
    from onnxruntime.quantization import QuantType

    weights = {tensor.name: tensor for tensor in program.graph.initializer}
    uses = Counter(name for node in program.graph.node for name in node.input)
    known = set(weight_layers(program)) & set(layers)
    narrowed = narrow_ranges(program, sorted(known)) if pair_safe else {}
    zero = np.array(0, np.int8)
    found: dict[str, list[dict[str, Any]]] = {}
    for node in (parse(node) for node in program.graph.node if node.name in known):
        weight, axis = node.inputs[1], output_axis(node)
        if weight in narrowed:
            largest = np.asarray(narrowed[weight].magnitudes, np.float32)
        elif uses[weight] == 1:
            values = numpy_helper.to_array(weights[weight])
            largest = np.abs(values).max(axis=tuple(n for n in range(values.ndim) if n != axis), initial=0.0)
        else:
            continue
        found[weight] = [
            {"axis": axis, "quant_type": QuantType.QInt8, "scale": scale, "zero_point": zero}
            for scale in _scales(largest)
        ]
    return found


def _scales(largest: Any) -> Any:
    import numpy as np

    scales = 2.0 * largest.astype(np.float64) / (2 * LARGEST)
    return np.where(scales < np.finfo(np.float32).tiny, 1.0, scales).astype(np.float32)
