# SPDX-License-Identifier: Apache-2.0
"""Activations that exporters spelled out become the operators that runtimes know.

- Min and Max with constants, and Clip behind ReLU or Clip: one Clip (ReLU6).
- Clip(x + a, 0, b) / b: HardSigmoid; (x * Clip(x + a, 0, b)) / b: x * HardSigmoid(x), which is hard-swish. Not the
  operator HardSwish, for ONNX Runtime takes that apart into these two anyway, and in an int8 net the two took 0.90 ms
  where the spelled form with its four integer operators took 0.99 (4 convolutions of 48 channels, one thread).
- 1 / (1 + exp(-x)): Sigmoid; x / (1 + exp(-x)): x * Sigmoid(x), which is SiLU (Swish exists from opset 24 on only).
- PRelu with one slope: LeakyRelu, which has an integer kernel.
Source: Howard et al. 2019, "Searching for MobileNetV3", section 5.2 (hard-swish); ONNX operators Clip-13,
HardSigmoid-6, LeakyRelu-16.
"""

from __future__ import annotations

from typing import Any

from edgeopt.fusion.editing import Editor

_NEAR = 1e-6
"""How exactly b times its factor must be 1: spelled constants are float32."""

_CLIP_OPSET = 12  # bounds are inputs from opset 11 on, of any type from 12 on
_LEAKY_OPSET = 6


def clip(editor: Editor, node: Any) -> str:
    """Write Min, Max and chains of bounds as one Clip."""
    bounds = _bounds(editor, node)
    if bounds is None or editor.opset < _CLIP_OPSET:
        return ""
    source, low, high = bounds
    inner = editor.writer(source)
    is_chain = inner is not None and editor.is_private(source)
    inside = _bounds(editor, inner) if is_chain and inner is not None else None
    if inside is not None:
        # the outer bounds clip what the inner ones let through
        source, low, high = inside[0], min(max(inside[1], low), high), max(min(inside[2], high), low)
    elif node.op_type in ("Clip", "Relu"):
        return ""
    if (low, high) == (0.0, float("inf")):
        editor.become(node, "Relu", [source])
        _drop(editor, inner if inside is not None else None)
        return "bounds spelled as Min, Max or chains into ReLU"
    name = node.name or node.output[0]
    ends = [
        editor.put(_array(v), f"{name}_{k}") if abs(v) < float("inf") else ""
        for k, v in (("low", low), ("high", high))
    ]
    editor.become(node, "Clip", [source, *(ends if ends[1] else ends[:1])])
    _drop(editor, inner if inside is not None else None)
    return "bounds spelled as Min, Max or chains into Clip"


def hard_sigmoid(editor: Editor, node: Any) -> str:
    """Write Clip(x + a, 0, b) / b as HardSigmoid, also where x was multiplied in before the division."""
    found = _scaled(editor, node)
    if found is None:
        return ""
    inner, factor = found
    if not editor.is_private(inner):
        return ""
    writer = editor.writer(inner)
    if writer is None:
        return ""
    if gate := _gate(editor, inner, factor):
        editor.become(node, "HardSigmoid", [gate[0]], alpha=factor, beta=gate[1] * factor)
        _drop(editor, writer)
        return "HardSigmoid"
    if writer.op_type != "Mul" or len(writer.input) != 2:
        return ""
    for place in (0, 1):
        name, other = str(writer.input[place]), str(writer.input[1 - place])
        gate = _gate(editor, name, factor)
        if gate and gate[0] == other and editor.is_private(name):
            bounded = editor.writer(name)
            editor.become(writer, "HardSigmoid", [other], alpha=factor, beta=gate[1] * factor)
            editor.become(node, "Mul", [other, writer.output[0]])
            _drop(editor, bounded)
            return "hard-swish into x * HardSigmoid(x)"
    return ""


