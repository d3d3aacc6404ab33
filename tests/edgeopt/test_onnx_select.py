# SPDX-License-Identifier: Apache-2.0
"""Operators are chosen by name, type, number or role; what means nothing is an error that says what there is."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.calibrate import Calibration
from edgeopt.onnx_graphs import fold
from edgeopt.onnx_select import describe, select
from edgeopt.passes import Order, quantize_static
from edgeopt.simulate.integer import IntegerNet
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec


def _program() -> Any:
    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 1, 3, 3), "w3": (16, 8, 1, 1), "w4": (10, 16)}
    tensors = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "n7"),
        helper.make_node("Relu", ["a"], ["b"], "n8"),
        helper.make_node("Conv", ["b", "w2"], ["c"], "n9", group=8),
        helper.make_node("Conv", ["c", "w3"], ["d"], "n10"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"], "n11"),
        helper.make_node("Flatten", ["e"], ["f"], "n12"),
        helper.make_node("Gemm", ["f", "w4"], ["y"], "n13", transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])
    return helper.make_model(helper.make_graph(nodes, "net", [x], [y], tensors))


@pytest.mark.parametrize(
    ("selectors", "names"),
    [
        (["n8"], {"n8"}), (["Conv"], {"n7", "n9", "n10"}), (["Conv#0"], {"n7"}), (["Conv#-1", "Relu"], {"n10", "n8"}),
        (["role:first"], {"n7"}), (["role:last"], {"n13"}), (["role:depthwise"], {"n9"}),
        (["role:pointwise"], {"n10"}), (["role:classifier"], {"n13"}), ([], set()),
    ],
)  # fmt: skip
def test_a_selector_means_what_it_says(selectors: list[str], names: set[str]) -> None:
    assert select(_program(), selectors) == names


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("Softmax", "Conv, Flatten"),
        ("Conv#3", "has 3 of them"),
        ("Conv#x", "n-th Conv"),
        ("role:frist", "first"),
    ],
)
def test_a_selector_that_means_nothing_is_an_error(selector: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        select(_program(), [selector])


def test_an_operator_is_described_by_what_survives_an_export() -> None:
    assert describe(_program(), "n9") == "Conv#1"
    assert select(_program(), [describe(_program(), "n10")]) == {"n10"}


def test_operators_without_a_name_are_chosen_one_by_one() -> None:
    """Exporters may leave names empty; an empty name would mean every one of them."""
    program = _program()
    for node in program.graph.node:
        node.name = ""
    for tensor in program.graph.initializer:
        values = np.random.default_rng(len(tensor.name)).normal(size=tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    program.ir_version = 8
    folded = fold(program)
    assert len({node.name for node in folded.graph.node}) == len(folded.graph.node)
    assert len(select(folded, ["Conv"])) == 3
    (first,) = select(folded, ["Conv#0"])
    scheme = Scheme("uint8", "int8", True, False)
    samples = [{"x": np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)}]
    model = Model(
        "onnx", program, "net", (TensorSpec("x", (1, 3, 8, 8), "float32"),), (TensorSpec("y", (1, 10), "float32"),)
    )  # fmt: skip
    made = quantize_static.apply(model, Order(scheme, Calibration("minmax"), samples, exclude=("Conv#0",)))
    left = [layer.name for layer in IntegerNet(made.model.program).layers]
    assert first not in left
    assert len(left) == 3, "two convolutions and the classifier"
