# SPDX-License-Identifier: Apache-2.0
"""Write what was learned in PyTorch into the ONNX program that it was learned from.

The graph, its names and its operators stay what they were, so that whatever knows the program knows the trained one.
Pure numpy: neither side is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeopt_wire.errors import RuntimeFailure


def with_weights(program: Any, state: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """Copy `program` with the tensors of `state`; `names` says which initializer is which of them.

    Raises:
        RuntimeFailure: A tensor has another shape than its initializer.
    """
    import numpy as np
    import onnx

    found = onnx.ModelProto()
    found.CopyFrom(program)
    for tensor in found.graph.initializer:
        place = names.get(tensor.name, "")
        if place not in state:
            continue
        before = onnx.numpy_helper.to_array(tensor)
        after = np.asarray(state[place].detach().numpy(), before.dtype)
        if after.shape != before.shape:
            raise RuntimeFailure(
                f"training gave {tensor.name!r} the shape {after.shape}, the model has {before.shape}; this is a fault "
                "of edgeopt, report the model"
            )
        if not np.array_equal(after, before):
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(after), tensor.name))
    return found
