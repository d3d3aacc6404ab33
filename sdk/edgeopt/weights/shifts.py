# SPDX-License-Identifier: Apache-2.0
"""What rounded weights are off by on average, per output channel: a constant, which a bias can hold.

Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section 4.2, with the means
that samples show: E[W x] - E[W' x] over everything that reaches the layer in the float model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_graphs import observer

if TYPE_CHECKING:
    import numpy as np

LAYERS = ("Conv", "Gemm")
"""Layers that have a bias of their own. What an Add behind a MatMul adds is not known to be only its."""

_EXACT = "edgeopt.exact."
_CHANGED = "edgeopt.changed."


def shifts(
    program: Any,
    changed: Mapping[str, np.ndarray],
    samples: Sequence[Mapping[str, np.ndarray]],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """The mean change of layers whose weights are exchanged: output of the layer -> (channels,), float minus changed.

    `changed` has the new weights by the layers' outputs; every layer sees the inputs that it has in the float `program`.
    """
    import onnx

    twins = onnx.ModelProto()
    twins.CopyFrom(program)
    writer = {name: node for node in twins.graph.node for name in node.output}
    for output, values in changed.items():
        source = writer[output]
        weight = onnx.numpy_helper.from_array(values, f"{_CHANGED}{source.input[1]}.{output}")
        twins.graph.initializer.append(weight)
        for prefix, name in ((_EXACT, source.input[1]), (_CHANGED, weight.name)):
            twin = onnx.NodeProto()
            twin.CopyFrom(source)
            twin.name = twin.output[0] = prefix + output
            del twin.input[2:]  # a bias is the same in both
            twin.input[1] = name
            twins.graph.node.append(twin)
    found = means(
        twins,
        frozenset(prefix + output for prefix in (_EXACT, _CHANGED) for output in changed),
        samples,
        tick,
    )
    return {output: found[_EXACT + output] - found[_CHANGED + output] for output in changed}


def means(
    program: Any,
    names: frozenset[str],
    samples: Sequence[Mapping[str, np.ndarray]],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """The mean of every output channel: tensor -> (channels,)."""
    import numpy as np

    observe = observer(program, names)
    sums: dict[str, np.ndarray] = {}
    for sample in samples:
        for name, values in observe(sample):
            mean = values.mean(axis=(0, *range(2, values.ndim)), dtype=np.float64)
            sums[name] = sums[name] + mean if name in sums else mean
        tick()
    return {name: total / len(samples) for name, total in sums.items()}


def add_to_biases(program: Any, found: Mapping[str, np.ndarray]) -> int:
    """Add the shifts to the biases of a float model, which is changed; say of how many layers.

    A layer without a bias gets one. A bias that something else reads too is copied first.
    """
    import numpy as np
    import onnx

    constants = {tensor.name: tensor for tensor in program.graph.initializer}
    uses: dict[str, int] = {}
    for name in (name for node in program.graph.node for name in node.input):
        uses[name] = uses.get(name, 0) + 1
    count = 0
    for node in program.graph.node:
        shift = found.get(node.output[0]) if node.op_type in LAYERS else None
        given = node.input[2] if len(node.input) > 2 else ""
        if shift is None or (given and given not in constants):
            continue
        bias = onnx.numpy_helper.to_array(constants[given]) if given else np.zeros(len(shift), np.float32)
        moved = onnx.numpy_helper.from_array((bias + shift).astype(bias.dtype), given)
        if given and uses[given] == 1 and list(moved.dims) == list(constants[given].dims):
            constants[given].CopyFrom(moved)
        else:
            moved.name = f"{node.output[0]}_bias"
            program.graph.initializer.append(moved)
            del node.input[2:]
            node.input.append(moved.name)
        count += 1
    return count
