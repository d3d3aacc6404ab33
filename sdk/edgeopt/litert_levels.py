# SPDX-License-Identifier: Apache-2.0
"""A LiteRT file in which every operator has its own number format, from the float file and the ranges of the int8 one.

Levels, beside int8 with int8 activations:
- `fp32`: as it was. `fp16`: weights of half floats, half the bytes; a CPU without half floats unpacks them when it loads.
- `int16`: activations of 16 bits, weights of 8 ("16x8" of the LiteRT quantization specification): reference kernels on a
  CPU, many times slower, for what needs the bits and is small.
- `int4`: weights of 4 bits per channel, activations of 8: the least bytes.
- `dynamic` and `stored` (no levels of a search): weights of 8 bits, with ranges of activations found in every inference
  (`litert_ends`) or with float arithmetic.

The ranges are read off the int8 file, so nothing is calibrated again. Which file comes out is ai-edge-quantizer's doing:
its recipe takes one entry an operator, by the name of the operator's first output.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgeopt import onnx_select
from edgeopt.litert_ends import DYNAMIC, FLOATS, MOVES, find_coarse_pools, find_ends, has_constant_weights
from edgeopt.litert_norms import find_norms
from edgeopt.ranges import Range
from edgeopt_converters.litert_file import pack, parse
from edgeopt_converters.litert_graph import type_names
from edgeopt_wire.errors import RuntimeFailure

__all__ = [
    "DYNAMIC",
    "FLOATS",
    "INT8",
    "MOVES",
    "STORED",
    "Operator",
    "choose",
    "operators",
    "quantize",
    "quantize_weights",
    "read_levels",
    "read_ranges",
    "usual",
    "with_weights",
]

LEVELS = ("fp32", "fp16", "int16", "int4")
INT8 = "int8"
"""What an operator is where no level is named."""

STORED = "stored"
"""Weights of 8 bits per channel in the file, floats in memory and in the arithmetic."""

PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
PER_CHANNEL_DYNAMIC = 12
"""The version of FULLY_CONNECTED from which kernels know dynamic ranges with a scale per channel (`op_version.cc`)."""

FOUR_BITS = ("CONV_2D", "FULLY_CONNECTED")
"""What LiteRT has with weights of 4 bits and activations of 8."""


ONNX_TYPES = {
    "CONV_2D": "Conv", "DEPTHWISE_CONV_2D": "Conv", "FULLY_CONNECTED": "Gemm", "TRANSPOSE_CONV": "ConvTranspose",
    "BATCH_MATMUL": "MatMul", "ADD": "Add", "MUL": "Mul", "SUB": "Sub", "DIV": "Div", "MEAN": "GlobalAveragePool",
    "SOFTMAX": "Softmax", "LOGISTIC": "Sigmoid", "HARD_SWISH": "HardSwish", "GELU": "Gelu", "TANH": "Tanh",
    "AVERAGE_POOL_2D": "AveragePool", "MAX_POOL_2D": "MaxPool", "CONCATENATION": "Concat",
}  # fmt: skip
"""What ONNX calls an operator, so that one line of a recipe means the same operators in both formats."""


@dataclass(frozen=True)
class Operator:
    """An operator of a float file: the name of its first output, its type, and its number among its ONNX type's."""

    name: str
    type: str
    number: int
    is_gate: bool = False

    @property
    def described(self) -> str:
        """What survives the next export, such as "Conv#3", which is the same convolution as in ONNX."""
        kind = onnx_select.GATE if self.is_gate else ONNX_TYPES.get(self.type, self.type)
        return f"{kind}#{self.number}"


def operators(program: bytes) -> tuple[Operator, ...]:
    """The operators of a file, in order."""
    model = parse(program)
    graph = model.subgraphs[0]
    counted: dict[str, int] = {}
    found = []
    for entry, kind in zip(graph.operators, type_names(model), strict=True):
        common = onnx_select.GATE if _is_gate(graph, entry, kind) else ONNX_TYPES.get(kind, kind)
        number = counted[common] = counted.get(common, -1) + 1
        is_gate = common == onnx_select.GATE
        found.append(Operator(graph.tensors[entry.outputs[0]].name.decode(), kind, number, is_gate))
    return tuple(found)


