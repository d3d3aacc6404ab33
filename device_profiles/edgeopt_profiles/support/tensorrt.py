# SPDX-License-Identifier: Apache-2.0
"""TensorRT through its ONNX parser: what goes into the engine, and what would be left to the CPU.

Rules:
- The operators are those of TensorRT 8.5, the oldest that an Orin can have (JetPack 5.1). Later ones take more, for
  example LayerNormalization; a model that fits here fits them all.
- Int8 is explicit and symmetric: int8 between Q and DQ, never uint8, and a zero point of 0 (which a scheme fixes and
  operators do not show).
- A float operator in an int8 model still runs on the GPU, so it is not left out.

Not checked: attributes (pooling of 2 or 3 axes, modes of a resize) and inputs that must be constants.
Source: onnx/onnx-tensorrt, docs/operators.md at 6d0ab7be (TensorRT 8.5); TensorRT, "Working with quantized types".
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeopt_profiles.operators import Operator
from edgeopt_profiles.support import Placement, sort_out

_PARSED = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool",
    "BatchNormalization", "Cast", "Ceil", "Celu", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv",
    "ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Dropout", "Einsum",
    "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "GRU", "Gather", "GatherElements",
    "GatherND", "Gemm", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater", "GreaterOrEqual",
    "GridSample", "HardSigmoid", "HardSwish", "Identity", "If", "ImageScaler", "InstanceNormalization",
    "IsNaN", "LRN", "LSTM", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "Loop",
    "LpNormalization", "LpPool", "MatMul", "Max", "MaxPool", "Mean", "MeanVarianceNormalization", "Min",
    "Mod", "Mul", "Neg", "NonMaxSuppression", "NonZero", "Not", "OneHot", "Or", "PRelu", "Pad",
    "ParametricSoftplus", "Pow", "QuantizeLinear", "RNN", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape",
    "Resize", "ReverseSequence", "RoiAlign", "Round", "ScaledTanh", "Scan", "Scatter", "ScatterElements",
    "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice", "Softmax",
    "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tan", "Tanh",
    "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Upsample", "Where", "Xor"
})  # fmt: skip
_DTYPES = frozenset({"float32", "float16", "float64", "int8", "int32", "int64", "bool"})
"""float64 and int64 are narrowed by the parser."""


def place(operators: Sequence[Operator]) -> Placement:
    """Tell what the engine holds from what TensorRT's parser refuses."""
    return sort_out(operators, _reason)


def _reason(operator: Operator) -> str:
    if operator.type not in _PARSED:
        return f"the ONNX parser of TensorRT 8.5 does not know {operator.type}"
    for tensor in (*operator.inputs, *operator.outputs):
        if tensor.dtype == "uint8":
            return f"tensor {tensor.name!r} is uint8; TensorRT takes symmetric int8 only (scheme tensorrt)"
        if tensor.dtype not in _DTYPES and tensor.dtype != "unknown":
            return f"tensor {tensor.name!r} is {tensor.dtype}, which the ONNX parser of TensorRT 8.5 does not take"
    return ""
