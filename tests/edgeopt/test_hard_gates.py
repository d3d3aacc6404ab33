# SPDX-License-Identifier: Apache-2.0
"""Hard gates in other words: the same values, integer operators in the runtime, and numbers of operators that stay."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.calibrate import Calibration
from edgeopt.hard_gates import respell
from edgeopt.onnx_graphs import fold
from edgeopt.onnx_select import describe, select
from edgeopt.passes import Order, equalize_gates, quantize_static, respell_operators
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.tensor import TensorSpec

SHAPE = (1, 3, 12, 12)
U8S8 = Scheme("uint8", "int8", True, False)


def net(*, is_read_as_it_is: bool = False) -> Model:
    """Hard-swish, squeeze-and-excite, a residual; `is_read_as_it_is`: a gate's product leaves through an addition."""
    rng = np.random.default_rng(3)

    def tensor(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(rng.normal(0, 0.5, shape).astype(np.float32), name)

    tensors = [
        tensor("w1", 8, 3, 3, 3), tensor("w2", 8, 1, 3, 3), tensor("b2", 8), tensor("down", 4, 8, 1, 1),
        tensor("up", 8, 4, 1, 1), tensor("bu", 8), tensor("w3", 8, 8, 1, 1), tensor("w4", 5, 8), tensor("b4", 5),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("HardSwish", ["c1"], ["s1"], "swish1"),
        helper.make_node("Conv", ["s1", "w2", "b2"], ["c2"], "depthwise", group=8, pads=[1, 1, 1, 1]),
        helper.make_node("HardSwish", ["c2"], ["s2"], "swish2"),
        helper.make_node("GlobalAveragePool", ["s2"], ["p"], "pool"),
        helper.make_node("Conv", ["p", "down"], ["d"], "down"), helper.make_node("Relu", ["d"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "up", "bu"], ["u"], "up"),
        helper.make_node("HardSigmoid", ["u"], ["g"], "gate", alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", ["s2", "g"], ["m"], "excite"), helper.make_node("Conv", ["m", "w3"], ["c3"], "project"),
        helper.make_node("Add", ["c3", "s1"], ["a"], "residual") if is_read_as_it_is
        else helper.make_node("Identity", ["c3"], ["a"], "identity"),
        helper.make_node("GlobalAveragePool", ["a"], ["q"], "last"), helper.make_node("Flatten", ["q"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], "classifier", transB=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    specs = TensorSpec("x", SHAPE, "float32"), TensorSpec("y", (1, 5), "float32")
    return Model("onnx", program, "net", specs[:1], specs[1:])


def images(count: int = 16, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(0, 2, SHAPE).astype(np.float32)} for _ in range(count)]


def run(program: Any, sample: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, sample)[0])


@pytest.mark.parametrize("bound", [1.0, 6.0])
@pytest.mark.parametrize("is_read_as_it_is", [False, True])
def test_outputs_keep_their_values(bound: float, is_read_as_it_is: bool) -> None:
    program = fold(net(is_read_as_it_is=is_read_as_it_is).program)
    before = program.SerializeToString()
    found = respell(program, bound=bound)
    onnx.checker.check_model(found.program)
    assert (found.into_layers, found.as_layers, found.left) == (1, 2, 0)
    for sample in images(4, seed=1):
        assert np.allclose(run(program, sample), run(found.program, sample), rtol=1e-4, atol=1e-4)
    assert program.SerializeToString() == before


def test_factors_of_equalized_channels_become_weights_per_channel() -> None:
    model = net()
    equalized = equalize_gates.apply(model, Order(samples=images())).model
    found = respell(fold(equalized.program))
    assert found.as_layers == 2
    weights = {t.name: numpy_helper.to_array(t) for t in found.program.graph.initializer}
    lines = [
        weights[node.input[1]]
        for node in found.program.graph.node
        if node.op_type == "Conv" and weights[node.input[1]].shape == (8, 1, 1, 1)
    ]
    assert len(lines) == 2
    assert all(np.unique(values).size > 1 for values in lines)
    for sample in images(4, seed=1):
        assert np.allclose(run(model.program, sample), run(found.program, sample), rtol=1e-4, atol=1e-4)


def test_factors_that_the_product_reads_as_well_are_a_convolution_too() -> None:
    """Equalized channels whose product leaves through an addition: no layer takes the factors back."""
    model = net(is_read_as_it_is=True)
    equalized = fold(equalize_gates.apply(model, Order(samples=images())).model.program)
    found = respell(equalized)
    assert (found.as_layers, found.left) == (2, 0)
    onnx.checker.check_model(found.program)
    shapes = {t.name: tuple(t.dims) for t in found.program.graph.initializer}
    products = [node for node in found.program.graph.node if node.op_type == "Mul"]
    assert not [name for node in products for name in node.input if shapes.get(name) == (1, 8, 1, 1)]
    for sample in images(4, seed=1):
        assert np.allclose(run(model.program, sample), run(found.program, sample), rtol=1e-4, atol=1e-4)


def optimized(program: Any, folder: Path) -> list[str]:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(program.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def test_onnx_runtime_computes_every_gate_in_integers(tmp_path: Path) -> None:
    options = respell_operators.Options(hard_gates=True)
    plain = net(is_read_as_it_is=True)
    respelled = respell_operators.apply(plain, Order(options=options))
    assert respelled.notes == (
        "3 hard gates in integers: 1 inside the layer before, 2 as a depthwise convolution; 0 left in floats",
    )
    order = Order(U8S8, Calibration("minmax"), images())
    before, after = (
        optimized(quantize_static.apply(model, order).model.program, tmp_path)
        for model in (plain, respelled.model)
    )
    assert before.count("HardSigmoid") == 3
    assert not {"HardSigmoid", "Mul", "Add", "Clip"} & set(after)
    assert after.count("QLinearMul") == 3


def test_excluded_gates_stay() -> None:
    order = Order(options=respell_operators.Options(hard_gates=True), exclude=("HardSigmoid",))
    program = respell_operators.apply(net(), order).model.program
    assert sum(node.op_type == "HardSigmoid" for node in program.graph.node) == 3


def test_numbers_of_convolutions_are_those_of_the_model_as_it_was() -> None:
    program = fold(net().program)
    respelled = respell(program).program
    wanted = ("Conv#0", "Conv#1", "Conv#-1", "role:depthwise", "role:last")
    assert [select(program, [entry]) for entry in wanted] == [select(respelled, [entry]) for entry in wanted]
    (first,) = select(respelled, ["Gate#0"])
    assert describe(respelled, first) == "Gate#0"
    assert len(select(respelled, ["Gate"])) == 2
    assert select(program, ["Gate#0"]) == frozenset(), "passes before this one have no gates yet"


def test_what_comes_from_no_convolution_is_left() -> None:
    graph = helper.make_graph(
        [helper.make_node("HardSigmoid", ["x"], ["y"], "gate")], "gate",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE)],
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = respell(program)
    assert found.left == 1
    assert found.sentence() == ""
    assert found.program is program
