# SPDX-License-Identifier: Apache-2.0
"""What ExecuTorch makes of a .pte file: the nodes of its XNNPACK delegate, and the kernels beside it.

Rules:
- A delegate's graph is decided when the file is made, and read from it: XNNPACK computes a node in the types of its
  values. Nothing falls back when the file is loaded; what XNNPACK cannot do then is an error, so that the file is loaded.
- Values that are quantized in every inference make a product dynamic.
- A kernel beside the delegate is ExecuTorch's own: right, slow, and in floats here.

A file gives operators no names: they are counted by their types ("Conv2d#3").
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.coverage import Arithmetic, Coverage, Left, Step, tally
from edgeopt_agent import runtimes
from edgeopt_converters.executorch_file import edges
from edgeopt_converters.executorch_graph import DYNAMIC
from edgeopt_converters.executorch_graph import operators as list_operators
from edgeopt_profiles.operators import Operator
from edgeopt_profiles.support.executorch import CONVERSION, INTEGER, MOVES, why_float
from edgeopt_wire.errors import RecipeError, RuntimeFailure, UnsupportedError
from edgeopt_wire.manifest import Variant

if TYPE_CHECKING:
    import numpy as np

PRODUCTS = frozenset({
    "Conv2d", "DepthwiseConv2d", "ConvTranspose2d", "FullyConnected", "BatchMatrixMultiply", "ScaledDotProductAttention",
})  # fmt: skip
_OWN_PRODUCTS = ("convolution", "mm", "bmm", "addmm", "linear")
_OWN_MOVES = (
    "view_copy", "permute_copy", "transpose_copy", "squeeze_copy", "unsqueeze_copy", "slice_copy", "select_copy",
    "expand_copy", "clone", "_clone_dim_order", "_to_dim_order_copy", "as_strided_copy", "split_copy", "constant_pad_nd",
    "full", "alias_copy",
)  # fmt: skip
"""Kernels that compute nothing."""


def read(
    file: Path, *, reference: Path | None = None, sample: Mapping[str, np.ndarray] | None = None
) -> Coverage:
    """Load `file` and read what is in it; shapes are fixed, and names are counted, so that nothing else tells more.

    Raises:
        RuntimeFailure: ExecuTorch cannot load it.
    """
    del reference, sample
    try:
        program = file.read_bytes()
        found = list_operators(program)
        _load(file, program)
    except (RecipeError, UnsupportedError, OSError) as error:
        raise RuntimeFailure(f"executorch cannot load {file.name}: {error}") from error
    is_quantized = any(tensor.dtype in ("int8", DYNAMIC) for entry in found for tensor in entry.inputs)
    steps = [step for entry in found if (step := _step(entry, is_quantized=is_quantized)) is not None]
    conversions = sum(entry.type == CONVERSION for entry in found)
    version = importlib.metadata.version("executorch")
    return tally("executorch", version, steps, conversions=conversions)


def _load(file: Path, program: bytes) -> None:
    """Load it as a device does, which is when XNNPACK refuses what it cannot do."""
    inputs, outputs = edges(program)
    variant = Variant("coverage", "executorch", "int8", file.name, inputs, outputs, "", 0.0)
    runtimes.find("executorch").load(file, variant).close()


def _step(operator: Operator, *, is_quantized: bool) -> Step | None:
    arithmetic = _arithmetic(operator)
    if arithmetic is None:
        return None
    left = None
    if arithmetic is Arithmetic.FLOAT:
        cause, why, remedy = _why(operator, is_quantized=is_quantized)
        left = Left(operator.name, operator.type, operator.macs, why, remedy, cause)
    return Step(
        operator.name,
        operator.type,
        arithmetic,
        operator.macs,
        is_product=operator.type in PRODUCTS or _own_name(operator) in _OWN_PRODUCTS,
        left=left,
        is_outside=bool(_own_name(operator)),
    )


def _arithmetic(operator: Operator) -> Arithmetic | None:
    """What an operator computes with; None for conversions and for what only moves values."""
    if operator.type in (*MOVES, CONVERSION) or _own_name(operator) in _OWN_MOVES:
        return None
    if operator.type in PRODUCTS and operator.inputs[0].dtype == DYNAMIC:
        return Arithmetic.DYNAMIC
    if _has(operator.outputs, "float") or not operator.outputs:
        return Arithmetic.FLOAT
    return Arithmetic.INTEGER if _has((*operator.inputs, *operator.outputs), "int8") else None


def _has(tensors: Sequence[object], kind: str) -> bool:
    return any(kind in str(getattr(tensor, "dtype", "")) for tensor in tensors)


def _own_name(operator: Operator) -> str:
    """The name of an operator outside the delegate, without its overload; empty for one inside."""
    space, mark, name = operator.type.rpartition("::")
    return name.partition(".")[0] if mark and space else ""


def _why(operator: Operator, *, is_quantized: bool) -> tuple[str, str, str]:
    """Cause, why and what would help."""
    if not is_quantized:
        return "not quantized", "the file is not quantized", "quantize it"
    reason = why_float(operator) or f"nothing is known of what {operator.type} computes in"
    if _own_name(operator):
        return (
            "outside",
            reason,
            "use an operator that the delegate takes (static shapes, two spatial axes, weights that are constants)",
        )
    if operator.type in INTEGER:
        return "left in floats", reason, "quantize it: is it excluded, or is what it reads float?"
    return (
        "no integer kernel",
        reason,
        f"leave this {operator.type} in floats on purpose, or use an operator that runs in integers",
    )
