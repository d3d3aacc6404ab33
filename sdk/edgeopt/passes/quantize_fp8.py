# SPDX-License-Identifier: Apache-2.0
"""fp8 (E4M3) for convolutions and matrix products of an ONNX model, as QuantizeLinear and DequantizeLinear pairs.

Rules:
- Weights: one scale per output channel, max|w| / 448, stored as fp8 behind a DequantizeLinear. Activations: one scale per
  tensor, amax / 448 over the calibration samples. 448 is E4M3's largest number; zero is exact, there is no zero point.
- Everything else (biases, additions, activation functions) stays in float32.
- Layers whose grid would not pay for the conversion stay as they are: see `Options.least_channels`.

Where it runs: TensorRT on GPUs with fp8 tensor cores (Ada, Hopper, Blackwell: Jetson Thor), not on Jetson Orin (Ampere).
ONNX Runtime 1.32's CPU provider converts to and from fp8 and multiplies in float32: no gain there, but the very
rounding, so quality is measured in it and called simulated. A float grid is finer near zero and coarser far out than
int8's: with 3 bits of fraction no tensor has more than about 31 dB, whatever its outliers.

Sources: Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (E4M3, section 3; scales for inference, section 4.2);
NVIDIA Model Optimizer, onnx.quantization (Conv, Gemm and MatMul; which layers gain); ONNX, QuantizeLinear-21.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from edgeopt.calibrate import Calibration, Stream, find_ranges
from edgeopt.onnx_graphs import fold, observer
from edgeopt.onnx_products import attributes
from edgeopt.onnx_select import select
from edgeopt.passes import Order, Result
from edgeopt_converters.model import Model
from edgeopt_wire.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from edgeopt.ranges import Range

FORMATS = ("onnx",)
EXTRA = "onnx"

LARGEST = 448.0
"""E4M3's largest finite number (variant FN: no infinities)."""

OPSET = 21
"""fp8 exists from 19 on; from 21 on QuantizeLinear names its type itself, without a zero point. ONNX Runtime 1.32 reads an
fp8 zero point as an integer's: it drops the ReLU before it (wrong by whole values) and fails on Clip."""

IR_VERSION = 10  # that opset's

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_LARGEST_KERNEL, _LEAST_SIDE = 31, 16
_BY_AMAX = ("minmax", "percentile")


@dataclass(frozen=True)
class Options:
    """`least_channels`: convolutions with fewer inputs or outputs in a group stay in float32, depthwise ones too.

    The default, kernels below 32 values, and matrices of at least 16 by 16 that meet more than one row are where NVIDIA's
    quantizer sees a gain.
    """

    least_channels: int = 17

    def __post_init__(self) -> None:
        if self.least_channels < 1:
            raise ValueError(f"quantize_fp8: least_channels is positive, found {self.least_channels}")


def apply(model: Model, order: Order) -> Result:
    """Quantize weights and inputs of products to E4M3; inputs and outputs of the model stay float32.

    Raises:
        RecipeError: No calibration samples, or an excluded operator does not exist.
        UnsupportedError: The model cannot be brought to opset 21, or no layer of it can be quantized.
    """
    import onnx

    options = order.options if isinstance(order.options, Options) else Options()
    program = _lifted(fold(model.program), model.name)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in program.graph.initializer}
    rows, left = _rows(program), select(program, order.exclude)
    products = [node for node in program.graph.node if node.op_type in _PRODUCTS]
    chosen = [n for n in products if n.name not in left and _pays(n, weights, rows, options.least_channels)]
    if not chosen:
        raise UnsupportedError(
            f"{model.name}: no convolution or matrix product with constant weights and at least "
            f"{options.least_channels} channels (16 rows of a matrix); fp8 gains nothing here, ask for fp16 or int8"
        )
    method = order.calibration if order.calibration.method in _BY_AMAX else Calibration("minmax")
    names = frozenset(str(node.input[0]) for node in chosen)
    stream = Stream(order.samples, order.checkpoint, order.on_sample)
    ranges = find_ranges(observer(program, names), stream, method, symmetric=True)
    _place(program, chosen, weights, ranges)
    onnx.checker.check_model(program, full_check=True)
    notes = [f"{len(chosen)} of {len(products)} products in fp8; scales by {method.sentence()}"]
    if len(chosen) < len(products):
        taken = {node.output[0] for node in chosen}
        names_left = [node.name or node.op_type for node in products if node.output[0] not in taken]
        notes.append(
            f"products in float32: {', '.join(names_left[:5])}{', ...' if len(names_left) > 5 else ''}"
        )
    return Result(replace(model, program=program), tuple(notes))


