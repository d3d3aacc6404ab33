# SPDX-License-Identifier: Apache-2.0
"""What an int8 ONNX model is made of: the weights decided before, the ranges given, floats only where they were asked for."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.calibrate import Calibration
from edgeopt.fake_quantize import read_quantized
from edgeopt.onnx_graphs import observer
from edgeopt.passes import Order, quantize_static, round_weights
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme, load_profile
from edgeopt_wire.errors import RecipeError, UnsupportedError
from edgeopt_wire.tensor import TensorSpec

U8S8 = Scheme("uint8", "int8", True, False)
S8S8 = Scheme("int8", "int8", True, False)
TENSORRT = Scheme("int8", "int8", True, True)
SCHEMES = pytest.mark.parametrize("scheme", [U8S8, S8S8, TENSORRT], ids=["u8s8", "s8s8", "tensorrt"])

MINMAX = Calibration("minmax")
DEAD = 5


def _net(last: str = "Gemm") -> Model:
    """Convolution, a residual depthwise one, pooling, classifier (or a Conv and HardSigmoid at the end); a channel is dead."""
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> Any:
        values = rng.normal(0, 0.3, shape).astype(np.float32)
        if name == "w1":
            values[DEAD] = 0
        return numpy_helper.from_array(values, name)

    tensors = [
        tensor("w1", 16, 3, 3, 3), tensor("b1", 16), tensor("w2", 16, 1, 3, 3), tensor("b2", 16),
        tensor("w3", 10, 16, *([1, 1] if last == "Conv" else [])), tensor("b3", 10),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "stem", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "depthwise", group=16, pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["r1", "c2"], ["a"], "residual"),
        helper.make_node("GlobalAveragePool", ["a"], ["p"], "pool"),
    ]
    if last == "Gemm":
        nodes.append(helper.make_node("Flatten", ["p"], ["f"], "flatten"))
        nodes.append(helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "classifier", transB=1))
    else:
        nodes.append(helper.make_node("Conv", ["a", "w3", "b3"], ["y"], "head"))
        nodes.pop(-2)
    shape = [1, 10] if last == "Gemm" else [1, 10, 6, 6]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(program)
    spec = (TensorSpec("x", (1, 3, 12, 12), "float32", "NCHW"),)
    return Model("onnx", program, "net", spec, (TensorSpec("y", tuple(shape), "float32"),))


def _samples(count: int = 8, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(1, 3, 12, 12)).astype(np.float32)} for _ in range(count)]


def _run(model: Model, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = ort.InferenceSession(model.program.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, sample)[0] for sample in samples])


def _tensors(model: Model) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.program.graph.initializer}


def _quantized(model: Model, scheme: Scheme = U8S8, **more: Any) -> Model:
    return quantize_static.apply(
        model, Order(scheme, **({"calibration": MINMAX, "samples": _samples()} | more))
    ).model


def _extremes(model: Model, name: str) -> tuple[float, float]:
    observe = observer(model.program, frozenset({name}))
    values = np.concatenate([found.reshape(-1) for sample in _samples() for _, found in observe(sample)])
    return float(values.min()), float(values.max())


def _before(model: Model, node_name: str) -> str:
    """The operator that makes the first input of a node."""
    node = next(node for node in model.program.graph.node if node.name == node_name)
    return next(
        (str(other.op_type) for other in model.program.graph.node if node.input[0] in other.output),
        "an input",
    )


@SCHEMES
def test_integers_are_the_rounded_weights_and_scales_their_largest(scheme: Scheme) -> None:
    rounded = round_weights.apply(_net(), Order(samples=_samples(16))).model
    found = _tensors(_quantized(rounded, scheme))
    for name, weight in _tensors(rounded).items():
        if not name.startswith("w"):
            continue
        rows = weight.reshape(len(weight), -1).astype(np.float64)
        largest = np.abs(rows).max(1)
        alive = largest > 0
        np.testing.assert_allclose(found[f"{name}_scale"].reshape(-1)[alive], largest[alive] / 127, rtol=1e-6)
        integers = found[f"{name}_quantized"].reshape(len(weight), -1)
        assert integers.dtype == np.int8
        np.testing.assert_array_equal(integers[alive], np.rint(rows[alive] * 127 / largest[alive, None]))
        assert not found[f"{name}_zero_point"].any()


@SCHEMES
def test_biases_are_int32_on_the_accumulators_grid(scheme: Scheme) -> None:
    model = _net()
    found = _tensors(_quantized(model, scheme))
    for name, weight, source in (("b1", "w1", "x"), ("b2", "w2", "r1")):
        assert found[f"{name}_quantized"].dtype == np.int32
        step = found[f"{name}_quantized_scale"].astype(np.float64).reshape(-1)
        expected = found[f"{weight}_scale"].astype(np.float64).reshape(-1) * found[f"{source}_scale"]
        alive = np.arange(16) != DEAD if name == "b1" else slice(None)
        np.testing.assert_allclose(step[alive], expected[alive], rtol=1e-5)
        values = _tensors(model)[name][alive]
        assert (np.abs(found[f"{name}_quantized"][alive] * step[alive] - values) <= 0.51 * step[alive]).all()


@SCHEMES
def test_a_grid_covers_what_the_samples_showed(scheme: Scheme) -> None:
    model = _net()
    grids = read_quantized(_quantized(model, scheme).program).grids
    for name in ("x", "r1", "c2", "a"):
        low, high = _extremes(model, name)
        grid = grids[name]
        if scheme.symmetric_activations:
            assert grid.step == pytest.approx(max(-low, high) / 127, rel=1e-5)
        else:
            assert grid.step == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=1e-5)
            assert grid.low == pytest.approx(min(low, 0), abs=grid.step)
            assert grid.high == pytest.approx(max(high, 0), abs=grid.step)


@SCHEMES
def test_zero_points_and_types_are_the_schemes(scheme: Scheme) -> None:
    found = _tensors(_quantized(_net(), scheme))
    kind = np.dtype(scheme.activation_dtype)
    points = {name: found[f"{name}_zero_point"] for name in ("x", "r1", "c2")}
    assert all(point.dtype == kind for point in points.values())
    assert points["r1"] == (0 if scheme.symmetric_activations else np.iinfo(kind).min)
    if scheme.symmetric_activations:
        assert not any(points.values())
    else:
        assert points["c2"] not in (np.iinfo(kind).min, np.iinfo(kind).max)


def test_a_percentile_clips_inside_and_leaves_the_output_whole() -> None:
    model = _net("Conv")
    grids = read_quantized(_quantized(model, calibration=Calibration("percentile", 95.0)).program).grids
    inner, outer = _extremes(model, "r1")[1], _extremes(model, "y")
    assert grids["r1"].high < 0.8 * inner
    assert grids["y"].low == pytest.approx(outer[0], abs=grids["y"].step)
    assert grids["y"].high == pytest.approx(outer[1], abs=grids["y"].step)


def test_a_matrix_product_at_the_end_writes_floats() -> None:
    model = _quantized(_net(), calibration=Calibration("percentile", 95.0))
    assert model.program.graph.node[-1].op_type == "Gemm"
    rows = _run(model, _samples(64, seed=4))
    assert len(np.unique(rows)) > 0.9 * rows.size  # a grid would have 256 values for all of them


@SCHEMES
def test_an_activation_behind_the_last_product_still_clips(scheme: Scheme) -> None:
    model = _net()
    model.program.graph.node[-1].output[0] = "logits"
    model.program.graph.node.append(helper.make_node("Relu", ["logits"], ["y"], "last"))
    exact = _run(model, _samples(16, seed=4))
    assert (exact == 0).any()
    found = _run(_quantized(model, scheme), _samples(16, seed=4))
    assert found.min() >= 0
    assert 10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum()) > 25


def test_inputs_and_outputs_keep_name_type_and_shape() -> None:
    model = _net()
    found = _quantized(model)
    assert (found.inputs, found.outputs, found.format) == (model.inputs, model.outputs, "onnx")
    assert found.program.graph.input[0] == model.program.graph.input[0]
    assert found.program.graph.output[0].name == "y"
    assert _run(found, _samples()).dtype == np.float32


@SCHEMES
def test_a_dead_channel_gives_its_bias(scheme: Scheme) -> None:
    """An all-zero channel has no largest weight: its scale is neither zero nor NaN, and its output not lost."""
    model = _net()
    quantized = _quantized(model, scheme)
    found = _tensors(quantized)
    assert np.isfinite(found["w1_scale"]).all()
    assert (found["w1_scale"] > 0).all()
    assert not found["w1_quantized"][DEAD].any()
    exact, outputs = _run(model, _samples()), _run(quantized, _samples())
    assert np.isfinite(outputs).all()
    assert np.abs(outputs - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("selector", ["depthwise", "Conv#1", "role:depthwise"])
def test_an_excluded_operator_reads_and_writes_floats(selector: str) -> None:
    model = _net()
    result = quantize_static.apply(model, Order(U8S8, MINMAX, _samples(), exclude=(selector,)))
    after = _tensors(result.model)
    np.testing.assert_array_equal(after["w2"], _tensors(model)["w2"])
    np.testing.assert_array_equal(after["b2"], _tensors(model)["b2"])
    assert after["w1_quantized"].dtype == np.int8
    assert "depthwise" in result.notes[0]


def test_excluding_a_type_leaves_all_of_it_in_float() -> None:
    found = _quantized(_net(), exclude=("Conv",))
    assert {"w1", "w2"} <= _tensors(found).keys()
    assert "w3_quantized" in _tensors(found)
    with pytest.raises(RecipeError, match="Sotfmax"):
        _quantized(_net(), exclude=("Sotfmax",))


@SCHEMES
def test_every_operator_of_the_net_is_integer(scheme: Scheme) -> None:
    """All that have integer kernels stand between DequantizeLinear and QuantizeLinear."""
    model = _quantized(_net(), scheme)
    for name in ("stem", "depthwise", "residual", "pool", "classifier"):
        node = next(node for node in model.program.graph.node if node.name == name)
        sources = {output: other.op_type for other in model.program.graph.node for output in other.output}
        reshaped = {"Flatten"} if name == "classifier" else set()
        assert {sources[entry] for entry in node.input} <= {"DequantizeLinear"} | reshaped, name


def test_tensorrt_has_zero_points_of_zero() -> None:
    points = [
        values for name, values in _tensors(_quantized(_net(), TENSORRT)).items() if "zero_point" in name
    ]
    assert points
    assert not any(point.any() for point in points)


def test_every_scheme_of_the_shipped_profiles_for_onnx_is_taken() -> None:
    schemes = {
        target.scheme: device.schemes[target.scheme]
        for device in (load_profile(name) for name in ("x86-64", "generic-arm64", "jetson-orin"))
        for target in device.targets
        if target.format == "onnx" and target.precision == "int8"
    }
    assert len(schemes) >= 3
    exact = _run(_net(), _samples(16, seed=6))
    for name, scheme in schemes.items():
        found = _run(_quantized(_net(), scheme), _samples(16, seed=6))
        assert 10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum()) > 25, name


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int16", "int8", True, False),
        Scheme("uint8", "uint8", True, False),
        Scheme("uint8", "int4", True, False),
        Scheme("int8", "int8", True, False, io="int8"),
    ],
    ids=["activations", "weights", "four bits", "integer inputs"],
)
def test_a_scheme_it_cannot_do_is_refused_with_what_it_can(scheme: Scheme) -> None:
    with pytest.raises(UnsupportedError, match="int8 weights"):
        _quantized(_net(), scheme)


def test_no_scheme_and_no_samples_are_refused() -> None:
    with pytest.raises(RecipeError, match="scheme"):
        quantize_static.apply(_net(), Order(samples=_samples()))
    with pytest.raises(RecipeError, match="calibration"):
        _quantized(_net(), samples=())


def test_the_model_given_stays_and_two_runs_give_the_same_bytes() -> None:
    model = _net()
    before = model.program.SerializeToString(deterministic=True)
    once, again = (_quantized(model).program.SerializeToString(deterministic=True) for _ in range(2))
    assert once == again
    assert model.program.SerializeToString(deterministic=True) == before
