# SPDX-License-Identifier: Apache-2.0
"""Factors pass through hard-swish, swish and squeeze-and-excite; the float model says what it said."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.calibrate import Calibration
from edgeopt.onnx_graphs import observer
from edgeopt.passes import Order, equalize_gates, quantize_static
from edgeopt.passes.equalize_gates import Options
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

U8S8 = Scheme("uint8", "int8", True, False)
CHANNELS = 16


def _net(gate: str = "HardSigmoid", *, residual: bool = False) -> Model:
    """Expansion, depthwise convolution and squeeze-and-excite, all gated; channels of the first two differ a hundredfold."""
    rng = np.random.default_rng(0)
    spread = np.logspace(-0.7, 1.3, CHANNELS)

    def tensor(name: str, *shape: int, rows: Any = 1.0) -> Any:
        scale = np.broadcast_to(rows, shape[:1]).reshape(-1, *[1] * (len(shape) - 1))
        return numpy_helper.from_array((rng.normal(0, 0.5, shape) * scale).astype(np.float32), name)

    first, second = rng.permutation(spread), rng.permutation(spread)
    readers = (1 / first).reshape(-1, 1, 1, 1)  # every channel counts, however small it is
    tensors = [
        tensor("w1", CHANNELS, 3, 1, 1, rows=first), tensor("b1", CHANNELS, rows=first),
        numpy_helper.from_array((rng.normal(0, 0.5, (CHANNELS, 1, 3, 3)) * readers * second.reshape(-1, 1, 1, 1))
                                .astype(np.float32), "w2"),
        tensor("b2", CHANNELS, rows=second),
        tensor("w3", 4, CHANNELS, 1, 1), tensor("b3", 4), tensor("w4", CHANNELS, 4, 1, 1), tensor("b4", CHANNELS),
        numpy_helper.from_array((rng.normal(0, 0.5, (12, CHANNELS, 1, 1)) / second.reshape(1, -1, 1, 1))
                                .astype(np.float32), "w5"),
        tensor("b5", 12), tensor("w6", 5, 12), tensor("b6", 5),
    ]  # fmt: skip
    more = {"alpha": 1 / 6, "beta": 0.5} if gate == "HardSigmoid" else {}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "expand"),
        helper.make_node(gate, ["c1"], ["g1"], "gate1", **more),
        helper.make_node("Mul", ["c1", "g1"], ["s1"], "swish1"),
        helper.make_node("Conv", ["s1", "w2", "b2"], ["c2"], "depthwise", group=CHANNELS, pads=[1, 1, 1, 1]),
        helper.make_node(gate, ["c2"], ["g2"], "gate2", **more),
        helper.make_node("Mul", ["g2", "c2"], ["s2"], "swish2"),
        helper.make_node("GlobalAveragePool", ["s2"], ["p2"], "squeeze"),
        helper.make_node("Conv", ["p2", "w3", "b3"], ["c3"], "down"),
        helper.make_node("Relu", ["c3"], ["r3"], "relu"),
        helper.make_node("Conv", ["r3", "w4", "b4"], ["c4"], "up"),
        helper.make_node("HardSigmoid", ["c4"], ["e"], "excite"),
        helper.make_node("Mul", ["s2", "e"], ["m"], "weigh"),
        helper.make_node("Conv", ["m", "w5", "b5"], ["c5"], "project"),
        helper.make_node("GlobalAveragePool", ["c5"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w6", "b6"], ["y"], "classifier", transB=1),
    ]
    if residual:
        nodes[6:6] = [helper.make_node("Add", ["s2", "s1"], ["sum"], "residual")]
        nodes[7].input[0] = nodes[12].input[0] = "sum"
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(program)
    spec = (TensorSpec("x", (1, 3, 8, 8), "float32", "NCHW"),)
    return Model("onnx", program, "net", spec, (TensorSpec("y", (1, 5), "float32"),))


def _samples(count: int = 12, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def _run(model: Model, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = ort.InferenceSession(model.program.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, sample)[0] for sample in samples])


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() <= 1e-4 * np.abs(other).max())


def _spread(model: Model, name: str) -> float:
    """Largest over smallest channel maximum of a tensor."""
    observe = observer(model.program, frozenset({name}))
    peaks = np.max(
        [np.abs(v).max(axis=(0, 2, 3)) for s in _samples() for found, v in observe(s) if found == name],
        axis=0,
    )
    return float(peaks.max() / peaks[peaks > 0].min())


def _noise(model: Model, exact: np.ndarray, unseen: list[dict[str, np.ndarray]]) -> float:
    quantized = quantize_static.apply(model, Order(U8S8, Calibration("minmax"), _samples())).model
    return float(np.square(_run(quantized, unseen) - exact).sum())


@pytest.mark.parametrize("gate", ["HardSigmoid", "Sigmoid"])
@pytest.mark.parametrize("residual", [False, True])
def test_the_output_stays_on_unseen_samples_too(gate: str, residual: bool) -> None:
    model, unseen = _net(gate, residual=residual), _samples(32, seed=8)
    for strength in (0.5, 1.0):
        order = Order(samples=_samples(), options=Options(strength=strength))
        found = equalize_gates.apply(model, order).model
        onnx.checker.check_model(found.program)
        assert _same(_run(found, unseen), _run(model, unseen))


@pytest.mark.parametrize("gate", ["HardSigmoid", "Sigmoid"])
def test_channels_behind_the_gate_come_closer(gate: str) -> None:
    model = _net(gate)
    result = equalize_gates.apply(model, Order(samples=_samples(), options=Options(strength=1.0)))
    for name in ("s1", "s2", "m"):
        assert _spread(result.model, name) < 0.3 * _spread(model, name)
    assert "2 gated" in result.notes[0]


def test_int8_loses_a_tenth_of_what_it_lost() -> None:
    model, unseen = _net(), _samples(48, seed=5)
    exact = _run(model, unseen)
    ours = equalize_gates.apply(model, Order(samples=_samples())).model
    assert _noise(ours, exact, unseen) < 0.1 * _noise(model, exact, unseen)


def test_what_lies_below_the_reach_of_hard_swish_takes_no_steps() -> None:
    found = equalize_gates.apply(_net(), Order(samples=_samples())).model
    raw, clipped = (
        np.concatenate([v for s in _samples() for _, v in observer(found.program, frozenset({name}))(s)])
        for name in ("c1", "c1/clipped")
    )
    assert clipped.max() == raw.max()
    assert clipped.min() > 0.8 * raw.min()  # and the output is the same: see above


def test_a_reader_that_takes_no_factor_gets_the_product_as_it_was() -> None:
    model = _net(residual=True)
    found = equalize_gates.apply(model, Order(samples=_samples(), options=Options(strength=1.0))).model
    for name in ("s1", "s2"):
        pairs = zip(
            *(
                [v for s in _samples() for _, v in observer(m.program, frozenset({name}))(s)]
                for m in (model, found)
            ),
            strict=True,
        )
        assert all(_same(after, before) for before, after in pairs)


def test_relu_before_squeeze_and_excite_passes_factors() -> None:
    model = _net()
    program = onnx.ModelProto()
    program.CopyFrom(model.program)
    nodes = {node.name: node for node in program.graph.node}
    nodes["swish2"].CopyFrom(helper.make_node("Relu", ["c2"], ["s2"], "relu2"))
    program.graph.node.remove(nodes["gate2"])
    changed = Model("onnx", program, "net", model.inputs, model.outputs)
    result = equalize_gates.apply(changed, Order(samples=_samples(), options=Options(strength=1.0)))
    assert "1 before squeeze" in result.notes[0]
    assert _same(_run(result.model, _samples(seed=4)), _run(changed, _samples(seed=4)))
    assert _spread(result.model, "s2") < 0.3 * _spread(changed, "s2")


def test_an_excluded_layer_takes_part_in_nothing() -> None:
    model = _net()
    result = equalize_gates.apply(model, Order(samples=_samples(), exclude=("Conv",)))
    assert "0 gated activations and 0 before" in result.notes[0]
    assert len(result.model.program.graph.node) == len(model.program.graph.node)


def test_the_model_given_stays_and_two_runs_give_the_same_bytes() -> None:
    model = _net()
    before = model.program.SerializeToString()
    once, again = (
        equalize_gates.apply(model, Order(samples=_samples())).model.program.SerializeToString(
            deterministic=True
        )
        for _ in range(2)
    )
    assert once == again
    assert model.program.SerializeToString() == before


def test_no_samples_is_an_error_and_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="calibration"):
        equalize_gates.apply(_net(), Order())
    with pytest.raises(ValueError, match="strength"):
        Options(strength=2)
