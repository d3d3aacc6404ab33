# SPDX-License-Identifier: Apache-2.0
"""The integer reference against ONNX Runtime: every quantized tensor of whole networks, within one step."""

import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_nets import Net, attention, branches, convolutions, inputs

from edgeopt.calibrate import Calibration
from edgeopt.passes import Order, quantize_static
from edgeopt.simulate.integer import IntegerNet, Prediction
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError, UnsupportedError

U8S8 = Scheme("uint8", "int8", True, False)
PER_TENSOR = Scheme("uint8", "int8", False, False)
S8S8 = Scheme("int8", "int8", True, True)
DEDICATED = Scheme("uint8", "int8", True, True)
SHARE = 0.999
"""Of the values of each tensor, how many must be within one integer step of ONNX Runtime's."""


def quantized(model: Model, scheme: Scheme = U8S8) -> Any:
    samples = [{"x": sample} for sample in inputs(model, 16)]
    return quantize_static.apply(model, Order(scheme, Calibration("minmax"), samples)).model.program


def in_runtime(program: Any, x: np.ndarray, *, is_optimized: bool = True) -> dict[str, np.ndarray]:
    """Every quantized activation, and the outputs, from ONNX Runtime."""
    watched = onnx.ModelProto()
    watched.CopyFrom(program)
    rounded = [node.output[0] for node in program.graph.node if node.op_type == "QuantizeLinear"]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in rounded)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not is_optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


def off_by_more_than_one(found: Prediction, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """The share of each quantized tensor's values that are more than one step from the expected."""
    assert found.integers
    shares = {}
    for name, values in found.integers.items():
        assert values.dtype == expected[name].dtype
        steps = np.abs(values.astype(np.int32) - expected[name].astype(np.int32))
        shares[name] = float(np.mean(steps > 1))
    return shares


@pytest.mark.parametrize("scheme", [U8S8, PER_TENSOR], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("build", [convolutions, branches, attention])
def test_every_quantized_tensor_is_within_one_step(build: Callable[[], Model], scheme: Scheme) -> None:
    model = build()
    program = quantized(model, scheme)
    net = IntegerNet(program)
    for x in inputs(model, 3, seed=9):
        found = net.run({"x": x})
        shares = off_by_more_than_one(found, in_runtime(program, x))
        assert max(shares.values()) <= 1 - SHARE, shares


@pytest.mark.parametrize("build", [convolutions, branches, attention])
def test_outputs_are_those_of_the_model_as_it_is_shipped(build: Callable[[], Model]) -> None:
    """Watching every tensor changes what the runtime fuses, so the outputs are compared with the unwatched model."""
    model = build()
    program = quantized(model)
    (name,) = [output.name for output in program.graph.output]
    session = ort.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in inputs(model, 3, seed=9):
        expected = session.run([name], {"x": x})[0]
        found = IntegerNet(program).run({"x": x}).outputs[name]
        step = np.ptp(expected) / 255  # what 8 bits tell apart at best
        assert np.mean(np.abs(found - expected) > 1.01 * step) <= 1 - SHARE


def test_convolutions_and_products_round_exactly_as_the_runtime(recorder: ModuleType) -> None:
    for name, (program, x) in recorder.cases().items():
        output = program.graph.output[0].name
        expected = recorder.run(program, x, x64quantprecision="1")  # exact on every CPU
        assert np.array_equal(IntegerNet(program).run(x).outputs[output], expected), name


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_softmax_takes_whole_steps_as_the_runtime_does(dtype: str) -> None:
    """The kernel rounds 1 / scale down, here from 100.9 to 100: a full step for large shares."""
    low = np.iinfo(dtype).min
    grids = {"x": (0.05, low + 100), "y": (1 / 100.9, low)}
    tensors = [
        numpy_helper.from_array(value, f"{name}_{part}")
        for name, (scale, zero) in grids.items()
        for part, value in (("scale", np.float32(scale)), ("zero", np.array(zero, dtype)))
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_real"]),
        helper.make_node("Softmax", ["x_real"], ["sum"], axis=-1),
        helper.make_node("QuantizeLinear", ["sum", "y_scale", "y_zero"], ["y_q"]),
        helper.make_node("DequantizeLinear", ["y_q", "y_scale", "y_zero"], ["y"]),
    ]
    shape = [1, 40, 6]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "softmax", ends[:1], ends[1:], tensors)
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    x = {"x": np.random.default_rng(3).normal(0, 3, shape).astype(np.float32)}
    session = ort.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, x)[0]
    found = IntegerNet(program).run(x).outputs["y"]
    steps = np.rint((found - expected) * 100.9)
    assert np.mean(steps != 0) <= 1 - SHARE
    assert expected.max() <= 100 / 100.9 + 1e-6, (
        "the runtime rounds a share of nearly 1 to a whole step below"
    )


