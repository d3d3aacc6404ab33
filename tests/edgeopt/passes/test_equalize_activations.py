# SPDX-License-Identifier: Apache-2.0
"""Channels of an activation come to like ranges, and the float model says what it said."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.onnx_graphs import observer
from edgeopt.passes import Order, equalize_activations
from edgeopt_converters.model import Model
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec


def _net(activation: str = "Relu") -> Model:
    """A residual block between two pointwise convolutions whose channels differ a hundredfold, then a depthwise one."""
    rng = np.random.default_rng(0)
    spread = np.logspace(-2, 0, 16).astype(np.float32)

    def weight(name: str, *shape: int, rows: Any = 1.0) -> Any:
        values = rng.normal(0, 0.5, shape).astype(np.float32)
        scale = np.broadcast_to(rows, shape[:1]).reshape(-1, *[1] * (len(shape) - 1))
        return numpy_helper.from_array((values * scale).astype(np.float32), name)

    tensors = [
        weight("w1", 16, 3, 3, 3, rows=spread), weight("b1", 16, rows=spread),
        weight("w2", 16, 16, 1, 1, rows=spread), weight("b2", 16, rows=spread),
        weight("w3", 16, 1, 3, 3), weight("w4", 10, 16), weight("b4", 10),
        numpy_helper.from_array(np.float32(0), "zero"), numpy_helper.from_array(np.float32(6), "six"),
    ]  # fmt: skip
    clip = ["zero", "six"] if activation == "Clip" else []
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node(activation, ["c1", *clip], ["r1"], "act"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "pointwise"),
        helper.make_node("Add", ["r1", "c2"], ["a"], "residual"),
        helper.make_node("Conv", ["a", "w3"], ["c3"], "depthwise", group=16),
        helper.make_node("GlobalAveragePool", ["c3"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], "classifier", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(program)
    spec = (TensorSpec("x", (1, 3, 8, 8), "float32", "NCHW"),)
    return Model("onnx", program, "net", spec, (TensorSpec("y", (1, 10), "float32"),))


def _samples(count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def _run(program: Any, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = ort.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, sample)[0] for sample in samples])


def _spread(program: Any, name: str) -> float:
    """Largest over smallest channel maximum of a tensor."""
    peaks = np.max(
        [np.abs(values).max(axis=(0, 2, 3)) for sample in _samples() for found, values in
         observer(program, frozenset({name}))(sample) if found == name], axis=0,
    )  # fmt: skip
    return float(peaks.max() / peaks.min())


def test_the_float_output_stays_and_the_channels_come_closer() -> None:
    model = _net()
    found = equalize_activations.apply(
        model, Order(samples=_samples(), options=equalize_activations.Options(strength=1.0, largest=1e6))
    )
    assert np.allclose(
        _run(found.model.program, _samples()), _run(model.program, _samples()), rtol=1e-4, atol=1e-5
    )
    assert _spread(model.program, "a") > 20
    assert _spread(found.model.program, "a") < 2
    assert "2 groups" in found.notes[0]


def test_a_residual_addition_gives_both_branches_the_same_factors() -> None:
    found = equalize_activations.apply(_net(), Order(samples=_samples())).model.program
    before = {t.name: numpy_helper.to_array(t) for t in _net().program.graph.initializer}
    after = {t.name: numpy_helper.to_array(t) for t in found.graph.initializer}
    stem = after["b1"] / before["b1"]
    assert not np.allclose(stem, 1)
    assert np.allclose(after["b2"] / before["b2"], stem, rtol=1e-4)


def test_what_a_clip_bounds_keeps_its_channels() -> None:
    model = _net("Clip")
    found = equalize_activations.apply(model, Order(samples=_samples())).model.program
    after = {t.name: numpy_helper.to_array(t) for t in found.graph.initializer}
    before = {t.name: numpy_helper.to_array(t) for t in model.program.graph.initializer}
    assert np.array_equal(after["w1"], before["w1"])
    assert np.allclose(_run(found, _samples()), _run(model.program, _samples()), rtol=1e-4, atol=1e-5)


def test_an_excluded_layer_takes_no_factor() -> None:
    model = _net()
    found = equalize_activations.apply(model, Order(samples=_samples(), exclude=("Conv", "Gemm")))
    assert "0 groups" in found.notes[0]


def test_no_samples_is_an_error() -> None:
    with pytest.raises(RecipeError, match="calibration"):
        equalize_activations.apply(_net(), Order())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="strength"):
        equalize_activations.Options(strength=2)
