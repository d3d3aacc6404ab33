# SPDX-License-Identifier: Apache-2.0
"""Say the same float arithmetic in the operators that a runtime runs fastest on a CPU.

ONNX Runtime's fusions look for exact spellings, and one of them makes things slower:
- GELU: exporters write x * (0.5 * (1 + erf)), the fusion knows (x * (1 + erf)) * 0.5. Moving the half changes no bit,
  for it is a power of two. Five walks over the widest activation become one.
- An addition before a layer norm becomes SkipLayerNormalization, which takes 6 times as long as the two apart
  (onnxruntime 1.32, x86-64, 128 x 384: 0.25 ms instead of 0.04). Sum adds two tensors as Add does and is not fused.

Both the float file and the int8 file gain, so these belong before either. Hard gates (`hard_gates`) are for int8 alone:
ONNX Runtime has them in floats only, and LiteRT's hard-swish is no operator of XNNPACK, which stops at each.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from edgeopt.hard_gates import respell
from edgeopt.onnx_graphs import fold
from edgeopt.onnx_select import select
from edgeopt.passes import Order, Result
from edgeopt_converters.model import Model

FORMATS = ("onnx",)
EXTRA = "onnx"


@dataclass(frozen=True)
class Options:
    """Which spellings change; `gate_bound` is what hard gates are bounded by, 6 where a runtime fuses ReLU6 alone."""

    gelu: bool = True
    layer_norm: bool = True
    hard_gates: bool = False
    gate_bound: float = 1.0


def apply(model: Model, order: Order) -> Result:
    """Respell GELU and additions before layer norms; nothing else changes. `order.exclude` names nodes to keep."""
    options = order.options if isinstance(order.options, Options) else Options()
    program = fold(model.program)
    graph = _Graph(program, order.exclude)
    halves = sum(graph.move_half(node) for node in program.graph.node) if options.gelu else 0
    sums = sum(graph.keep_apart(node) for node in program.graph.node) if options.layer_norm else 0
    if halves:
        del program.graph.value_info[:]  # two tensors changed places
    notes = [f"respelled for ONNX Runtime: {halves} GELU, {sums} additions before layer norms"]
    if options.hard_gates:
        notes = notes if halves + sums else []
        gates = respell(program, bound=options.gate_bound, exclude=select(program, order.exclude))
        program = gates.program
        notes += [gates.sentence()] if gates.sentence() else []
    return Result(replace(model, program=program), tuple(notes))


def walks(order: Order, available: int) -> int:  # noqa: ARG001 - the same for every pass
    """How many samples `apply` walks over: none."""
    return 0


class _Graph:
    """Who makes what, and constants."""

    def __init__(self, program: Any, exclude: tuple[str, ...]) -> None:
        self._constants = {tensor.name: tensor for tensor in program.graph.initializer}
        self._exclude = exclude
        self._writer = {name: node for node in program.graph.node for name in node.output}
        self._uses: dict[str, int] = defaultdict(int)
        for name in (name for node in program.graph.node for name in node.input):
            self._uses[name] += 1
        for output in program.graph.output:
            self._uses[output.name] += 1

    def move_half(self, outer: Any) -> bool:
        """Turn x * (0.5 * (1 + erf(...))) into (x * (1 + erf(...))) * 0.5."""
        if outer.op_type != "Mul" or outer.name in self._exclude:
            return False
        for position, name in enumerate(outer.input):
            inner = self._writer.get(name)
            if inner is None or inner.op_type != "Mul" or self._uses[name] != 1:
                continue
            half = next((part for part in inner.input if self._is_half(part)), "")
            gate = next((part for part in inner.input if part != half), "")
            if half and self._is_one_plus_erf(gate):
                x = outer.input[1 - position]
                inner.input[:] = [x, gate]
                outer.input[:] = [name, half]
                return True
        return False

    def _is_half(self, name: str) -> bool:
        import onnx

        tensor = self._constants.get(name)
        if tensor is None:
            return False
        values = onnx.numpy_helper.to_array(tensor)
        return bool(values.size == 1 and values.reshape(-1)[0] == 0.5)

    def _is_one_plus_erf(self, name: str) -> bool:
        writer = self._writer.get(name)
        if writer is None or writer.op_type != "Add":
            return False
        return any(part in self._writer and self._writer[part].op_type == "Erf" for part in writer.input)

    def keep_apart(self, norm: Any) -> bool:
        """Write the addition of two activations before a layer norm as Sum."""
        if norm.op_type != "LayerNormalization" or norm.input[0] not in self._writer:
            return False
        added = self._writer[norm.input[0]]
        if added.op_type != "Add" or added.name in self._exclude:
            return False
        if any(len(self._constants[name].dims) < 2 for name in added.input if name in self._constants):
            return False  # a product's bias, which runtimes take into the product
        added.op_type = "Sum"
        return True
