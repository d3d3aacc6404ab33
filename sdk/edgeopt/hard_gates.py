# SPDX-License-Identifier: Apache-2.0
"""Hard-sigmoid and hard-swish in operators that every runtime has in integers: a convolution that is clipped, a product.

A hard-sigmoid is clip(a * x + b, 0, 1). So it is
- behind a convolution that only it reads (squeeze-and-excite): that convolution with other weights, and a bound;
- elsewhere (hard-swish, x * gate(x)): a depthwise 1x1 convolution and a bound. Factors that `equalize_gates` took out
  of each channel before the gate are the weights of that convolution, which integers hold per channel.

A bound of [0, 1] costs ONNX Runtime nothing: its rounding absorbs it. LiteRT fuses ReLU6 and no other bound, so for it
gates are six times as large, and what reads the product takes the factor back, or a product by a sixth does.
Source of the gates: Howard et al. 2019, "Searching for MobileNetV3", section 5.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt.fusion.editing import Editor

if TYPE_CHECKING:
    import numpy as np

_TIES = frozenset(
    {"GlobalAveragePool", "AveragePool", "ReduceMean", "MaxPool", "Identity", "Reshape", "Flatten", "Squeeze"}
)
"""What scales with its first input."""

_ALPHA, _BETA = 0.2, 0.5
"""The defaults of the operator HardSigmoid."""


@dataclass(frozen=True)
class Respelled:
    """The program, how many gates went into their convolution, how many got one, and how many were left."""

    program: Any
    into_layers: int
    as_layers: int
    left: int

    def sentence(self) -> str:
        """What was done, for a report; empty where there was no gate."""
        done = self.into_layers + self.as_layers
        if not done:
            return ""
        text = f"{done} hard gates in integers: {self.into_layers} inside the layer before, "
        return f"{text}{self.as_layers} as a depthwise convolution; {self.left} left in floats"


def respell(program: Any, *, bound: float = 1.0, exclude: frozenset[str] = frozenset()) -> Respelled:
    """Spell every HardSigmoid of an ONNX program as a bounded convolution; `exclude` names nodes to leave.

    The program's outputs keep their values but for float rounding; the program that is given is not changed.
    """
    editor = Editor(program)
    counts = {"into": 0, "as": 0, "left": 0}
    for node in editor.nodes():
        if node.op_type == "HardSigmoid" and not node.domain:
            counts["left" if node.name in exclude else _respell(editor, node, bound)] += 1
    if not counts["into"] + counts["as"]:
        return Respelled(program, 0, 0, counts["left"])
    return Respelled(editor.program(), counts["into"], counts["as"], counts["left"])


def _respell(editor: Editor, gate: Any, bound: float) -> str:
    given = {entry.name: entry.f for entry in gate.attribute}
    slope, shift = (
        bound * given.get(name, default) for name, default in (("alpha", _ALPHA), ("beta", _BETA))
    )
    layer = editor.writer(str(gate.input[0]))
    if layer is not None and editor.is_private(layer.output[0]) and _has_constant_weights(editor, layer):
        _into(editor, layer, slope, shift)
        found = "into"
    elif not _as_layer(editor, gate, slope, shift):
        return "left"
    else:
        found = "as"
    source = str(gate.input[0])
    name = gate.name or gate.output[0]
    ends = [editor.put(_array(value), f"{name}_{end}") for end, value in (("low", 0.0), ("high", bound))]
    editor.become(gate, "Clip", [source, *ends])
    if bound != 1.0:
        _take_back(editor, gate, 1.0 / bound)
    return found


def _into(editor: Editor, layer: Any, slope: float, shift: float) -> None:
    """Let a convolution give what the bound is applied to."""
    import numpy as np

    weights = editor.weight(layer.input[1])
    assert weights is not None  # for the type checker: asked before
    bias = editor.weight(layer.input[2]) if _has_bias(layer) else np.zeros(weights.shape[0])
    assert bias is not None  # for the type checker: asked before
    changed = bias * slope + shift
    kernel = editor.replace(layer, 1, weights * slope)
    if _has_bias(layer):
        added = editor.replace(layer, 2, changed)
    else:
        added = editor.put(changed, f"{layer.output[0]}_shift")
    editor.change(layer, [layer.input[0], kernel, added])


def _as_layer(editor: Editor, gate: Any, slope: float, shift: float) -> bool:
    """Put a depthwise 1x1 convolution before a gate, in the place of factors per channel where there are some."""
    import numpy as np
    import onnx

    source = str(gate.input[0])
    channels = _channels(editor, source)
    if channels is None or editor.rank(source) != 4:
        return False
    factors = np.ones(channels)
    before = editor.writer(source)
    place = _factors_at(editor, before, channels)
    if before is not None and place is not None:
        values, other = editor.weight(before.input[place]), str(before.input[1 - place])
        assert values is not None  # for the type checker: `_factors_at` asked
        factors = factors * values.reshape(-1)
        if editor.is_private(source):
            source = other
        else:  # the product reads it too
            _as_line(editor, before, other, factors)
            factors = np.ones(channels)
    name = f"{gate.name or gate.output[0]}_line"
    weights = editor.put((factors * slope).reshape(channels, 1, 1, 1), f"{name}_weight")
    bias = editor.put(np.full(channels, shift), f"{name}_bias")
    made = onnx.helper.make_node(
        "Conv", [source, weights, bias], [f"{name}_out"], name, group=channels, kernel_shape=[1, 1]
    )
    editor.add(made, behind=before)
    editor.change(gate, [made.output[0]])
    if before is not None and not editor.readers(before.output[0]) and not editor.is_output(before.output[0]):
        editor.remove(before)
    return True


def _factors_at(editor: Editor, node: Any | None, channels: int) -> int | None:
    """Which input of a product has one factor for each channel, or None where it is no such product."""
    if node is None or node.op_type != "Mul" or len(node.input) != 2:
        return None
    for place in (0, 1):
        values = editor.weight(node.input[place])
        if values is not None and values.size == channels > 1 and values.shape[-2:] == (1, 1):
            return place
    return None


def _as_line(editor: Editor, product: Any, source: str, factors: np.ndarray) -> None:
    """Spell a product by factors of channels as the convolution that it is."""
    weights = editor.put(factors.reshape(-1, 1, 1, 1), f"{product.name or product.output[0]}_weight")
    editor.become(product, "Conv", [source, weights], group=factors.size, kernel_shape=[1, 1])


def _take_back(editor: Editor, gate: Any, factor: float) -> None:
    """Take a gate's factor out of the layers that read it, or behind it."""
    import onnx

    readers = _linear_readers(editor, gate.output[0])
    if readers is not None:
        for layer in readers:
            weights = editor.weight(layer.input[1])
            if weights is not None:
                editor.change(
                    layer, [layer.input[0], editor.replace(layer, 1, weights * factor), *layer.input[2:]]
                )
        return
    name = str(gate.output[0])
    bounded = f"{name}_bounded"
    rank = editor.rank(name) or 0
    editor.change(gate, list(gate.input), [bounded])
    constant = editor.put(_array(factor).reshape((1,) * rank), f"{name}_factor")
    editor.add(onnx.helper.make_node("Mul", [bounded, constant], [name], f"{name}_scaled"), behind=gate)


