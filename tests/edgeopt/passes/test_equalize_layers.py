# SPDX-License-Identifier: Apache-2.0
"""Neighbouring layers share their ranges channel by channel, and the float model says what it said."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.calibrate import Calibration
from edgeopt.passes import Order, equalize_layers, quantize_static
from edgeopt.passes.equalize_layers import Options
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

PER_TENSOR = Scheme("uint8", "int8", False, False)
CHANNELS = 16


def _net(activation: str = "Relu", *, bound: float = 6.0, bias: float = 0.0, pad: int = 1) -> Model:
    """Pointwise, depthwise, pointwise, pooling, classifier; channels of the first two differ a hundredfold."""
    rng = np.random.default_rng(0)
    spread = np.logspace(-1, 1, CHANNELS)

    def tensor(name: str, *shape: int, rows: Any = 1.0, offset: float = 0.0) -> Any:
        scale = np.broadcast_to(rows, shape[:1]).reshape(-1, *[1] * (len(shape) - 1))
        return numpy_helper.from_array(
            ((rng.normal(0, 0.3, shape) + offset) * scale).astype(np.float32), name
        )

    first, second = rng.permutation(spread), rng.permutation(spread)
    tensors = [
        tensor("w1", CHANNELS, 3, 1, 1, rows=first), tensor("b1", CHANNELS, rows=first, offset=bias),
        tensor("w2", CHANNELS, 1, 3, 3, rows=second), tensor("b2", CHANNELS, rows=second),
        tensor("w3", 12, CHANNELS, 1, 1), tensor("b3", 12), tensor("w4", 5, 12), tensor("b4", 5),
        numpy_helper.from_array(np.float32(0), "zero"), numpy_helper.from_array(np.float32(bound), "bound"),
        numpy_helper.from_array(np.linspace(0.1, 0.4, CHANNELS, dtype=np.float32).reshape(-1, 1, 1), "slope"),
    ]  # fmt: skip
    more = {"Clip": ["zero", "bound"], "PRelu": ["slope"]}.get(activation, [])
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "expand"),
        helper.make_node(activation, ["c1", *more], ["r1"], "act1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "depthwise", group=CHANNELS, pads=[pad] * 4),
        helper.make_node(activation, ["c2", *more], ["r2"], "act2"),
        helper.make_node("Conv", ["r2", "w3", "b3"], ["c3"], "project"),
        helper.make_node("Relu", ["c3"], ["r3"], "act3"),
        helper.make_node("GlobalAveragePool", ["r3"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], "classifier", transB=1),
    ]
    return _model(nodes, tensors, (1, 3, 8, 8))


def _model(nodes: list[Any], tensors: list[Any], shape: tuple[int, ...]) -> Model:
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])], [t for t in tensors if t.name in used],
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(program)
    return Model(
        "onnx", program, "net", (TensorSpec("x", shape, "float32"),), (TensorSpec("y", (1, 5), "float32"),)
    )


def _samples(count: int = 8, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(0, 0.5, size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def _run(model: Model, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = ort.InferenceSession(model.program.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, sample)[0] for sample in samples])


def _tensors(model: Model) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.program.graph.initializer}


def _ranges(model: Model) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every pair of layers: the largest weight of each channel where it is made and where it is read."""
    w = {name: np.abs(values) for name, values in _tensors(model).items()}
    return [
        (w["w1"].max(axis=(1, 2, 3)), w["w2"].max(axis=(1, 2, 3))),
        (w["w2"].max(axis=(1, 2, 3)), w["w3"].max(axis=(0, 2, 3))),
        (w["w3"].max(axis=(1, 2, 3)), w["w4"].max(axis=0)),
    ]


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() <= 1e-4 * np.abs(other).max())


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "PRelu", "Identity"])
def test_the_output_stays_and_channels_of_a_pair_get_equal_ranges(activation: str) -> None:
    model = _net(activation)
    result = equalize_layers.apply(model, Order())
    assert _same(_run(result.model, _samples()), _run(model, _samples()))
    for before, after in _ranges(result.model):
        np.testing.assert_allclose(before, after, rtol=0.01)
    assert not np.allclose(*_ranges(model)[0], rtol=0.5)
    assert "3 pairs" in result.notes[0]


def test_per_tensor_weights_lose_less() -> None:
    model, unseen = _net(), _samples(32, seed=7)
    exact = _run(model, unseen)
    order = Order(PER_TENSOR, Calibration("minmax"), _samples(16))
    noise = [
        np.square(_run(quantize_static.apply(found, order).model, unseen) - exact).sum()
        for found in (model, equalize_layers.apply(model, Order(samples=_samples(16))).model)
    ]
    assert noise[1] < 0.5 * noise[0]


def test_a_relu6_that_binds_keeps_its_pairs_as_they_are() -> None:
    model = _net("Clip", bound=0.5)
    result = equalize_layers.apply(model, Order(samples=_samples()))
    before, after = _tensors(model), _tensors(result.model)
    for name in ("w1", "b1", "w2"):
        np.testing.assert_array_equal(before[name], after[name])
    assert not np.array_equal(before["w4"], after["w4"])
    assert _same(_run(result.model, _samples(seed=3)), _run(model, _samples(seed=3)))
    assert "act1, act2" in result.notes[-1]


def test_a_relu6_that_no_sample_reaches_becomes_a_relu() -> None:
    model = _net("Clip", bound=500.0)
    result = equalize_layers.apply(model, Order(samples=_samples()))
    assert {node.op_type for node in result.model.program.graph.node if node.name.startswith("act")} == {
        "Relu"
    }
    assert _same(_run(result.model, _samples()), _run(model, _samples()))
    assert "2 ReLU6" in result.notes[1]
    onnx.checker.check_model(result.model.program)


