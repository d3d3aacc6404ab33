# SPDX-License-Identifier: Apache-2.0
"""Rounding by second moments: on the grid, pinned, better than nearest, the same integers in every format."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.calibrate import Calibration
from edgeopt.passes import Order, cast_floats, quantize_static, round_weights
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

U8S8 = Scheme("uint8", "int8", True, False)


def _net(seed: int = 0) -> Model:
    """Convolution, depthwise convolution, pointwise convolution, pooling, classifier; one channel is dead."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> Any:
        values = rng.normal(0, 0.3, shape).astype(np.float32)
        return numpy_helper.from_array(values, name)

    dead = rng.normal(0, 0.3, (32, 16, 1, 1)).astype(np.float32)
    dead[5] = 0
    tensors = [
        weight("w1", 16, 3, 3, 3), weight("b1", 16), weight("w2", 16, 1, 3, 3), weight("b2", 16),
        numpy_helper.from_array(dead, "w3"), weight("b3", 32), weight("w4", 10, 32), weight("b4", 10),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "depthwise", group=16, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("Conv", ["r2", "w3", "b3"], ["c3"], "pointwise"),
        helper.make_node("Relu", ["c3"], ["r3"]),
        helper.make_node("GlobalAveragePool", ["r3"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], "classifier", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(program)
    spec = (TensorSpec("x", (1, 3, 16, 16), "float32", "NCHW"),)
    return Model("onnx", program, "net", spec, (TensorSpec("y", (1, 10), "float32"),))


def _samples(count: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    smooth = rng.normal(size=(count, 3, 16, 16)).cumsum(2).cumsum(3) / 6  # neighbours alike, as in photos
    return [{"x": row[None].astype(np.float32)} for row in smooth]


def _outputs(model: Model, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = ort.InferenceSession(model.program.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, sample)[0] for sample in samples])


def _weights(model: Model) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.program.graph.initializer}


def _noise(model: Model, reference: np.ndarray, samples: list[dict[str, np.ndarray]]) -> float:
    return float(((_outputs(model, samples) - reference) ** 2).sum())


def _nearest(model: Model) -> Model:
    program = onnx.ModelProto()
    program.CopyFrom(model.program)
    for tensor in program.graph.initializer:
        if tensor.name.startswith("w"):
            w = numpy_helper.to_array(tensor)
            largest = np.abs(w).reshape(len(w), -1).max(1).reshape(-1, *[1] * (w.ndim - 1))
            scale = np.where(largest > 0, largest / 127, 1)
            tensor.CopyFrom(
                numpy_helper.from_array((np.rint(w / scale) * scale).astype(np.float32), tensor.name)
            )
    return Model("onnx", program, "net", model.inputs, model.outputs)


def test_weights_lie_on_the_grid_and_keep_their_scale() -> None:
    model = _net()
    rounded = _weights(round_weights.apply(model, Order(samples=_samples(16))).model)
    for name, before in _weights(model).items():
        if name.startswith("w"):
            rows = before.reshape(len(before), -1)
            scale = np.abs(rows).max(1, keepdims=True) / 127
            found = rounded[name].reshape(len(before), -1)
            np.testing.assert_allclose(np.abs(found).max(1), np.abs(rows).max(1), rtol=1e-6)
            alive = scale[:, 0] > 0
            integers = found[alive] / scale[alive]
            np.testing.assert_allclose(integers, np.rint(integers), atol=1e-3)
            assert not found[~alive].any()


def test_the_output_changes_less_than_with_nearest_rounding() -> None:
    model, unseen = _net(), _samples(32, seed=9)
    reference = _outputs(model, unseen)
    ours = round_weights.apply(model, Order(samples=_samples(32))).model
    assert _noise(ours, reference, unseen) < 0.7 * _noise(_nearest(model), reference, unseen)


def test_a_native_quantizer_finds_the_very_same_integers() -> None:
    rounded = round_weights.apply(_net(), Order(samples=_samples(16))).model
    order = Order(scheme=U8S8, calibration=Calibration("minmax"), samples=_samples(8))
    quantized = _weights(quantize_static.apply(rounded, order).model)
    for name, weight in _weights(rounded).items():
        if name.startswith("w"):
            rows = weight.reshape(len(weight), -1).astype(np.float64)
            largest = np.abs(rows).max(1, keepdims=True)
            expected = np.rint(rows / np.where(largest > 0, largest / 127, 1))
            found = quantized[f"{name}_quantized"].reshape(len(weight), -1)
            alive = largest[:, 0] > 0
            np.testing.assert_array_equal(found[alive], expected[alive])


def test_two_runs_give_the_same_bytes() -> None:
    once, again = (round_weights.apply(_net(), Order(samples=_samples(8))).model.program for _ in range(2))
    assert once.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)