def test_transposed_convolutions_run_in_float() -> None:
    net = Net((1, 4, 6, 6), 4)
    x = net.node("Relu", net.conv("x", 4, 8))
    x = net.node("ConvTranspose", x, net.weight(8, 3, 2, 2), net.weight(3), strides=[2, 2])
    model = net.model(net.node("Sigmoid", x))
    program = quantized(model)
    x = inputs(model, 1, seed=9)[0]
    found = IntegerNet(program).run({"x": x})
    assert max(off_by_more_than_one(found, in_runtime(program, x)).values()) <= 1 - SHARE


def test_signed_activations_agree_when_nothing_is_fused() -> None:
    model = convolutions()
    program = quantized(model, S8S8)
    x = inputs(model, 1, seed=9)[0]
    shares = off_by_more_than_one(
        IntegerNet(program).run({"x": x}), in_runtime(program, x, is_optimized=False)
    )
    assert max(shares.values()) <= 1 - SHARE, shares


def test_layers_left_in_float_are_computed_in_float() -> None:
    model = convolutions()
    names = tuple(node.name for node in model.program.graph.node if node.op_type == "Conv")[1:4]
    samples = [{"x": sample} for sample in inputs(model, 16)]
    order = Order(U8S8, Calibration("minmax"), samples, exclude=names)
    program = quantize_static.apply(model, order).model.program
    net = IntegerNet(program)
    x = inputs(model, 1, seed=9)[0]
    assert not {layer.name for layer in net.layers} & set(names)
    assert max(off_by_more_than_one(net.run({"x": x}), in_runtime(program, x)).values()) <= 1 - SHARE


@pytest.mark.parametrize(
    "scheme", [U8S8, S8S8, DEDICATED], ids=["u8s8", "s8s8", "u8s8, Q and DQ for each reader"]
)
@pytest.mark.parametrize("build", [convolutions, branches, attention])
def test_layers_are_those_that_the_runtime_fuses(
    build: Callable[[], Model], scheme: Scheme, tmp_path: Path
) -> None:
    """With int8 activations, a tensor that is read twice keeps its neighbours in float."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the rules are those of x86")
    program = quantized(build(), scheme)
    fused = Counter(
        {"QLinearMatMul": "MatMul", "MatMulIntegerToFloat": "MatMul", "QLinearConv": "Conv", "QGemm": "Gemm"}[
            node.op_type
        ]
        for node in optimized(program, tmp_path / "optimized.onnx")
        if node.op_type.startswith(("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat"))
    )
    products = sum(
        node.op_type == "MatMul" and not is_constant(program, node.input[1]) for node in program.graph.node
    )
    found = Counter(layer.op_type for layer in IntegerNet(program).layers)
    found["MatMul"] += products
    assert +found == +fused


def optimized(program: Any, file: Path) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(file)
    ort.InferenceSession(program.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(onnx.load(file).graph.node)


def is_constant(program: Any, name: str) -> bool:
    """Whether a tensor is a dequantized initializer."""
    initializers = {tensor.name for tensor in program.graph.initializer}
    return any(name in node.output and node.input[0] in initializers for node in program.graph.node)


def test_unknown_operators_are_refused_by_name() -> None:
    net = Net((1, 4, 8, 8), 0)
    y = net.node("LpPool", net.node("LRN", "x", size=3), kernel_shape=[2, 2])
    with pytest.raises(UnsupportedError, match="LRN, LpPool"):
        IntegerNet(net.model(y).program)


def test_interpolating_integers_is_refused() -> None:
    net = Net((1, 4, 8, 8), 0)
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    y = net.node("Resize", net.conv("x", 4, 4), "", scales, mode="linear")
    model = net.model(y)
    program = quantized(model)
    with pytest.raises(UnsupportedError, match=r"Resize .* interpolates"):
        IntegerNet(program).run({"x": inputs(model, 1)[0]})


def test_a_missing_input_is_named() -> None:
    program = quantized(convolutions())
    with pytest.raises(RecipeError, match="missing"):
        IntegerNet(program).run({"photo": np.zeros((1, 3, 24, 24), np.float32)})


def test_the_program_is_not_touched_and_can_be_run_again() -> None:
    model = convolutions()
    program = quantized(model)
    before = program.SerializeToString()
    net = IntegerNet(program)
    x = {"x": inputs(model, 1)[0]}
    first, second = net.run(x), net.run(x)
    assert program.SerializeToString() == before
    assert all(np.array_equal(first.outputs[name], second.outputs[name]) for name in first.outputs)
