# SPDX-License-Identifier: Apache-2.0
"""Predictions against ONNX Runtime for every scheme that is shipped, from the same inputs and through the whole net."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_nets import NETS, inputs

from edgeopt.calibrate import Calibration
from edgeopt.passes import Order, quantize_static
from edgeopt.simulate.agreement import Agreement, by_tensor, total
from edgeopt.simulate.apart import integers, take_apart
from edgeopt.simulate.check import check_onnx
from edgeopt.simulate.integer import IntegerNet
from edgeopt.simulate.values import Grid
from edgeopt_profiles.profile import Scheme

SHARE = 0.999
"""How much of all integers must be at most one step from the runtime's."""

SCHEMES = {
    "u8s8": Scheme("uint8", "int8", True, False),
    "u8s8-safe": Scheme("uint8", "int8", True, False, pair_safe=True),
    "s8s8": Scheme("int8", "int8", True, False),
    "tensorrt": Scheme("int8", "int8", True, True),
}


def quantized(net: str, scheme: str) -> Any:
    model = NETS[net]()
    samples = [{"x": sample} for sample in inputs(model, 16)]
    return quantize_static.apply(model, Order(SCHEMES[scheme], Calibration("minmax"), samples)).model.program


def samples_of(net: str, count: int = 5) -> list[dict[str, np.ndarray]]:
    return [{"x": sample} for sample in inputs(NETS[net](), count, seed=9)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("net", NETS)
def test_from_the_same_inputs_every_tensor_is_within_one_step(net: str, scheme: str) -> None:
    found = check_onnx(quantized(net, scheme), samples_of(net))
    assert min(entry.near_share for entry in found.pieces) >= SHARE, found.pieces


@pytest.mark.parametrize("scheme", ["s8s8", "tensorrt"])
@pytest.mark.parametrize("net", NETS)
def test_int8_that_stays_int8_is_predicted_as_well(net: str, scheme: str) -> None:
    """The graph that ONNX Runtime makes on ARM, by this machine's kernels."""
    found = check_onnx(quantized(net, scheme), samples_of(net), native_int8=True)
    assert min(entry.near_share for entry in found.pieces) >= SHARE, found.pieces


@pytest.mark.parametrize("net", ["convolutions", "hard-swish"])
@pytest.mark.parametrize(
    ("scheme", "native"), [("u8s8", False), ("u8s8-safe", False), ("s8s8", True), ("tensorrt", True)]
)
def test_outputs_of_whole_nets_in_integers_agree(net: str, scheme: str, native: bool) -> None:
    found = check_onnx(quantized(net, scheme), samples_of(net, 20), native_int8=native)
    assert total(found.outputs).near_share >= SHARE, found.sentences()


def test_on_arm_every_layer_of_int8_is_an_integer_layer() -> None:
    program = quantized("convolutions", "tensorrt")
    products = sum(node.op_type in ("Conv", "Gemm") for node in program.graph.node)
    assert len(IntegerNet(program, native_int8=True).layers) == products
    assert len(IntegerNet(program).layers) < products, "a residual's tensor is read twice, and floats on x86"


def test_a_wrong_prediction_is_seen() -> None:
    """Each scale of weights 2 % off: the pieces must not agree any more."""
    program = quantized("convolutions", "u8s8")
    wrong = type(program)()
    wrong.CopyFrom(program)
    for tensor in wrong.graph.initializer:
        if tensor.name.startswith("constant") and tensor.name.endswith("_scale") and tensor.dims:
            values = 1.02 * numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    assert wrong != program
    net, apart = IntegerNet(wrong), take_apart(program)
    x = samples_of("convolutions", 1)[0]
    found, expected = net.run(x), IntegerNet(program).run(x)
    parts = [
        Agreement.count(name, found.integers[name], expected.integers[name]) for name in apart.tensors[1:]
    ]
    assert total(parts).near_share < SHARE


def test_pieces_keep_the_model_and_name_what_they_cut() -> None:
    program = quantized("hard-swish", "s8s8")
    before = program.SerializeToString()
    apart = take_apart(program)
    assert program.SerializeToString() == before
    quantize = [node.output[0] for node in program.graph.node if node.op_type == "QuantizeLinear"]
    assert set(apart.tensors) <= set(quantize)
    assert len(apart.tensors) > 10


def test_integers_are_read_back_from_values_on_a_grid() -> None:
    grid = Grid(np.dtype(np.int8), np.asarray(0.1, np.float32), np.asarray(-7, np.int32))
    given = np.arange(-128, 128)
    reals = (given + 7).astype(np.float32) * np.float32(0.1)
    assert np.array_equal(integers(reals, grid), given)


def test_counts_add_up_tensor_by_tensor() -> None:
    first = Agreement.count("a", np.array([1, 2, 3]), np.array([1, 3, 9]))
    second = Agreement.count("a", np.array([250], np.uint8), np.array([5], np.uint8))
    assert (first.values, first.exact, first.near) == (3, 1, 2)
    assert second.near == 0
    (both,) = by_tensor([[first], [second]])
    assert both == Agreement("a", 4, 1, 2)
    assert "50.000 % within one step (of 4)" in both.sentence()


def test_a_model_without_integers_has_only_outputs_to_compare() -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = check_onnx(program, [{"x": np.array([-1, 0, 2], np.float32)}])
    assert found.pieces == ()
    assert total(found.outputs) == Agreement("all", 3, 3, 3)
