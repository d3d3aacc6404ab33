# SPDX-License-Identifier: Apache-2.0
"""The mean error of every layer goes into its bias: measured, kept only where it helps, integers and nothing else."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.calibrate import Calibration
from edgeopt.onnx_graphs import fold, observer
from edgeopt.passes import Order, correct_bias, quantize_static
from edgeopt.passes.correct_bias import Options
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

U8S8 = Scheme("uint8", "int8", True, False)
PER_TENSOR = Scheme("uint8", "int8", False, False)


def _net(*, bias: bool = True) -> Model:
    """Depthwise channels a hundredfold apart over inputs that are all positive: per tensor, means go wrong."""
    rng = np.random.default_rng(0)
    spread = np.logspace(-2, 0, 16)

    def tensor(name: str, *shape: int, rows: Any = 1.0) -> Any:
        scale = np.broadcast_to(rows, shape[:1]).reshape(-1, *[1] * (len(shape) - 1))
        return numpy_helper.from_array((rng.normal(0, 0.4, shape) * scale).astype(np.float32), name)

    tensors = [
        tensor("w1", 16, 3, 3, 3), tensor("b1", 16), tensor("w2", 16, 1, 3, 3, rows=spread), tensor("b2", 16, rows=spread),
        tensor("w3", 24, 16, 1, 1), tensor("b3", 24), tensor("w4", 10, 24), tensor("b4", 10),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "stem", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "depthwise", group=16, pads=[1, 1, 1, 1]),
        helper.make_node("HardSwish", ["c2"], ["s2"], "swish"),
        helper.make_node("Conv", ["s2", "w3", *(["b3"] if bias else [])], ["c3"], "pointwise"),
        helper.make_node("Relu", ["c3"], ["r3"], "relu3"),
        helper.make_node("GlobalAveragePool", ["r3"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], "classifier", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        [entry for entry in tensors if bias or entry.name != "b3"],
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(program)
    spec = (TensorSpec("x", (1, 3, 12, 12), "float32", "NCHW"),)
    return Model("onnx", program, "net", spec, (TensorSpec("y", (1, 10), "float32"),))


def _samples(count: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.uniform(0, 2, size=(1, 3, 12, 12)).astype(np.float32)} for _ in range(count)]


def _quantized(model: Model, scheme: Scheme = PER_TENSOR) -> Model:
    return quantize_static.apply(model, Order(scheme, Calibration("minmax"), _samples(16))).model


def _corrected(model: Model, quantized: Model, mode: str, **more: Any) -> Any:
    order = Order(samples=_samples(16), options=Options(mode), reference=model, **more)
    return correct_bias.apply(quantized, order)


def _outputs(model: Model, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = ort.InferenceSession(model.program.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, sample)[0] for sample in samples])


def _means(program: Any, name: str) -> np.ndarray:
    found = [values for sample in _samples(16) for _, values in observer(program, frozenset({name}))(sample)]
    return np.mean(found, axis=(0, 1, 3, 4))


def _tensors(model: Model) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.program.graph.initializer}


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_the_output_of_unseen_samples_comes_closer(mode: str) -> None:
    model, unseen = _net(), _samples(24, seed=9)
    quantized = _quantized(model)
    exact = _outputs(model, unseen)
    before = np.square(_outputs(quantized, unseen) - exact).sum()
    after = np.square(_outputs(_corrected(model, quantized, mode).model, unseen) - exact).sum()
    assert after < 0.7 * before


def test_full_brings_every_mean_to_the_float_models() -> None:
    model = _net()
    quantized = _quantized(model)
    found = _corrected(model, quantized, "full").model
    for name, fused in (("c1", "r1"), ("c2", "c2"), ("c3", "r3")):  # a ReLU is fused into the layer before it
        exact = _means(fold(model.program), name)
        before, after = (np.abs(_means(m.program, fused) - exact).max() for m in (quantized, found))
        assert after < 0.05 * before


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_only_integers_of_biases_change(mode: str) -> None:
    model = _net()
    quantized = _quantized(model)
    before, after = _tensors(quantized), _tensors(_corrected(model, quantized, mode).model)
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert all(before[name].dtype == after[name].dtype == np.int32 for name in changed)


def test_fast_shifts_by_the_mean_input_times_the_weights_error() -> None:
    """One layer, by hand: E[(W - Wq) x], over the samples that do not judge."""
    rng = np.random.default_rng(4)
    w = rng.normal(size=(6, 5)).astype(np.float32)
    tensors = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.zeros(6, np.float32), "b")]
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6])], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    spec = (TensorSpec("x", (1, 5), "float32"),)
    model = Model("onnx", program, "net", spec, (TensorSpec("y", (1, 6), "float32"),))
    samples = [{"x": rng.uniform(3, 5, size=(1, 5)).astype(np.float32)} for _ in range(32)]
    quantized = quantize_static.apply(model, Order(PER_TENSOR, Calibration("minmax"), samples)).model
    order = Order(samples=samples, options=Options("fast"), reference=model)
    before, after = (_tensors(m) for m in (quantized, correct_bias.apply(quantized, order).model))
    step = before["b_quantized_scale"]
    rounded = before["w_quantized"].astype(np.float64) * before["w_scale"]
    expected = (w - rounded) @ np.mean(
        [sample["x"][0] for number, sample in enumerate(samples) if number % 4 != 3], axis=0
    )
    found = (after["b_quantized"].astype(np.float64) - before["b_quantized"]) * step
    assert np.abs(expected).max() > 10 * np.max(step)
    np.testing.assert_allclose(found, expected, atol=0.51 * np.max(step))


def test_a_layer_without_a_bias_gets_one() -> None:
    model = _net(bias=False)
    quantized = _quantized(model)
    found = _corrected(model, quantized, "full").model
    onnx.checker.check_model(found.program)
    node = next(node for node in found.program.graph.node if node.name == "pointwise")
    assert len(node.input) == 3
    exact = _means(fold(model.program), "c3")
    before, after = (np.abs(_means(m.program, "r3") - exact).max() for m in (quantized, found))
    assert after < 0.05 * before


def test_what_makes_the_output_worse_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _net()
    quantized = _quantized(model)
    real = correct_bias._Graph.shift
    monkeypatch.setattr(
        correct_bias._Graph, "shift", lambda graph, layer, shift: real(graph, layer, shift + 5)
    )
    result = _corrected(model, quantized, "full")
    assert result.model is quantized
    assert "not kept" in result.notes[0]


def test_the_models_given_stay_as_they_were() -> None:
    model = _net()
    quantized = _quantized(model)
    before = (model.program.SerializeToString(), quantized.program.SerializeToString())
    _corrected(model, quantized, "full")
    assert before == (model.program.SerializeToString(), quantized.program.SerializeToString())


def test_an_excluded_layer_keeps_its_bias() -> None:
    model = _net()
    quantized = _quantized(model)
    before = _tensors(quantized)
    after = _tensors(_corrected(model, quantized, "full", exclude=("depthwise", "Gemm")).model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"b1_quantized", "b3_quantized"}


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_progress_is_one_walk_whatever_the_mode(mode: str) -> None:
    ticks: list[int] = []
    model = _net()
    order = Order(
        samples=_samples(16), options=Options(mode, 8), reference=model, on_sample=lambda: ticks.append(1)
    )
    correct_bias.apply(_quantized(model), order)
    assert len(ticks) == correct_bias.walks(order, 16) == 8


def test_what_it_needs_is_asked_for() -> None:
    model = _net()
    quantized = _quantized(model)
    with pytest.raises(RecipeError, match="float model"):
        correct_bias.apply(quantized, Order(samples=_samples(2)))
    with pytest.raises(RecipeError, match="calibration samples"):
        correct_bias.apply(quantized, Order(reference=model))
    with pytest.raises(RecipeError, match="no layer with integer weights"):
        correct_bias.apply(model, Order(samples=_samples(2), reference=model))
    with pytest.raises(ValueError, match="fast"):
        Options("fats")