def _is_gate(graph: Any, entry: Any, kind: str) -> bool:
    """Whether an operator stands in a hard gate's place (`edgeopt.hard_gates`): a factor for each channel."""
    if kind != "DEPTHWISE_CONV_2D":
        return False
    first, height, width, channels = (int(size) for size in graph.tensors[entry.inputs[1]].shape)
    return onnx_select.is_line((channels, first, height, width), channels)


def with_weights(program: bytes, kinds: Iterable[str]) -> tuple[Operator, ...]:
    """The operators of some types whose weights are stored in the file, in order."""
    wanted, graph = frozenset(kinds), parse(program)
    pairs = zip(operators(program), graph.subgraphs[0].operators, strict=True)
    return tuple(
        found for found, entry in pairs if found.type in wanted and has_constant_weights(graph, entry)
    )


def choose(program: bytes, selectors: Iterable[str]) -> frozenset[str]:
    """The operators of a file that a recipe's `exclude` means (`onnx_select`), by their names.

    Raises:
        RecipeError: A selector means nothing in this file; the message lists its types.
    """
    graph = parse(program).subgraphs[0]
    found = []
    for entry, operator in zip(graph.operators, operators(program), strict=True):
        weight: tuple[int, ...] = ()
        if operator.type in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            first, height, width, last = (int(size) for size in graph.tensors[entry.inputs[1]].shape)
            is_depthwise = operator.type == "DEPTHWISE_CONV_2D"
            weight = (last, first, height, width) if is_depthwise else (first, last, height, width)
        groups = weight[0] if operator.type == "DEPTHWISE_CONV_2D" else 1
        types = (ONNX_TYPES.get(operator.type, operator.type), operator.type)
        makes_output = bool(set(entry.outputs) & set(graph.outputs))
        found.append(onnx_select.Operator(operator.name, types, weight, groups, makes_output))
    return onnx_select.choose(found, selectors)


def read_ranges(quantized: bytes) -> dict[str, Range]:
    """What the integers of every activation of an int8 file cover, by the float file's names of tensors."""
    from ai_edge_litert import schema_py_generated as schema

    graph = parse(quantized).subgraphs[0]
    limits = {schema.TensorType.INT8: (-128, 127), schema.TensorType.UINT8: (0, 255)}
    found = {}
    for tensor in graph.tensors:
        grid = tensor.quantization
        if tensor.type not in limits or grid is None or grid.scale is None or len(grid.scale) != 1:
            continue
        low, high = limits[tensor.type]
        scale, zero = float(grid.scale[0]), int(grid.zeroPoint[0])
        name = tensor.name.decode().removesuffix("_quantized")
        found[name] = Range(scale * (low - zero), scale * (high - zero))
    return found


def usual(program: bytes, ranges: Mapping[str, Range]) -> dict[str, str]:
    """What is not int8 in an int8 file for devices that have floats: its ends, norms, averages on a coarse grid."""
    return {**find_norms(program), **find_coarse_pools(program, ranges), **find_ends(program)}


def read_levels(program: bytes, quantized: bytes) -> dict[str, str]:
    """The level of every operator of a float file that is not int8 in the int8 file that was made of it."""
    from ai_edge_litert import schema_py_generated as schema

    graph = parse(quantized).subgraphs[0]
    floats = {t.name.decode() for t in graph.tensors if t.type == schema.TensorType.FLOAT32}
    weights = {
        graph.tensors[operator.outputs[0]].name.decode(): graph.tensors[operator.inputs[1]].type
        for operator in graph.operators
        if len(operator.inputs) > 1
    }
    return {
        operator.name: DYNAMIC
        if operator.type in PRODUCTS and weights.get(operator.name) == schema.TensorType.INT8
        else FLOATS
        for operator in operators(program)
        if operator.name in floats
    }


