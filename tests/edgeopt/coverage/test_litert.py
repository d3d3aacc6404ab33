# SPDX-License-Identifier: Apache-2.0
"""What LiteRT computes in integers: files of one or two operators, written by the schema."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt.coverage import Coverage, problems, read

schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
flatbuffers = pytest.importorskip("flatbuffers")

SIZE, OUTPUTS = 64, 32
GRIDS = {"int8": (0.02, 0), "int16": (0.0001, 0)}


@dataclass
class File:
    """A LiteRT model in the making; tensors are referred to by name."""

    tensors: dict[str, Any] = field(default_factory=dict)
    buffers: list[Any] = field(default_factory=lambda: [schema.BufferT()])
    codes: list[Any] = field(default_factory=list)
    operators: list[Any] = field(default_factory=list)

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: str, *, scale: float = 0.0, value: Any = None
    ) -> str:
        tensor = schema.TensorT()
        tensor.name, tensor.shape = name, list(shape)
        tensor.type = getattr(schema.TensorType, dtype.upper())
        scale = scale or GRIDS.get(dtype, (0.0, 0))[0]
        if scale:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale, tensor.quantization.zeroPoint = [scale], [0]
        if value is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.full(shape, value, dtype).tobytes(), np.uint8)
            self.buffers.append(buffer)
            tensor.buffer = len(self.buffers) - 1
        else:
            tensor.buffer = 0
        self.tensors[name] = tensor
        return name

    def operator(self, kind: str, inputs: list[str], output: str, *, version: int = 1) -> None:
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = version
        self.codes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(self.codes) - 1
        names = list(self.tensors)
        operator.inputs = [names.index(name) for name in inputs]
        operator.outputs = [names.index(output)]
        if kind == "FULLY_CONNECTED":
            operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
            operator.builtinOptions = schema.FullyConnectedOptionsT()
        self.operators.append(operator)

    def dense(self, source: str, output: str, *, activations: str, weights: str, version: int = 4) -> None:
        """Multiply `source` by constant weights; both tensors are made here if they are not there."""
        for name, size in ((source, SIZE), (output, OUTPUTS)):
            if name not in self.tensors:
                self.tensor(name, (1, size), activations)
        scale = 0.01 if weights == "int8" else 0.0
        self.tensor(f"{output}_w", (OUTPUTS, SIZE), weights, scale=scale, value=1)
        bias = {"int8": "int32", "int16": "int64"}.get(activations, "float32")
        scale = GRIDS[activations][0] * 0.01 if activations in GRIDS else 0.0
        self.tensor(f"{output}_b", (OUTPUTS,), bias, scale=scale, value=0)
        self.operator("FULLY_CONNECTED", [source, f"{output}_w", f"{output}_b"], output, version=version)

    def read(
        self, folder: Path, inputs: str = "x", outputs: str = "y", copies: int = 1, **options: Any
    ) -> Coverage:
        names = list(self.tensors)
        graph = schema.SubGraphT()
        graph.tensors, graph.operators = list(self.tensors.values()), self.operators
        graph.inputs, graph.outputs = [names.index(inputs)], [names.index(outputs)]
        model = schema.ModelT()
        model.version, model.operatorCodes, model.subgraphs, model.buffers = (
            3,
            self.codes,
            [graph] * copies,
            self.buffers,
        )
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        file = folder / "model.tflite"
        file.write_bytes(bytes(builder.Output()))
        return read(file, "litert", **options)


def test_full_integers(tmp_path: Path) -> None:
    file = File()
    file.dense("x", "y", activations="int8", weights="int8")
    found = file.read(tmp_path)
    assert (found.products, found.integer_products, found.dynamic, found.wide) == (1, 1, 0, 0)
    assert found.macs == found.integer_macs == SIZE * OUTPUTS
    assert found.conversions == 0
    assert problems(found) == ()


def test_floats(tmp_path: Path) -> None:
    file = File()
    file.dense("x", "y", activations="float32", weights="float32")
    found = file.read(tmp_path)
    assert (found.products, found.integer_products, found.macs, found.integer_macs) == (
        1,
        0,
        SIZE * OUTPUTS,
        0,
    )
    assert found.left_out[0].cause == "not quantized"


def test_dynamic_range_is_told_apart(tmp_path: Path) -> None:
    file = File()
    file.dense("x", "y", activations="float32", weights="int8")
    found = file.read(tmp_path)
    assert (found.integer_products, found.dynamic, found.dynamic_types) == (1, 1, ("FULLY_CONNECTED",))
    assert found.dynamic_macs == found.macs == SIZE * OUTPUTS
    assert "ranges found at run time" in found.sentence()


def test_dynamic_range_really_rounds_its_activations(tmp_path: Path) -> None:
    """Why it is counted among the integers: sums of rounded activations come out, not those of the floats given."""
    from ai_edge_litert.interpreter import Interpreter

    file = File()
    file.dense("x", "y", activations="float32", weights="int8")
    file.read(tmp_path)
    interpreter = Interpreter(model_path=str(tmp_path / "model.tflite"), num_threads=1)
    interpreter.allocate_tensors()
    x = np.random.default_rng(0).normal(size=(1, SIZE)).astype(np.float32)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    found = float(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0, 0])
    exact, step = 0.01 * float(x.sum()), 0.01 * float(x.max() - x.min()) / 255
    assert 0.01 * step < abs(found - exact) < SIZE * step


def test_further_graphs_are_said_to_be_uncounted(tmp_path: Path) -> None:
    file = File()
    file.dense("x", "y", activations="int8", weights="int8")
    assert "1 further graphs" in problems(file.read(tmp_path, copies=2))[-1]


def test_int16_activations_are_told_apart_and_run_outside_the_fast_kernels(tmp_path: Path) -> None:
    file = File()
    file.dense("x", "y", activations="int16", weights="int8", version=7)
    found = file.read(tmp_path)
    assert (found.integer_products, found.wide, found.outside_products) == (1, 1, ("y",))
    assert "16-bit activations" in problems(found)[0]
    assert "outside the runtime's fast kernels" in problems(found)[1]


def test_weights_that_are_unpacked_are_floats(tmp_path: Path) -> None:
    file = File()
    file.tensor("w8", (OUTPUTS, SIZE), "int8", scale=0.01, value=1)
    file.tensor("w", (OUTPUTS, SIZE), "float32")
    file.operator("DEQUANTIZE", ["w8"], "w", version=2)
    file.tensor("x", (1, SIZE), "float32")
    file.tensor("b", (OUTPUTS,), "float32", value=0)
    file.tensor("y", (1, OUTPUTS), "float32")
    file.operator("FULLY_CONNECTED", ["x", "w", "b"], "y")
    found = file.read(tmp_path)
    assert (found.integer_products, found.dynamic, found.conversions) == (0, 0, 0)
    assert found.left_out[0].cause == "weights only"


@pytest.mark.parametrize(("kind", "cause"), [("TANH", "left in floats"), ("SIN", "no integer kernel")])
def test_what_a_quantizer_left_out_is_told_from_what_has_no_kernel(
    tmp_path: Path, kind: str, cause: str
) -> None:
    """LiteRT has an int8 tanh, and no int8 sine."""
    file = File()
    file.dense("x", "d", activations="int8", weights="int8")
    for name in ("df", "tf"):
        file.tensor(name, (1, OUTPUTS), "float32")
    file.tensor("y", (1, OUTPUTS), "int8", scale=1 / 128)
    file.operator("DEQUANTIZE", ["d"], "df", version=2)
    file.operator(kind, ["df"], "tf")
    file.operator("QUANTIZE", ["tf"], "y")
    found = file.read(tmp_path)
    assert (found.conversions, found.integer_products, found.float_operators) == (2, 1, 1)
    assert (found.first and found.first.type, found.first and found.first.cause) == (kind, cause)


def test_operators_have_the_names_of_the_reference(tmp_path: Path) -> None:
    plain = File()
    plain.dense("x", "y", activations="float32", weights="float32")
    plain.read(tmp_path)
    reference = (tmp_path / "model.tflite").rename(tmp_path / "reference.tflite")
    quantized = File()
    quantized.dense("x", "y_quantized", activations="float32", weights="float32")
    found = quantized.read(tmp_path, outputs="y_quantized", reference=reference)
    assert [left.name for left in found.left_out] == ["y"]