def test_an_excluded_layer_keeps_its_weights_and_is_named() -> None:
    model = _net()
    result = round_weights.apply(model, Order(samples=_samples(8), exclude=("depthwise",)))
    before, after = _weights(model), _weights(result.model)
    np.testing.assert_array_equal(before["w2"], after["w2"])
    np.testing.assert_array_equal(before["b2"], after["b2"])
    assert not np.array_equal(before["w1"], after["w1"])
    assert "depthwise (excluded by the recipe)" in result.notes[1]


def test_a_weight_that_two_layers_share_is_left_and_named() -> None:
    model = _net()
    program = onnx.ModelProto()
    program.CopyFrom(model.program)
    again = helper.make_node("Conv", ["r2", "w2", "b2"], ["c2b"], "again", group=16, pads=[1, 1, 1, 1])
    program.graph.node.insert(4, again)
    program.graph.node[5].input[0] = "c2b"
    shared = Model("onnx", program, "net", model.inputs, model.outputs)
    result = round_weights.apply(shared, Order(samples=_samples(8)))
    np.testing.assert_array_equal(_weights(model)["w2"], _weights(result.model)["w2"])
    assert "shares its weight" in result.notes[1]


def test_grouped_dilated_and_untransposed_layers_land_on_the_grid_too() -> None:
    rng = np.random.default_rng(3)
    tensors = [
        numpy_helper.from_array(rng.normal(size=(8, 2, 3, 3)).astype(np.float32), "w1"),
        numpy_helper.from_array(rng.normal(size=(8, 5)).astype(np.float32), "w2"),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], "grouped", group=2, dilations=[2, 2], pads=[2, 2, 2, 2]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w2"], ["y"], "product"),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    spec = (TensorSpec("x", (1, 4, 9, 9), "float32", "NCHW"),)
    model = Model("onnx", program, "net", spec, (TensorSpec("y", (1, 5), "float32"),))
    samples = [{"x": rng.normal(size=(1, 4, 9, 9)).astype(np.float32)} for _ in range(8)]
    rounded = _weights(round_weights.apply(model, Order(samples=samples)).model)
    for rows in (rounded["w1"].reshape(8, -1), rounded["w2"].T):
        scale = np.abs(rows).max(1, keepdims=True) / 127
        np.testing.assert_allclose(rows / scale, np.rint(rows / scale), atol=1e-3)


def test_no_samples_are_refused() -> None:
    with pytest.raises(RecipeError, match="needs calibration samples"):
        round_weights.apply(_net(), Order())


@pytest.mark.parametrize(
    "scheme",
    [U8S8, Scheme("int8", "int8", True, False), Scheme("int8", "int8", True, True)],
    ids=["u8s8", "s8s8", "symmetric"],
)
def test_a_quantized_net_says_nearly_what_the_float_net_says(scheme: Scheme) -> None:
    model, unseen = _net(), _samples(32, seed=9)
    reference = _outputs(model, unseen)
    order = Order(scheme=scheme, calibration=Calibration("percentile", 99.99), samples=_samples(16))
    found = _outputs(quantize_static.apply(model, order).model, unseen)
    assert 10 * np.log10((reference**2).sum() / ((found - reference) ** 2).sum()) > 20


def test_an_excluded_operator_stays_in_float_and_an_unknown_one_is_refused() -> None:
    order = Order(scheme=U8S8, samples=_samples(4), exclude=("classifier",))
    result = quantize_static.apply(_net(), order)
    assert "w4" in _weights(result.model)
    assert "classifier" in result.notes[0]
    with pytest.raises(RecipeError, match="no operator of name or type 'Softmax'"):
        quantize_static.apply(_net(), Order(scheme=U8S8, samples=_samples(4), exclude=("Softmax",)))


def test_half_precision_keeps_float_edges_and_counts_what_it_clipped() -> None:
    model = _net()
    huge = numpy_helper.to_array(model.program.graph.initializer[0]).copy()
    huge[0, 0, 0, 0] = 1e6
    model.program.graph.initializer[0].CopyFrom(numpy_helper.from_array(huge, "w1"))
    result = cast_floats.apply(model, Order())
    assert result.notes[0] == "1 weights exceed float16 and were clipped"
    assert _weights(result.model)["w1"].dtype == np.float16
    assert result.model.program.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