def walks(order: Order, available: int) -> int:  # noqa: ARG001 - the same for every pass
    """How many samples `apply` walks over, for progress."""
    return available


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """Round to E4M3 (nearest, ties to even), what is beyond 448 saturated; dtype float8_e4m3fn."""
    import ml_dtypes
    import numpy as np

    rounded: np.ndarray = np.clip(values, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
    return rounded


def _lifted(program: Any, name: str) -> Any:
    import onnx

    opset = next(entry.version for entry in program.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < OPSET:
        try:
            program = onnx.version_converter.convert_version(program, OPSET)
        except Exception as error:  # it raises RuntimeError and its own types alike
            raise UnsupportedError(f"{name}: cannot be brought to ONNX opset {OPSET}: {error}") from error
    program.ir_version = max(program.ir_version, IR_VERSION)
    return onnx.shape_inference.infer_shapes(program, strict_mode=True, data_prop=True)


def _pays(node: Any, weights: Mapping[str, np.ndarray], rows: Mapping[str, int], least: int) -> bool:
    """Whether a product has constant weights and enough channels for fp8 to be worth two conversions."""
    weight = weights.get(node.input[1])
    if weight is None or weight.dtype != "float32" or node.input[0] in weights:
        return False
    if node.op_type == "Conv":
        outputs = weight.shape[0] // attributes(node).get("group", 1)
        return min(weight.shape[1], outputs) >= least and prod(weight.shape[2:]) <= _LARGEST_KERNEL
    return weight.ndim == 2 and min(weight.shape) >= _LEAST_SIDE and rows.get(node.input[0], 0) != 1


def _rows(program: Any) -> dict[str, int]:
    """How many rows a matrix product finds in each tensor; 0 where that is not known."""
    infos = (*program.graph.value_info, *program.graph.input)
    shapes = {info.name: [axis.dim_value for axis in info.type.tensor_type.shape.dim] for info in infos}
    return {name: prod(shape[:-1]) for name, shape in shapes.items()}


def _place(
    program: Any, chosen: list[Any], weights: Mapping[str, np.ndarray], ranges: Mapping[str, Range]
) -> None:
    """Put a pair before every chosen product's input, one a tensor, and fp8 weights behind a DequantizeLinear."""
    import onnx
    from onnx import helper

    graph = program.graph
    names = {node.output[0] for node in chosen}
    made: dict[str, str] = {}
    tensors: list[Any] = []
    nodes: list[Any] = []
    for node in graph.node:
        if node.output[0] not in names:
            nodes.append(node)
            continue
        source, weight = str(node.input[0]), str(node.input[1])
        if source not in made:
            span = ranges[source]
            scale = max(-span.low, span.high) / LARGEST or 1.0
            tensors.append(_float(scale, f"{source}_scale"))
            nodes += _pair(source)
            made[source] = f"{source}_real"
        axis = _axis(node)
        key = f"{weight}_fp8_{axis}"
        if key not in made:
            tensors += _weights(weights[weight], key, axis)
            read = [key, f"{key}_scale"]
            nodes.append(
                helper.make_node("DequantizeLinear", read, [f"{key}_real"], f"{key}_dequantize", axis=axis)
            )
            made[key] = f"{key}_real"
        node.input[0], node.input[1] = made[source], made[key]
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input} | {output.name for output in graph.output}
    initializers = [
        onnx.TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in used
    ]
    del graph.initializer[:]
    graph.initializer.extend([*initializers, *tensors])


def _pair(source: str) -> list[Any]:
    """Quantize and dequantize an activation."""
    from onnx import TensorProto, helper

    fp8, scale = f"{source}_fp8", f"{source}_scale"
    kind = TensorProto.FLOAT8E4M3FN
    return [
        helper.make_node("QuantizeLinear", [source, scale], [fp8], f"{source}_quantize", output_dtype=kind),
        helper.make_node("DequantizeLinear", [fp8, scale], [f"{source}_real"], f"{source}_dequantize"),
    ]


def _axis(node: Any) -> int:
    """Where a product's weights have their outputs."""
    return 0 if node.op_type == "Conv" or attributes(node).get("transB", 0) else 1


def _weights(values: np.ndarray, name: str, axis: int) -> list[Any]:
    """fp8 weights with their scales per output channel."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    others = tuple(k for k in range(values.ndim) if k != axis)
    largest = np.abs(values).max(axis=others)
    scale = np.where(largest > 0, largest / LARGEST, 1.0).astype(np.float32)
    shape = [1] * values.ndim
    shape[axis] = -1
    small = to_e4m3(values / scale.reshape(shape))
    raw = small.tobytes()
    return [
        helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, values.shape, raw, raw=True),
        numpy_helper.from_array(scale, f"{name}_scale"),
    ]


def _float(value: float, name: str) -> Any:
    import numpy as np
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array(value, np.float32), name)
