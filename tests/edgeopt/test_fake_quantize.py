# SPDX-License-Identifier: Apache-2.0
"""One session in which every tensor can be put on its grid: off is float, on is what the quantized model does."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.fake_quantize import FakeQuantized, Grid, read_quantized
from edgeopt.onnx_graphs import fold
from edgeopt.passes import Order, quantize_static
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RuntimeFailure
from edgeopt_wire.tensor import TensorSpec


def _model() -> Model:
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(rng.normal(0, 0.3, shape).astype(np.float32), name)
        for name, shape in (("w1", (8, 3, 3, 3)), ("b1", (8,)), ("w2", (5, 8)), ("b2", (5,)))
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], "gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    spec = (TensorSpec("x", (1, 3, 8, 8), "float32", "NCHW"),)
    return Model("onnx", program, "net", spec, (TensorSpec("y", (1, 5), "float32"),))


def _samples(count: int = 6) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def _run(program: onnx.ModelProto) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(program.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, sample)[0] for sample in _samples()])


def test_off_is_the_float_model_and_on_is_the_quantized_one() -> None:
    model = _model()
    quantized = quantize_static.apply(
        model, Order(scheme=Scheme("uint8", "int8", True, False), samples=_samples())
    ).model.program
    found = read_quantized(quantized)
    assert {"x", "r"} <= set(found.grids)
    assert {"w1", "w2"} <= set(found.weights)
    lab = FakeQuantized(fold(model.program), found.grids, found.weights)
    off = np.concatenate([lab.run(sample)["y"] for sample in _samples()])
    on = np.concatenate([lab.run(sample, found.grids, found.weights)["y"] for sample in _samples()])
    assert np.abs(off - _run(model.program)).max() < 1e-5
    error = np.abs(_run(quantized) - off).max()
    assert np.abs(on - _run(quantized)).max() < error / 10
    assert error > 1e-4


def test_one_tensor_alone_changes_less_than_all() -> None:
    model = _model()
    program = fold(model.program)
    lab = FakeQuantized(program, ["x", "r"], [])
    sample = _samples(1)[0]
    exact = lab.run(sample)["y"]
    coarse = {"x": Grid.of_range(-4, 4, bits=4), "r": Grid.of_range(0, 4, bits=4)}
    errors = [
        float(np.square(lab.run(sample, grids)["y"] - exact).sum())
        for grids in ({}, {"x": coarse["x"]}, {"x": coarse["x"].clip_only})
    ]
    assert errors[0] == 0
    assert errors[1] > 1e-6
    assert errors[2] < errors[1] / 100  # nothing lies beyond 4 sigma here, so clipping alone costs nothing


def test_grids_hold_zero_and_their_ends() -> None:
    grid = Grid.of_range(-1.0, 3.0)
    assert abs(round(grid.low / grid.step) - grid.low / grid.step) < 1e-9
    assert grid.high - grid.low == pytest.approx(255 * grid.step)
    symmetric = Grid.of_range(-1.0, 3.0, symmetric=True)
    assert symmetric.low == -symmetric.high == pytest.approx(-3.0)
    assert Grid.of_range(0.0, 0.0) == Grid(1.0, 0.0, 0.0)


def test_a_float_model_has_no_grids_to_read() -> None:
    with pytest.raises(RuntimeFailure, match="no QuantizeLinear"):
        read_quantized(_model().program)


def test_a_tensor_that_is_not_there_is_named() -> None:
    with pytest.raises(RuntimeFailure, match="nowhere"):
        FakeQuantized(fold(_model().program), ["nowhere"])