def sigmoid(editor: Editor, node: Any) -> str:
    """Write 1 / (1 + exp(-x)) as Sigmoid and x / (1 + exp(-x)) as x * Sigmoid(x)."""
    if node.op_type not in ("Div", "Reciprocal"):
        return ""
    added = editor.writer(node.input[-1])
    if added is None or added.op_type != "Add" or not editor.is_private(node.input[-1]):
        return ""
    power = next((name for name in added.input if editor.scalar(name) is None), "")
    if not any(editor.scalar(name) == 1.0 for name in added.input) or not editor.is_private(power):
        return ""
    exponential = editor.writer(power)
    if exponential is None or exponential.op_type != "Exp" or not editor.is_private(exponential.input[0]):
        return ""
    negated = editor.writer(exponential.input[0])
    if negated is None or negated.op_type != "Neg":
        return ""
    source = str(negated.input[0])
    if node.op_type == "Reciprocal" or (
        editor.scalar(node.input[0]) == 1.0 and _is_narrow(editor, node.input[0])
    ):
        editor.become(node, "Sigmoid", [source])
    elif node.input[0] == source:
        editor.become(added, "Sigmoid", [source])
        editor.become(node, "Mul", [source, added.output[0]])
    else:
        return ""
    for unused in (added, exponential, negated):
        _drop(editor, unused)
    return "Sigmoid"


def leaky_relu(editor: Editor, node: Any) -> str:
    """Write PRelu with one slope as LeakyRelu."""
    if node.op_type != "PRelu" or node.domain or editor.opset < _LEAKY_OPSET:
        return ""
    slope = editor.scalar(node.input[1])
    if slope is None:
        return ""
    editor.become(node, "LeakyRelu", [node.input[0]], alpha=slope)
    return "PRelu of one slope into LeakyRelu"


RULES = (clip, hard_sigmoid, sigmoid, leaky_relu)


def _bounds(editor: Editor, node: Any) -> tuple[str, float, float] | None:
    """(x, low, high) of an operator that only bounds x; infinity where there is no bound."""
    low, high = float("-inf"), float("inf")
    if node.domain or node.op_type not in ("Relu", "Clip", "Min", "Max"):
        return None
    if node.op_type == "Relu":
        return str(node.input[0]), 0.0, high
    if node.op_type == "Clip":
        ends = [
            editor.scalar(name) if name else end
            for name, end in zip(node.input[1:], (low, high), strict=False)
        ]
        found = (*ends, *(low, high)[len(ends) :])
        return None if found[0] is None or found[1] is None else (str(node.input[0]), found[0], found[1])
    if len(node.input) != 2:
        return None
    for place in (0, 1):
        value = editor.scalar(node.input[place])
        if (
            value is not None
            and _is_narrow(editor, node.input[place])
            and editor.scalar(node.input[1 - place]) is None
        ):
            source = str(node.input[1 - place])
            return (source, value, high) if node.op_type == "Max" else (source, low, value)
    return None


def _is_narrow(editor: Editor, name: str) -> bool:
    """Whether a constant cannot widen what it meets: it has one value and no axes but perhaps one."""
    values = editor.constant(name)
    return values is not None and values.size == 1 and values.ndim <= 1


def _scaled(editor: Editor, node: Any) -> tuple[str, float] | None:
    """(x, factor) of x * factor or x / (1 / factor)."""
    if node.domain or node.op_type not in ("Mul", "Div") or len(node.input) != 2:
        return None
    for place in (1, 0) if node.op_type == "Mul" else (1,):
        value = editor.scalar(node.input[place])
        if value and _is_narrow(editor, node.input[place]):
            return str(node.input[1 - place]), value if node.op_type == "Mul" else 1.0 / value
    return None


def _gate(editor: Editor, name: str, factor: float) -> tuple[str, float] | None:
    """(x, a) where `name` is Clip(x + a, 0, 1 / factor)."""
    writer = editor.writer(name)
    bounds = _bounds(editor, writer) if writer is not None else None
    if bounds is None or bounds[1] != 0.0 or abs(bounds[2] * factor - 1.0) > _NEAR:
        return None
    added = editor.writer(bounds[0])
    if added is None or added.op_type != "Add" or not editor.is_private(bounds[0]):
        return None
    for place in (0, 1):
        value = editor.scalar(added.input[place])
        if value is not None and _is_narrow(editor, added.input[place]):
            return str(added.input[1 - place]), value
    return None


def _drop(editor: Editor, node: Any | None) -> None:
    """Take out a node that nobody reads any more, and what only it read."""
    if node is None or any(editor.readers(name) or editor.is_output(name) for name in node.output):
        return
    if not any(editor.writer(name) is node for name in node.output):
        return
    sources = [editor.writer(name) for name in node.input]
    editor.remove(node)
    for source in sources:
        _drop(editor, source)


def _array(value: float) -> Any:
    import numpy as np

    return np.array(value, np.float32)