def quantize(
    program: bytes, ranges: Mapping[str, Range], levels: Mapping[str, str], *, float_edges: bool = True
) -> bytes:
    """Quantize to int8 with some operators at other levels.

    Args:
        program: The float file.
        ranges: What activations cover, by tensor; symmetric where 16 bits are asked for.
        levels: The level of an operator, by the name of its first output; int8 where it is not named.
        float_edges: Whether inputs and outputs of the file stay float32.

    Raises:
        RuntimeFailure: ai-edge-quantizer refuses the combination.
    """
    import numpy as np
    from ai_edge_quantizer import quantizer, recipe
    from ai_edge_quantizer.qtyping import TFLOperationName

    maker = quantizer.Quantizer(bytearray(program))
    maker.load_quantization_recipe(recipe.static_wi8_ai8())
    if float_edges:
        for edge in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
            _leave(maker, ".*", edge)
    for entry in operators(program):
        if entry.name in levels:
            _set(maker, entry, levels[entry.name])
    ranks = {
        tensor.name.decode(): 0 if tensor.shape is None else len(tensor.shape)
        for tensor in parse(program).subgraphs[0].tensors
    }
    statistics = {
        name: {
            "min": np.full((1,) * ranks[name], span.low, np.float32),
            "max": np.full((1,) * ranks[name], span.high, np.float32),
        }
        for name, span in ranges.items()
        if name in ranks
    }
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            made = maker.quantize(statistics, enable_progress_bar=False, enable_progress_report=False)
    except (ValueError, RuntimeError, KeyError) as error:
        raise RuntimeFailure(f"ai-edge-quantizer refused {dict(levels)}: {error}") from error
    return (
        _declare_dynamic(bytes(made.quantized_model))
        if DYNAMIC in levels.values()
        else bytes(made.quantized_model)
    )


def quantize_weights(program: bytes, levels: Mapping[str, str]) -> bytes:
    """Give int8 weights to layers and tables, by the names of their first outputs; everything else stays as it is.

    Args:
        program: The float file.
        levels: `dynamic` (integers are multiplied) or `stored` (floats are, made of the integers when the file is loaded).

    Raises:
        RuntimeFailure: ai-edge-quantizer refuses.
    """
    from ai_edge_quantizer import quantizer

    maker = quantizer.Quantizer(bytearray(program))
    for entry in operators(program):
        if entry.name in levels:
            _set(maker, entry, levels[entry.name])
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            made = maker.quantize(enable_progress_bar=False, enable_progress_report=False)
    except (ValueError, RuntimeError, KeyError) as error:
        raise RuntimeFailure(f"ai-edge-quantizer refused int8 weights: {error}") from error
    return _declare_dynamic(bytes(made.quantized_model))


def _set(maker: Any, operator: Operator, level: str) -> None:
    from ai_edge_quantizer import algorithm_manager
    from ai_edge_quantizer.qtyping import TFLOperationName

    if level == INT8 or operator.type not in {kind.value for kind in TFLOperationName}:
        return  # what the file is by default, and what ai-edge-quantizer leaves in floats because it does not know it
    scope, kind = f"^{re.escape(operator.name)};$", TFLOperationName(operator.type)
    if level == "fp32" or (level == "fp16" and operator.type not in PRODUCTS):
        _leave(maker, scope, kind)
    elif level == DYNAMIC:
        maker.add_dynamic_config(scope, kind, 8)
    elif level == STORED:
        maker.add_weight_only_config(scope, kind, 8)
    elif level == "fp16":
        maker.add_weight_only_config(
            scope, kind, 16, algorithm_key=algorithm_manager.AlgorithmName.FLOAT_CASTING
        )
    else:
        activation, weight = {"int16": (16, 8), "int4": (8, 4)}[level]
        maker.add_static_config(scope, kind, activation, weight)


def _leave(maker: Any, scope: str, kind: Any) -> None:
    from ai_edge_quantizer import algorithm_manager

    maker.update_quantization_recipe(
        regex=scope, operation_name=kind, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE
    )


def _declare_dynamic(program: bytes) -> bytes:
    """Say in the file what its dynamic layers need, which ai-edge-quantizer leaves out.

    Without the version, TensorFlow Lite up to 2.14 takes one channel's scale for all and answers nonsense; with it, it
    refuses to load the file. Inputs that are never negative use all 256 integers.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = parse(program)
    graph = model.subgraphs[0]
    for operator, kind in zip(graph.operators, type_names(model), strict=True):
        weights = graph.tensors[operator.inputs[1]] if kind == "FULLY_CONNECTED" else None
        writes_floats = graph.tensors[operator.outputs[0]].type == schema.TensorType.FLOAT32
        if weights is not None and weights.type == schema.TensorType.INT8 and writes_floats:
            operator.builtinOptions.asymmetricQuantizeInputs = True
            code = model.operatorCodes[operator.opcodeIndex]
            code.version = max(code.version, PER_CHANNEL_DYNAMIC)
    return pack(model)
