# SPDX-License-Identifier: Apache-2.0
"""What an operator makes of what its inputs take: one rule a kind of operator.

Rules:
- What is computed value by value is computed at the nodes of a `Spread`, by ONNX's own reference implementation. Two
  tensors of one root are taken together; others as if they knew nothing of each other.
- Of a convolution or a product, mean and variance follow from the weights, inputs independent of each other.
- None means that no rule says anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.onnx_products import attributes
from edgeopt.uncalibrated.spread import Spread, weights

if TYPE_CHECKING:
    import numpy as np

# fmt: off
VALUE_BY_VALUE = frozenset((
    "Abs", "Add", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
    "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Selu",
    "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu",
))
KEEPING = frozenset(("Cast", "Dropout", "GlobalMaxPool", "Identity", "MaxPool", "Pad", "Resize"))
"""What moves values within their channel, or chooses among them."""

MOVING = frozenset((
    "DepthToSpace", "Expand", "Flatten", "Gather", "ReduceMax", "ReduceMin", "Reshape", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
))
"""What may mix channels or axes; told apart afterwards only where it can be proven."""
# fmt: on

AVERAGED = 0.75
"""The standard deviation of an average, as a share of that of what it averages: 1 where neighbours are all alike, less where
they are not. Against 1, EfficientNet-Lite0 lost 0.1 dB (and 1.4 dB at 0.54), a ResNet8 on CIFAR-10 gained 0.8 dB."""

_FAR = 1e6  # what an operator gives beyond a hundredth of this is taken as without end
_COARSE = 6  # every so many nodes of two tensors that know nothing of each other meet: 17 by 17


@dataclass(frozen=True)
class Graph:
    """Constants and shapes by tensor name, and the spreads that are known so far."""

    constants: Mapping[str, np.ndarray]
    shapes: Mapping[str, tuple[int, ...]]
    spreads: dict[str, Spread]

    def spread(self, name: str) -> Spread | None:
        """What a tensor takes, where that is known."""
        return self.spreads.get(name)


def spread_of(graph: Graph, node: Any, name: str) -> Spread | None:
    """Say what a node writes under `name`, or None where no rule does."""
    if node.domain not in ("", "ai.onnx"):
        return None
    rule = LINEAR.get(node.op_type) or _OTHERS.get(node.op_type)
    if rule is not None:
        return rule(graph, node, name)
    if node.op_type in VALUE_BY_VALUE:
        return _value_by_value(graph, node, name)
    return None


def within(graph: Graph, node: Any, promise: Spread) -> Spread:
    """What is promised, where the operator that writes it can reach: no ReLU writes less than zero."""
    import numpy as np

    edges = [edge for edge in node.input if edge and edge not in graph.constants]
    if node.op_type not in VALUE_BY_VALUE or len(set(edges)) != 1:
        return promise
    magnitudes = np.logspace(-3, np.log10(_FAR), 200)
    everything = np.concatenate([-magnitudes, [0.0], magnitudes])[:, None]
    found = _compute(graph, node, {edges[0]: everything}, max(len(graph.shapes.get(node.output[0], ())), 2))
    if found is None or found.shape[1] not in (1, promise.channels):
        return promise
    low, high = np.nan_to_num(found).min(0), np.nan_to_num(found).max(0)
    low, high = np.where(low < -_FAR / 100, -np.inf, low), np.where(high > _FAR / 100, np.inf, high)
    return Spread(promise.root, np.clip(promise.values, low, high))


def _value_by_value(graph: Graph, node: Any, name: str) -> Spread | None:
    """Compute at the nodes of the inputs; of two roots each value of one meets each of the other."""
    import numpy as np

    known = {edge: graph.spread(edge) for edge in node.input if edge and edge not in graph.constants}
    spreads = [spread for spread in known.values() if spread is not None]
    if not spreads or len(spreads) < len(known):
        return None
    rank = max(len(graph.shapes.get(name, ())), 2)
    is_assumed = any(spread.is_assumed for spread in spreads)
    if len({spread.root for spread in spreads}) == 1:
        values = _compute(
            graph, node, {edge: spread.values for edge, spread in known.items() if spread}, rank
        )
        return None if values is None else Spread(spreads[0].root, values, is_assumed)
    if len(known) != 2:
        return None
    first, second = (spread.values[::_COARSE] for spread in spreads)
    rows, columns = (grid.reshape(-1) for grid in np.meshgrid(*(range(len(first)),) * 2, indexing="ij"))
    values = _compute(graph, node, dict(zip(known, (first[rows], second[columns]), strict=True)), rank)
    if values is None:
        return None
    coarse = weights()[::_COARSE] / weights()[::_COARSE].sum()
    share = coarse[rows] * coarse[columns]
    mean = share @ values
    found = Spread.normal(name, mean, np.sqrt(share @ (values - mean) ** 2), is_assumed=True)
    return Spread(name, np.clip(found.values, values.min(0), values.max(0)), is_assumed=True)


def _compute(graph: Graph, node: Any, given: Mapping[str, np.ndarray], rank: int) -> np.ndarray | None:
    """Run one operator over (points, channels), which stand on the first two axes; None where it does not fit."""
    import numpy as np
    import onnx
    from onnx.reference import ReferenceEvaluator

    edges = list(dict.fromkeys(edge for edge in node.input if edge))
    feeds = {
        edge: given[edge].reshape(*given[edge].shape, *[1] * (rank - 2)).astype(np.float32)
        if edge in given
        else graph.constants[edge]
        for edge in edges
    }
    program = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node],
            "one",
            [onnx.helper.make_tensor_value_info(edge, onnx.TensorProto.FLOAT, None) for edge in edges],
            [onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)],
        ),
        opset_imports=[onnx.helper.make_opsetid("", _opset(node))],
    )
    points = len(next(iter(given.values())))
    try:
        with np.errstate(all="ignore"):
            found = np.asarray(ReferenceEvaluator(program).run(None, feeds)[0], np.float64)
    except (RuntimeError, ValueError, TypeError, IndexError):  # shapes that do not meet on two axes
        return None
    if found.ndim != rank or found.shape[0] != points or found.size != points * found.shape[1]:
        return None
    return found.reshape(points, -1)


def _opset(node: Any) -> int:
    """An opset that has the operator as it is spelled: activations younger than 18 in theirs."""
    return {"Mish": 18, "Gelu": 20, "Swish": 24}.get(node.op_type, 18)


def _keep(graph: Graph, node: Any, name: str) -> Spread | None:  # noqa: ARG001 - one form for every rule
    return graph.spread(node.input[0])


def _move(graph: Graph, node: Any, name: str) -> Spread | None:
    """Keep channels apart where the second axis still has them alone; else all become one."""
    import numpy as np

    found = graph.spread(node.input[0])
    if found is None:
        return None
    before, after = graph.shapes.get(node.input[0], ()), graph.shapes.get(name, ())
    is_same_axis = len(after) > 1 and len(before) > 1 and after[1] == before[1] == found.channels
    inner = int(np.prod(before[2:])) if before else 0
    if is_same_axis and (inner == 1 or node.op_type.startswith("Reduce")):
        return found
    is_flattened = node.op_type in ("Flatten", "Reshape") and len(after) == 2 and before[:1] == after[:1]
    if is_flattened and after[1] == found.channels * inner:
        return Spread(found.root, np.repeat(found.values, inner, axis=1), found.is_assumed)
    return found.pooled(name)


def _average(graph: Graph, node: Any, name: str) -> Spread | None:
    """Normal, `AVERAGED` as wide as what is averaged, and within its ends: no rare value stands alone in an average.

    With the ends of what it averages instead, a ResNet on CIFAR-10 lost 3.8 dB by the tensor before its classifier.
    """
    import numpy as np

    found = _move(graph, node, name) if node.op_type == "ReduceMean" else graph.spread(node.input[0])
    if found is None:
        return None
    made = Spread.normal(name, found.mean, AVERAGED * np.sqrt(found.variance))
    values = np.clip(made.values, found.values.min(0), found.values.max(0))
    return Spread(name, values, found.is_assumed)


def _concat(graph: Graph, node: Any, name: str) -> Spread | None:
    import numpy as np

    spreads = [graph.spread(edge) for edge in node.input]
    shapes = [graph.shapes.get(edge, ()) for edge in node.input]
    if any(spread is None for spread in spreads) or any(len(shape) < 2 for shape in shapes):
        return None
    values = [
        np.broadcast_to(
            spread.values, (len(spread.values), shape[1] if spread.channels == 1 else spread.channels)
        )
        for spread, shape in zip(spreads, shapes, strict=True)
        if spread is not None
    ]
    joined = Spread(name, np.concatenate(values, axis=1))
    return joined if attributes(node).get("axis") in (1, 1 - len(shapes[0])) else joined.pooled(name)


def _shares(graph: Graph, node: Any, name: str) -> Spread | None:  # noqa: ARG001
    """Probabilities: anything from 0 to 1."""
    import numpy as np

    return Spread(name, (np.cumsum(weights()) - weights() / 2)[:, None] * (1 + 1e-9))


def _convolution(graph: Graph, node: Any, name: str) -> Spread | None:
    """Of a convolution; transposed ones are left to what follows."""
    import numpy as np

    found, weight = graph.spread(node.input[0]), graph.constants.get(node.input[1])
    if found is None or weight is None:
        return None
    groups = int(attributes(node).get("group", 1))
    wide = weight.astype(np.float64)
    inputs = weight.shape[1] * groups
    mean, variance = (
        np.repeat(np.broadcast_to(values, (inputs,)).reshape(groups, -1), weight.shape[0] // groups, axis=0)
        for values in (found.mean, found.variance)
    )
    axes = tuple(range(2, wide.ndim))
    return _normal(
        name,
        (wide.sum(axes) * mean).sum(1) + _bias(graph, node),
        ((wide**2).sum(axes) * variance).sum(1),
    )


def _product(graph: Graph, node: Any, name: str) -> Spread | None:
    """Of a matrix with constants on the right; only with two axes are channels on the axis that they are read from."""
    import numpy as np

    found, weight = graph.spread(node.input[0]), graph.constants.get(node.input[1])
    given = attributes(node)
    if found is None or weight is None or weight.ndim != 2 or given.get("transA", 0):
        return None
    matrix = weight.astype(np.float64) * float(given.get("alpha", 1.0))
    matrix = matrix if given.get("transB", 0) else matrix.T  # (outputs, inputs)
    is_flat = len(graph.shapes.get(node.input[0], ())) == 2
    if not is_flat or found.channels not in (1, matrix.shape[1]):
        found = found.pooled(name)
    mean, variance = (np.broadcast_to(v, (matrix.shape[1],)) for v in (found.mean, found.variance))
    made = _normal(name, matrix @ mean + _bias(graph, node), matrix**2 @ variance)
    return made if is_flat or made is None else made.pooled(name)


def _normal(name: str, mean: np.ndarray, variance: np.ndarray) -> Spread:
    import numpy as np

    return Spread.normal(name, mean, np.sqrt(variance), is_assumed=True)


def _bias(graph: Graph, node: Any) -> Any:
    if len(node.input) < 3 or not node.input[2] or node.input[2] not in graph.constants:
        return 0.0
    beta = float(attributes(node).get("beta", 1.0)) if node.op_type == "Gemm" else 1.0
    return graph.constants[node.input[2]].astype("float64").reshape(-1) * beta


def _unknown(graph: Graph, node: Any, name: str) -> Spread | None:  # noqa: ARG001
    return None


_Rule = Callable[[Graph, Any, str], Spread | None]
LINEAR: dict[str, _Rule] = {
    "Conv": _convolution,
    "Gemm": _product,
    "MatMul": _product,
    "ConvTranspose": _unknown,
}
_OTHERS: dict[str, _Rule] = {
    **dict.fromkeys(KEEPING, _keep),
    **dict.fromkeys(MOVING, _move),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "ReduceMean"), _average),
    "Concat": _concat,
    "Softmax": _shares,
}
