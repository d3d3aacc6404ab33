# SPDX-License-Identifier: Apache-2.0
"""From the batch normalizations of an ONNX graph to what every tensor of it takes.

Rules:
- What batch normalization says counts more than what is computed: it knows its input, and promises its output.
- Between two of them, each operator's rule says what follows (`edgeopt.uncalibrated.operators`).
- A tensor that no rule reaches is not in the answer; the next batch normalization knows again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_products import attributes
from edgeopt.uncalibrated.operators import LINEAR, Graph, spread_of, within
from edgeopt.uncalibrated.spread import Spread

if TYPE_CHECKING:
    import numpy as np

_EPSILON = 1e-5  # of BatchNormalization where it names none


@dataclass
class Reading:
    """What was read: the spread of every tensor known, how many batch normalizations, and layers without one."""

    spreads: dict[str, Spread] = field(default_factory=dict)
    norms: int = 0
    layers: int = 0
    assumed: tuple[str, ...] = ()
    """Layers that none follows: their ranges rest on their inputs being independent."""


def propagate(program: Any, inputs: Mapping[str, Spread]) -> Reading:
    """Read a graph whose batch normalizations still stand and whose constants and shapes are inferred."""
    reading = Reading(dict(inputs))
    graph = Graph(_constants(program), _shapes(program), reading.spreads)
    promised = _promised(program, graph)
    layers: list[str] = []
    for node in program.graph.node:
        name = node.output[0] if node.output else ""
        if not name or name in graph.constants:
            continue
        found = spread_of(graph, node, name)
        if name in promised and (found is None or found.is_assumed):
            found = within(graph, node, promised[name])
        reading.norms += node.op_type == "BatchNormalization" and name in promised
        if node.op_type in LINEAR:
            layers.append(name)
        if found is not None and _is_finite(found):
            reading.spreads |= {output: found for output in node.output if output}
    reading.layers = len(layers)
    reading.assumed = tuple(name for name in layers if name not in promised)
    return reading


def _constants(program: Any) -> dict[str, np.ndarray]:
    import onnx

    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in program.graph.initializer}
    for node in program.graph.node:
        if node.op_type == "Constant" and "value" in attributes(node):
            found[node.output[0]] = onnx.numpy_helper.to_array(attributes(node)["value"])
    return found


def _promised(program: Any, graph: Graph) -> dict[str, Spread]:
    """What batch normalizations in evaluation mode say of what they write, and of what they read."""
    import numpy as np

    found: dict[str, Spread] = {}
    for node in program.graph.node:
        if node.op_type != "BatchNormalization" or attributes(node).get("training_mode", 0):
            continue
        values = [graph.constants.get(name) for name in list(node.input)[1:5]]
        if any(array is None for array in values):
            continue
        gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in values)
        deviation = np.sqrt(np.maximum(variance, 0) + float(attributes(node).get("epsilon", _EPSILON)))
        found[node.output[0]] = Spread.normal(node.output[0], beta, np.abs(gamma))
        found.setdefault(node.input[0], Spread.normal(node.input[0], mean, deviation))
    return found


def _shapes(program: Any) -> dict[str, tuple[int, ...]]:
    graph = program.graph
    return {
        info.name: tuple(axis.dim_value for axis in info.type.tensor_type.shape.dim)
        for info in (*graph.input, *graph.value_info, *graph.output)
    }


def _is_finite(found: Spread) -> bool:
    import numpy as np

    return bool(np.isfinite(found.values).all())
