# SPDX-License-Identifier: Apache-2.0
"""Outlying channels move into the weights: same float output, less int8 error, named where it went."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.passes import Order, Result, quantize_dynamic, smooth_activations
from edgeopt_converters.model import Model
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

WIDTH = 64


def _net(*, is_pre_norm: bool) -> Model:
    """A layer norm with three channels 40 times the others, then a feed-forward block around a residual.

    Pre-norm: the residual skips the norm, so that only the product reads it. Post-norm: both read it.
    """
    rng = np.random.default_rng(0)
    gamma = rng.uniform(0.5, 1.5, WIDTH)
    gamma[[3, 17, 40]] *= 40
    tensors = {
        "gamma": gamma, "beta": rng.normal(size=WIDTH) / 10, "w1": rng.normal(size=(WIDTH, 96)) / 8,
        "b1": rng.normal(size=96) / 10, "w2": rng.normal(size=(96, WIDTH)) / 8,
    }  # fmt: skip
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"], "norm", axis=-1),
        helper.make_node("MatMul", ["n", "w1"], ["p"], "up"),
        helper.make_node("Add", ["p", "b1"], ["a"], "bias"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "w2"], ["d"], "down"),
        helper.make_node("Add", ["d", "x" if is_pre_norm else "n"], ["y"], "residual"),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 12, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 12, WIDTH])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in tensors.items()],
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(program)
    specs = TensorSpec("x", (1, 12, WIDTH), "float32"), TensorSpec("y", (1, 12, WIDTH), "float32")
    return Model("onnx", program, "net", specs[:1], specs[1:])


def _samples(count: int = 8, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(1, 12, WIDTH)).astype(np.float32)} for _ in range(count)]


def _run(model: Model, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = ort.InferenceSession(model.program.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, sample)[0] for sample in samples])


def _smooth(model: Model, exclude: tuple[str, ...] = (), **options: Any) -> Result:
    order = Order(samples=_samples(), exclude=exclude, options=smooth_activations.Options(**options))
    return smooth_activations.apply(model, order)


def _types(model: Model) -> list[str]:
    return [node.op_type for node in model.program.graph.node]


@pytest.mark.parametrize("is_pre_norm", [True, False], ids=["pre-norm", "post-norm"])
def test_the_float_output_stays_to_float_precision(is_pre_norm: bool) -> None:
    model, unseen = _net(is_pre_norm=is_pre_norm), _samples(16, seed=9)
    exact, found = _run(model, unseen), _run(_smooth(model).model, unseen)
    assert np.abs(found - exact).max() < 1e-5 * np.abs(exact).max()  # 24 bits, sums of 96


@pytest.mark.parametrize("is_pre_norm", [True, False], ids=["pre-norm", "post-norm"])
def test_int8_errs_a_fifth_of_what_it_did(is_pre_norm: bool) -> None:
    model, unseen = _net(is_pre_norm=is_pre_norm), _samples(16, seed=9)
    exact = _run(model, unseen)
    plain, smooth = (
        _run(quantize_dynamic.apply(entry, Order()).model, unseen) for entry in (model, _smooth(model).model)
    )
    assert ((smooth - exact) ** 2).sum() < 0.2 * ((plain - exact) ** 2).sum()


def test_a_norm_that_only_products_read_takes_the_division() -> None:
    model = _net(is_pre_norm=True)
    result = _smooth(model)
    assert "Mul" not in _types(result.model)
    assert "n (folded, alpha" in result.notes[0]
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.model.program.graph.initializer}
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.program.graph.initializer}
    factors = before["gamma"] / found["gamma"]
    assert factors[3] > 2 * np.median(factors)
    np.testing.assert_allclose(before["beta"] / found["beta"], factors, rtol=1e-4)
    np.testing.assert_allclose(found["w1"], before["w1"] * factors[:, None], rtol=1e-4)


def test_a_vector_that_two_norms_share_is_copied_before_it_changes() -> None:
    model = _net(is_pre_norm=True)
    graph = model.program.graph
    second = helper.make_node("LayerNormalization", ["y0", "gamma", "beta"], ["y"], "last", axis=-1)
    graph.node[-1].output[0] = "y0"
    graph.node.append(second)
    result = _smooth(model)
    assert "n (folded, alpha" in result.notes[0]
    unseen = _samples(4, seed=9)
    exact = _run(model, unseen)
    assert np.abs(_run(result.model, unseen) - exact).max() < 1e-5 * np.abs(exact).max()


def test_a_norm_that_a_residual_reads_too_gets_a_mul_or_is_left_alone() -> None:
    result = _smooth(_net(is_pre_norm=False))
    assert _types(result.model).count("Mul") == 1
    assert "n (Mul inserted" in result.notes[0]
    alone = _smooth(_net(is_pre_norm=False), insert=False)
    assert "Mul" not in _types(alone.model)
    assert "n (others read it, and insert is off)" in alone.notes[1]


def test_a_product_behind_a_relu_and_a_bias_takes_the_division() -> None:
    model = _net(is_pre_norm=True)
    weight = model.program.graph.initializer[2]
    wide = numpy_helper.to_array(weight).copy()
    wide[:, 5] *= 40  # an outlying hidden unit
    weight.CopyFrom(numpy_helper.from_array(wide, "w1"))
    result = _smooth(model, exclude=("up",))  # its input stays; its output may be scaled
    assert "r (folded, alpha" in result.notes[0]
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.model.program.graph.initializer}
    ratio = wide / found["w1"]
    assert ratio[0, 5] > 3 * np.median(ratio[0])
    unseen = _samples(4, seed=9)
    np.testing.assert_allclose(_run(result.model, unseen), _run(model, unseen), rtol=1e-3, atol=1e-4)


def test_an_excluded_product_keeps_its_input() -> None:
    model = _net(is_pre_norm=True)
    result = _smooth(model, exclude=("MatMul",))
    assert result.notes == ("activations smoothed: 0 of 0",)
    np.testing.assert_array_equal(_run(result.model, _samples(2)), _run(model, _samples(2)))


def test_even_channels_are_left_alone_and_named() -> None:
    model = _net(is_pre_norm=True)
    model.program.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones(WIDTH, np.float32), "gamma"))
    result = _smooth(model, gain=0.5)
    assert "n (nothing gained)" in result.notes[1]


def test_precise_products_get_no_mul() -> None:
    result = _smooth(_net(is_pre_norm=False), enough_db=1.0)
    assert "Mul" not in _types(result.model)
    assert "dB already" in result.notes[1]


def test_two_runs_give_the_same_bytes_and_the_model_given_is_left_as_it_was() -> None:
    model = _net(is_pre_norm=False)
    before = model.program.SerializeToString()
    once, again = (_smooth(model).model.program.SerializeToString(deterministic=True) for _ in range(2))
    assert once == again
    assert model.program.SerializeToString() == before


def test_progress_counts_every_sample_it_walks() -> None:
    calls: list[int] = []
    samples = _samples(8)
    order = Order(samples=samples, on_sample=lambda: calls.append(1))
    smooth_activations.apply(_net(is_pre_norm=True), order)
    assert len(calls) == smooth_activations.walks(order, len(samples)) == 16


def test_no_samples_are_refused() -> None:
    with pytest.raises(RecipeError, match="needs calibration samples"):
        smooth_activations.apply(_net(is_pre_norm=True), Order())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="alphas"):
        smooth_activations.Options(alphas=(0.0,))
    with pytest.raises(ValueError, match="gain"):
        smooth_activations.Options(gain=0)