def _linear_readers(editor: Editor, name: str) -> list[Any] | None:
    """The layers that a tensor reaches through what scales with it; None where something else reads it."""
    found: dict[int, Any] = {}
    todo, seen = [name], {name}
    while todo:
        now = todo.pop()
        if editor.is_output(now):
            return None
        for node in editor.readers(now):
            if _has_constant_weights(editor, node) and node.input[0] == now:
                found[id(node)] = node
            elif (node.op_type in _TIES and node.input[0] == now) or _is_product_of_two(node, seen):
                todo.append(node.output[0])
                seen.add(node.output[0])
            else:
                return None
    return list(found.values())


def _is_product_of_two(node: Any, seen: set[str]) -> bool:
    """Whether a node multiplies one tensor that carries the factor by one that does not."""
    return node.op_type == "Mul" and sum(name in seen for name in node.input) == 1


def _has_constant_weights(editor: Editor, node: Any) -> bool:
    if node.op_type not in ("Conv", "Gemm") or node.domain or editor.weight(node.input[1]) is None:
        return False
    if node.op_type == "Gemm" and any(
        entry.name in ("alpha", "beta") and entry.f != 1.0 for entry in node.attribute
    ):
        return False
    return not _has_bias(node) or editor.weight(node.input[2]) is not None


def _has_bias(node: Any) -> bool:
    return len(node.input) > 2 and bool(node.input[2])


def _channels(editor: Editor, name: str) -> int | None:
    """How many channels a tensor has, read off the convolution that it comes from."""
    for _ in range(4):
        node = editor.writer(name)
        if node is None:
            return None
        if node.op_type == "Conv":
            weights = editor.weight(node.input[1])
            return None if weights is None else int(weights.shape[0])
        if node.op_type not in ("Mul", "Clip", "Relu"):
            return None
        name = next((entry for entry in node.input if editor.constant(entry) is None), "")
    return None


def _array(value: float) -> np.ndarray:
    import numpy as np

    return np.asarray(value, np.float64)
