# SPDX-License-Identifier: Apache-2.0
"""Why OpenVINO computes an operator in floats, told from what stands around it in the file.

Rules, asked of OpenVINO 2026.4 with one operator at a time (`tests/edgeopt/coverage/test_openvino.py` asks the installed one):
- A product of two activations is one in integers where the first has zero point 0 and the second lies symmetrically around
  its zero point (int8 and 0, or uint8 and 128); a transposed convolution where its input has zero point 0.
- Low-precision transformations move DequantizeLinear behind an operator (OpenVINO, "Low Precision Transformations"), so
  both inputs of a product must come from one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeopt.coverage._products import is_product
from edgeopt.coverage._repairs import Said

_MOVES = frozenset({
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Slice", "Split", "Gather", "Pad", "DepthToSpace",
    "SpaceToDepth", "MaxPool", "Expand",
})  # fmt: skip
"""A DequantizeLinear is moved behind these."""
_SYMMETRIC = {"int8": 0, "uint8": 128}


def why(program: Any, node: Any, *, is_quantized: bool, reads: str, is_one: bool) -> Said:
    """Say why `node` of the file runs in floats in a step that reads `reads`; None for a step that nothing there made.

    `is_one` says whether the step multiplies, where `node` is a product; if not, it scales what another gave.
    """
    if not is_quantized:
        return Said("not quantized", "the file is not quantized", "quantize it")
    if node is None:
        return Said(
            "unknown",
            "no operator of the file has its name: OpenVINO made it of several",
            "look for it in the graph that OpenVINO runs (get_runtime_model)",
        )
    around = _Around(program, node)
    if is_product(node.op_type):
        return _product(around) if is_one else _scaling(node)
    if around.grids and any(reader.op_type == "QuantizeLinear" for reader in around.readers()):
        mixed = "" if reads.startswith(("f", "bf")) else ", and one of its inputs was written as floats"
        return Said(
            "no integer kernel",
            f"OpenVINO computes this {node.op_type} in floats{mixed}",
            f"leave it in floats on purpose, or use an operator in place of {node.op_type} that runs in integers",
        )
    return Said(
        "left in floats",
        "one of its sides is not quantized",
        "quantize it: is this operator or its type excluded, or left out by the quantizer?",
    )


def multiplies_activations(program: Any, node: Any) -> bool:
    """Whether a product has no weights."""
    return not _Around(program, node).has_weights


def suits_integers(program: Any, node: Any) -> bool:
    """Whether the zero points of both activations of a product are such that OpenVINO multiplies them in integers."""
    grids = _Around(program, node).grids
    first, second = (grids.get(name) for name in node.input[:2])
    return first is not None and second is not None and _fit(first, second)


def _fit(first: _Grid, second: _Grid) -> bool:
    return not first.zero_point and _SYMMETRIC.get(second.dtype) == second.zero_point


def _scaling(node: Any) -> Said:
    return Said(
        "scaling",
        f"it scales and rounds the sums of {node.op_type} {node.name!r} in a step of its own",
        "nothing, where it is short; a bias-free product before a QuantizeLinear of its own is scaled so",
    )


def _product(around: _Around) -> Said:
    node = around.node
    missing = [name for name in node.input[:2] if name not in around.grids]
    if missing == [node.input[0]]:
        return Said(
            "weights only",
            f"its input {missing[0]!r} is floats, by which it multiplies what it unpacks from integers",
            "quantize its activations too",
        )
    if missing:
        return Said(
            "left in floats",
            f"{' and '.join(map(repr, missing))} are floats in the file",
            "quantize it: is this operator or its type excluded, or left out by the quantizer?",
        )
    first, second = (around.grids[name] for name in node.input[:2])
    if node.op_type == "ConvTranspose" and first.zero_point:
        return Said(
            "zero point",
            f"its input {node.input[0]!r} has zero point {first.zero_point}, and OpenVINO transposes convolutions of zero "
            "point 0 only",
            "quantize its input symmetrically, with zero point 0",
        )
    if not second.is_constant and not _fit(first, second):
        return Said(
            "zero point",
            f"it multiplies two activations of zero points {first.zero_point} and {second.zero_point} ({second.dtype}); "
            "OpenVINO wants 0 for the first, and the second symmetric",
            "quantize both symmetrically, with zero point 0",
        )
    return Said(
        "not fused",
        f"OpenVINO left this {node.op_type} in floats, though its inputs are quantized",
        "look at what reads its output, or leave it in floats on purpose",
    )


@dataclass(frozen=True)
class _Grid:
    """What a DequantizeLinear says of a tensor."""

    dtype: str
    zero_point: int
    is_constant: bool


class _Around:
    """An operator, and the grids of those of its inputs that come from a DequantizeLinear."""

    def __init__(self, program: Any, node: Any) -> None:
        self.node = node
        self._nodes = list(program.graph.node)
        self._writers = {name: entry for entry in self._nodes for name in entry.output}
        self._constants = {tensor.name: tensor for tensor in program.graph.initializer}
        self.grids = self._grids()

    @property
    def has_weights(self) -> bool:
        """Whether its second input is a constant, quantized or not."""
        name = self.node.input[1]
        return name in self._constants or (name in self.grids and self.grids[name].is_constant)

    def readers(self) -> list[Any]:
        """The operators that read its output, behind activations that are merged into it."""
        names = set(self.node.output)
        found = [entry for entry in self._nodes if names & set(entry.input)]
        behind = {name for entry in found if entry.op_type in ("Relu", "Clip") for name in entry.output}
        return [*found, *(entry for entry in self._nodes if behind & set(entry.input))]

    def _grids(self) -> Mapping[str, _Grid]:
        found = {}
        for name in self.node.input:
            writer = self._writers.get(name)
            while writer is not None and writer.op_type in _MOVES:
                writer = self._writers.get(writer.input[0])
            if writer is not None and writer.op_type == "DequantizeLinear":
                found[name] = self._grid(writer)
        return found

    def _grid(self, dequantize: Any) -> _Grid:
        from onnx import numpy_helper

        source, *_, zero = (*dequantize.input, "") if len(dequantize.input) < 3 else dequantize.input
        values = numpy_helper.to_array(self._constants[zero]) if zero in self._constants else None
        dtype = values.dtype.name if values is not None else "uint8"
        return _Grid(dtype, int(values.flat[0]) if values is not None else 0, source in self._constants)
