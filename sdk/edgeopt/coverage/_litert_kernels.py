# SPDX-License-Identifier: Apache-2.0
"""Whether LiteRT has an operator in int8, found by trying: a kernel refuses tensors of types that it does not have.

The operator is put alone into a file with its floats turned to int8, and the interpreter prepares it. Some kernels ask
for one output scale (LiteRT 8-bit quantization specification: softmax and logistic 1/256 from -128, log-softmax 16/256
to 127, tanh and L2 normalization 1/128), so that several are tried.
"""

from __future__ import annotations

import copy
from typing import Any

_INPUT_GRID = (1 / 128, 0)
_OUTPUT_GRIDS = ((1 / 128, 0), (1 / 256, -128), (16 / 256, 127))
_BIAS_AT = {"CONV_2D": 2, "DEPTHWISE_CONV_2D": 2, "FULLY_CONNECTED": 2, "CONV_3D": 2, "TRANSPOSE_CONV": 3}


def has_integer_kernel(program: bytes, index: int) -> bool:
    """Whether the operator at `index` of the first subgraph would load with int8 tensors in place of floats."""
    return any(_loads(_alone(program, index, grid)) for grid in _OUTPUT_GRIDS)


def _loads(program: bytes) -> bool:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    try:
        interpreter = Interpreter(
            model_content=program,
            num_threads=1,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError):
        return False
    return True


def _alone(program: bytes, index: int, output_grid: tuple[float, int]) -> bytes:
    """A file that holds the operator and its tensors only, in int8."""
    import flatbuffers  # type: ignore[import-untyped]
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(program, 0))
    graph = model.subgraphs[0]
    operator = graph.operators[index]
    operator.inputs = list(operator.inputs)
    operator.outputs = list(operator.outputs)
    kind = _kind(model, operator)
    for position, at in enumerate(operator.inputs):
        tensor = graph.tensors[at] if at >= 0 else None
        if tensor is not None and tensor.type == schema.TensorType.FLOAT32:
            is_bias = _BIAS_AT.get(kind) == position
            scale = _INPUT_GRID[0] ** 2 if is_bias else _INPUT_GRID[0]
            _quantize(
                model, tensor, (scale, 0), schema.TensorType.INT32 if is_bias else schema.TensorType.INT8
            )
    for at in operator.outputs:
        if graph.tensors[at].type == schema.TensorType.FLOAT32:
            _quantize(model, graph.tensors[at], output_grid, schema.TensorType.INT8)
    graph.operators = [operator]
    graph.inputs = [at for at in operator.inputs if at >= 0 and not _is_stored(model, graph.tensors[at])]
    graph.outputs = list(operator.outputs)
    model.subgraphs = [graph]
    model.signatureDefs = model.metadata = model.metadataBuffer = None
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _quantize(model: Any, tensor: Any, grid: tuple[float, int], kind: int) -> None:
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    if _is_stored(model, tensor):
        buffer = copy.copy(model.buffers[tensor.buffer])
        size = len(buffer.data) // 4 * (4 if kind == schema.TensorType.INT32 else 1)
        buffer.data = np.ones(size, np.uint8)
        model.buffers.append(buffer)
        tensor.buffer = len(model.buffers) - 1
    tensor.type = kind
    tensor.quantization = schema.QuantizationParametersT()
    tensor.quantization.scale = [grid[0]]
    tensor.quantization.zeroPoint = [grid[1]]


def _is_stored(model: Any, tensor: Any) -> bool:
    data = model.buffers[tensor.buffer].data
    return data is not None and len(data) > 0


def _kind(model: Any, operator: Any) -> str:
    from ai_edge_litert import schema_py_generated as schema

    code = model.operatorCodes[operator.opcodeIndex]
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    return next((name for name, value in vars(schema.BuiltinOperator).items() if value == number), "")
