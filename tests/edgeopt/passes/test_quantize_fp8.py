# SPDX-License-Identifier: Apache-2.0
"""fp8: what is on E4M3's grid and what is not, against ml_dtypes; which device may ask for it."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.passes import Order, quantize_fp8
from edgeopt.plan import make_plan
from edgeopt.recipe import Recipe
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import load_profile
from edgeopt_wire.errors import RecipeError, UnsupportedError
from edgeopt_wire.tensor import TensorSpec

node = helper.make_node
DEAD = 3


def _net() -> Model:
    """Stem of 3 channels, two convolutions of 32, a depthwise one, a product of matrices with 9 rows."""
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> Any:
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        if name == "w2":
            values[DEAD] = 0
        return numpy_helper.from_array(values, name)

    nodes = [
        node("Conv", ["x", "w1"], ["c1"], "stem", strides=[2, 2]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2", "b2"], ["c2"], "wide", pads=[1] * 4),
        node("Conv", ["r1", "w2"], ["c3"], "wide again", pads=[1] * 4),
        node("Add", ["c2", "c3"], ["a"]),
        node("Conv", ["a", "w3"], ["c4"], "depthwise", group=32),
        node("Reshape", ["c4", "shape"], ["f"]),
        node("MatMul", ["f", "w4"], ["y"], "product"),
    ]
    tensors = [
        tensor("w1", 32, 3, 3, 3), tensor("w2", 32, 32, 3, 3), tensor("b2", 32), tensor("w3", 32, 1, 3, 3),
        tensor("w4", 32, 16), numpy_helper.from_array(np.array([1, 9, 32], np.int64), "shape"),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 9, 16])], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    spec = (TensorSpec("x", (1, 3, 12, 12), "float32", "NCHW"),)
    return Model("onnx", program, "net", spec, (TensorSpec("y", (1, 9, 16), "float32"),))


def _samples() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(1, 3, 12, 12)).astype(np.float32)} for _ in range(4)]


def _quantized(**more: Any) -> Any:
    return quantize_fp8.apply(_net(), Order(samples=_samples(), **more))


PLAIN, ALL = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL


def _run(program: Any, extra: tuple[str, ...] = (), level: Any = PLAIN) -> list[np.ndarray]:
    watched = onnx.ModelProto()
    watched.CopyFrom(program)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(found) for found in session.run(None, _samples()[0])]


def test_products_with_enough_channels_are_in_fp8_and_the_rest_is_named() -> None:
    found = _quantized()
    kinds = {t.name: t.data_type for t in found.model.program.graph.initializer}
    assert {name for name, kind in kinds.items() if kind == TensorProto.FLOAT8E4M3FN} == {
        "w2_fp8_0", "w4_fp8_1"
    }  # fmt: skip
    assert kinds["w1"] == kinds["w3"] == kinds["b2"] == TensorProto.FLOAT
    assert found.notes[0].startswith("3 of 5 products in fp8")
    assert "stem, depthwise" in found.notes[1]


def test_weights_have_a_scale_per_channel_and_dead_ones_stay_zero() -> None:
    tensors = {t.name: t for t in _quantized().model.program.graph.initializer}
    weight = next(numpy_helper.to_array(t) for t in _net().program.graph.initializer if t.name == "w2")
    scale = numpy_helper.to_array(tensors["w2_fp8_0_scale"])
    alive = np.arange(32) != DEAD
    np.testing.assert_allclose(scale[alive], np.abs(weight).max((1, 2, 3))[alive] / 448, rtol=1e-6)
    stored = numpy_helper.to_array(tensors["w2_fp8_0"]).astype(np.float32)
    assert np.abs(stored[alive]).max((1, 2, 3)).min() == 448
    assert not stored[DEAD].any()
    relative = np.abs(stored * scale[:, None, None, None] - weight)[alive] / scale[alive, None, None, None]
    assert relative.max() <= 16  # half a step of the highest octave, 256 to 448


def test_an_activation_read_twice_is_quantized_once_and_lies_on_the_grid_of_its_largest_value() -> None:
    import ml_dtypes

    program = _quantized().model.program
    assert [n.op_type for n in program.graph.node].count("QuantizeLinear") == 2
    plain, real = _run(program, ("r1", "r1_real"))[1:]
    scale = next(numpy_helper.to_array(t) for t in program.graph.initializer if t.name == "r1_scale")
    wanted = np.clip(plain / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(real, wanted)
    assert float(scale) >= float(plain.max()) / 448


def test_outputs_are_as_near_as_three_bits_allow() -> None:
    exact, found = _run(_net().program)[0], _run(_quantized().model.program)[0]
    sqnr = 10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum())
    assert 22 < sqnr < 40


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
def test_a_bound_before_fp8_survives_the_runtimes_optimizer(activation: str) -> None:
    model = _net()
    if activation == "Clip":
        relu = next(entry for entry in model.program.graph.node if entry.op_type == "Relu")
        relu.op_type = "Clip"
        relu.input.extend(["low", "high"])
        ends = [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("low", 0), ("high", 6))]
        model.program.graph.initializer.extend(ends)
    program = quantize_fp8.apply(model, Order(samples=_samples())).model.program
    np.testing.assert_allclose(_run(program, level=ALL)[0], _run(program)[0], rtol=1e-3, atol=1e-4)


def test_an_outlier_costs_fp8_less_than_int8() -> None:
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    values[0] = 100.0
    scale = 100 / 448
    fp8 = quantize_fp8.to_e4m3(values / scale).astype(np.float32) * scale
    int8 = np.round(values / (100 / 127)) * (100 / 127)
    error = [float(((found - values)[1:] ** 2).mean()) for found in (fp8, int8)]
    assert error[0] < error[1] / 10


def test_excluded_layers_and_nets_without_such_layers_are_refused_or_kept() -> None:
    assert "2 of 5 products" in _quantized(exclude=("wide again",)).notes[0]
    with pytest.raises(UnsupportedError, match="fp8 gains nothing here"):
        _quantized(options=quantize_fp8.Options(least_channels=999), exclude=("product",))
    with pytest.raises(RecipeError, match="at least one sample"):
        quantize_fp8.apply(_net(), Order())


@pytest.mark.parametrize("device", ["jetson-orin", "x86-64", "raspberry-pi-5"])
def test_a_device_without_fp8_is_refused_with_those_that_have_it(device: str) -> None:
    with pytest.raises(
        RecipeError, match=r"fp8-e4m3 runs on TensorRT on Ada, Hopper and Blackwell \(jetson-thor\)"
    ):
        make_plan(load_profile(device), Recipe(precisions=("fp8-e4m3",)))


def test_thor_takes_fp8_and_bf16_where_a_recipe_asks_and_not_else() -> None:
    thor = load_profile("jetson-thor")
    assert {a.precision for a in make_plan(thor, Recipe()).artifacts} == {"fp32", "int8", "fp16"}
    asked = make_plan(thor, Recipe(precisions=("fp8-e4m3", "bf16")))
    assert {(a.precision, a.pass_name) for a in asked.artifacts} == {
        ("fp32", ""), ("fp8-e4m3", "quantize_fp8"), ("bf16", "cast_floats")
    }  # fmt: skip
    orin = make_plan(load_profile("jetson-orin-agx"), Recipe(precisions=("bf16",)))
    assert [c.accelerator for c in orin.candidates if not c.reference] == ["tensorrt"]
    with pytest.raises(RecipeError, match="bf16 runs on TensorRT from version 9 on"):
        make_plan(load_profile("x86-64"), Recipe(precisions=("bf16",)))