def test_without_samples_no_relu6_is_trusted_to_be_idle() -> None:
    result = equalize_layers.apply(_net("Clip", bound=500.0), Order())
    assert [node.op_type for node in result.model.program.graph.node].count("Clip") == 2
    assert "no sample tells" in result.notes[-1]


def test_high_biases_move_on_and_the_output_stays() -> None:
    """Every input of the first ReLU is far above zero, so its bias is of no use there."""
    model = _net(bias=5.0, pad=0)
    result = equalize_layers.apply(model, Order(samples=_samples(), options=Options(absorb=True)))
    kept = equalize_layers.apply(model, Order(samples=_samples()))
    assert _same(_run(result.model, _samples()), _run(model, _samples()))
    before, after = _tensors(kept.model), _tensors(result.model)
    assert np.median(after["b1"] / before["b1"]) < 0.7
    assert "high biases moved" in result.notes[-1]


def test_a_bias_never_moves_into_a_padded_convolution() -> None:
    model = _net(bias=5.0, pad=1)
    one, other = (
        equalize_layers.apply(model, Order(samples=_samples(), options=Options(absorb=absorb))).model
        for absorb in (True, False)
    )
    np.testing.assert_array_equal(_tensors(one)["b1"], _tensors(other)["b1"])
    assert _same(_run(one, _samples(seed=5)), _run(model, _samples(seed=5)))


def test_what_two_layers_read_is_left_alone() -> None:
    model = _net()
    program = onnx.ModelProto()
    program.CopyFrom(model.program)
    program.graph.node[2].input[0] = "r1"
    program.graph.node.insert(3, helper.make_node("Add", ["c2", "r1"], ["sum"], "residual"))
    program.graph.node[4].input[0] = "sum"
    branched = Model("onnx", program, "net", model.inputs, model.outputs)
    result = equalize_layers.apply(branched, Order(samples=_samples()))
    before, after = _tensors(branched), _tensors(result.model)
    for name in ("w1", "b1", "w2", "b2"):
        np.testing.assert_array_equal(before[name], after[name])
    assert _same(_run(result.model, _samples()), _run(branched, _samples()))
    assert "1 pairs" in result.notes[0]


def test_an_excluded_layer_takes_part_in_nothing() -> None:
    model = _net()
    result = equalize_layers.apply(model, Order(exclude=("depthwise",)))
    before, after = _tensors(model), _tensors(result.model)
    np.testing.assert_array_equal(before["w2"], after["w2"])
    assert not np.array_equal(before["w4"], after["w4"])


def test_grouped_convolutions_and_matrices_either_way_round() -> None:
    rng = np.random.default_rng(2)
    rows = rng.permutation(np.logspace(-1, 1, 8))
    tensors = [
        numpy_helper.from_array(
            (rng.normal(size=(8, 4, 1, 1)) * rows.reshape(-1, 1, 1, 1)).astype(np.float32), "w1"
        ),
        numpy_helper.from_array(rng.normal(size=(8, 2, 3, 3)).astype(np.float32), "w2"),
        numpy_helper.from_array(rng.normal(size=(8, 7)).astype(np.float32), "w3"),
        numpy_helper.from_array(rng.normal(size=7).astype(np.float32), "b3"),
        numpy_helper.from_array(rng.normal(size=(7, 5)).astype(np.float32), "w4"),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], "pointwise"),
        helper.make_node("Relu", ["c1"], ["r1"], "relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "grouped", group=4),
        helper.make_node("GlobalAveragePool", ["c2"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["g"], "hidden"),
        helper.make_node("Relu", ["g"], ["r3"], "relu3"),
        helper.make_node("Gemm", ["r3", "w4"], ["y"], "classifier"),
    ]
    model = _model(nodes, tensors, (1, 4, 6, 6))
    samples = [{"x": rng.normal(size=(1, 4, 6, 6)).astype(np.float32)} for _ in range(4)]
    result = equalize_layers.apply(model, Order(samples=samples))
    assert _same(_run(result.model, samples), _run(model, samples))
    w = {name: np.abs(values) for name, values in _tensors(result.model).items()}
    read = w["w2"].reshape(4, 2, 2, 9).max(axis=(1, 3)).reshape(-1)
    np.testing.assert_allclose(w["w1"].max(axis=(1, 2, 3)), read, rtol=0.01)
    np.testing.assert_allclose(w["w2"].max(axis=(1, 2, 3)), w["w3"].max(axis=1), rtol=0.01)
    np.testing.assert_allclose(w["w3"].max(axis=0), w["w4"].max(axis=1), rtol=0.01)


def test_a_dead_channel_stays_dead_and_finite() -> None:
    model = _net()
    for tensor in model.program.graph.initializer:
        if tensor.name == "w2":
            values = numpy_helper.to_array(tensor).copy()
            values[3] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, "w2"))
    result = equalize_layers.apply(model, Order(samples=_samples()))
    after = _tensors(result.model)
    assert not after["w2"][3].any()
    assert all(np.isfinite(values).all() for values in after.values())
    assert _same(_run(result.model, _samples()), _run(model, _samples()))


def test_the_model_given_stays_and_twice_is_once() -> None:
    model = _net()
    before = model.program.SerializeToString()
    once = equalize_layers.apply(model, Order()).model
    assert model.program.SerializeToString() == before
    again = equalize_layers.apply(once, Order())
    for name, values in _tensors(once).items():
        np.testing.assert_allclose(_tensors(again.model)[name], values, rtol=0.02, atol=1e-6)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="sweeps"):
        Options(sweeps=0)


def test_high_biases_ask_for_samples() -> None:
    with pytest.raises(RecipeError, match="calibration"):
        equalize_layers.apply(_net(), Order(options=Options(absorb=True)))
