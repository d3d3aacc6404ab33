# SPDX-License-Identifier: Apache-2.0
"""Lowest and highest values that the runtime finds itself are those of the values brought out."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeopt.calibrate import Calibration, Stream, find_ranges
from edgeopt.onnx_graphs import ends_observer, fold, observer
from edgeopt_wire.errors import RecipeError


def _program() -> onnx.ModelProto:
    weight = helper.make_tensor(
        "w", TensorProto.FLOAT, [4, 3], np.linspace(-1, 2, 12).astype(np.float32).tolist()
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "product"),
        helper.make_node("Relu", ["m"], ["r"], "act"),
        helper.make_node("Sqrt", ["r"], ["y"], "root"),
    ]
    edges = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 4]), ("y", [2, 3]))
    ]
    graph = helper.make_graph(nodes, "net", edges[:1], edges[1:], [weight])
    return fold(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


NAMES = frozenset({"x", "m", "r", "y"})


def test_the_runtimes_own_ends_are_those_of_the_values() -> None:
    rng = np.random.default_rng(0)
    samples = [{"x": rng.normal(size=(2, 4)).astype(np.float32)} for _ in range(5)]
    ranges = [
        find_ranges(make(_program(), NAMES), Stream(samples), Calibration("minmax"))
        for make in (observer, ends_observer)
    ]
    assert ranges[0] == ranges[1]
    assert set(ranges[1]) == NAMES
    assert ranges[1]["m"].low < 0 < ranges[1]["m"].high


def test_nan_is_not_passed_over() -> None:
    bad = {"x": np.array([[1, 2, np.nan, 4], [1, 2, 3, 4]], np.float32)}
    with pytest.raises(RecipeError, match="NaN or infinity"):
        find_ranges(ends_observer(_program(), NAMES), Stream([bad]), Calibration("minmax"))
