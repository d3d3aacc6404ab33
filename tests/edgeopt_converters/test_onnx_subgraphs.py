# SPDX-License-Identifier: Apache-2.0
"""Branches and Constant nodes: what is decided goes, what is not stays, the values are the same bit for bit."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.onnx_graphs import fold
from edgeopt_converters.onnx_subgraphs import graphs, specialise
from edgeopt_wire.errors import RecipeError

RATES = (16000, 8000)


def _constant(name: str, values: Any) -> Any:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(values)))


def _branch(name: str, weight: np.ndarray) -> Any:
    """The weight as a Constant node, and an If of its own that the rank of its input decides."""
    outer = f"{name}_m"  # read by the inner branches, which ONNX Runtime's own inlining refuses
    then = helper.make_graph(
        [_constant("axes", np.array([0])), helper.make_node("Unsqueeze", [outer, "axes"], ["u"])],
        f"{name}_then", [], [helper.make_empty_tensor_value_info("u")],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Relu", [outer], ["i"])], f"{name}_else", [],
        [helper.make_empty_tensor_value_info("i")],
    )  # fmt: skip
    nodes = [
        _constant("w", weight),
        helper.make_node("MatMul", ["x", "w"], [outer]),
        helper.make_node("Shape", [outer], ["s"]),
        helper.make_node("Size", ["s"], ["rank"]),
        _constant("one", np.array(1, np.int64)),
        helper.make_node("Equal", ["rank", "one"], ["flat"]),
        helper.make_node("If", ["flat"], ["r"], f"{name}_inner", then_branch=then, else_branch=other),
    ]
    return helper.make_graph(nodes, name, [], [helper.make_empty_tensor_value_info("r")])


def _net(condition: str = "rate") -> Any:
    """Two weights, one for each sampling rate, both called `w` in branches of their own."""
    rng = np.random.default_rng(0)
    fast, slow = (rng.normal(size=(8, 4)).astype(np.float32) for _ in RATES)
    nodes = [
        _constant("fast", np.array(RATES[0], np.int64)),
        helper.make_node("Equal", [condition, "fast"], ["is_fast"]),
        helper.make_node(
            "If", ["is_fast"], ["y"], "by_rate",
            then_branch=_branch("then", fast), else_branch=_branch("else", slow),
        ),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "net",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 8]),
            helper.make_tensor_value_info("rate", TensorProto.INT64, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 4])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _run(program: Any, **inputs: Any) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    result: np.ndarray = ort.InferenceSession(program.SerializeToString(), options).run(None, inputs)[0]
    return result


def _types(program: Any) -> list[str]:
    return [node.op_type for graph in graphs(program) for node in graph.node]


@pytest.mark.parametrize("rate", RATES)
def test_a_fixed_input_decides_its_branches_and_frees_the_weights(rate: int) -> None:
    net = _net()
    before = net.SerializeToString()
    x = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)

    special, notes = specialise(net, {"rate": np.array(rate, np.int64)})

    onnx.checker.check_model(special, full_check=True)
    assert net.SerializeToString() == before
    assert [entry.name for entry in special.graph.input] == ["x"]
    assert not {"If", "Constant", "Equal", "Shape"} & set(_types(special))
    assert [tuple(tensor.dims) for tensor in special.graph.initializer] == [(8, 4)]
    np.testing.assert_array_equal(_run(special, x=x), _run(net, x=x, rate=np.array(rate)))
    assert notes[0] == f"input 'rate' is fixed to {rate}"
    assert "2 branches decided ahead" in notes[2]
    assert len(fold(special).graph.node) == 2  # MatMul and Relu: the passes' own folding takes it


def test_an_open_branch_keeps_its_nodes_and_gives_its_weights_to_the_main_graph() -> None:
    net = _net()
    x = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)

    special, notes = specialise(net)

    onnx.checker.check_model(special, full_check=True)
    assert _types(special).count("If") == 1  # the inner ones are decided by their static shapes
    assert "Constant" not in _types(special)
    weights = [tensor.name for tensor in special.graph.initializer if len(tensor.dims) == 2]
    assert len(set(weights)) == 2
    assert not any(graph.initializer for graph in list(graphs(special))[1:])
    for rate in RATES:
        expected = _run(net, x=x, rate=np.array(rate))
        np.testing.assert_array_equal(_run(special, x=x, rate=np.array(rate)), expected)
    assert notes[-1] == "1 branches decided on the device only: by_rate"


def test_specialising_twice_changes_nothing_more() -> None:
    once, _ = specialise(_net(), {"rate": np.array(8000, np.int64)})

    again, notes = specialise(once)

    assert again == once
    assert notes == ()


def test_a_constant_that_a_branch_hands_out_keeps_a_node_of_its_own() -> None:
    branches = [
        helper.make_graph([_constant("c", np.array([value], np.float32))], f"b{value}", [],
                          [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])])
        for value in (1, 2)
    ]  # fmt: skip
    node = helper.make_node("If", ["flag"], ["y"], "pick", then_branch=branches[0], else_branch=branches[1])
    graph = helper.make_graph(
        [node], "net", [helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    net = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    opened, _ = specialise(net)
    fixed, _ = specialise(net, {"flag": np.array(False)})

    onnx.checker.check_model(opened, full_check=True)
    assert [_run(opened, flag=np.array(flag)).tolist() for flag in (True, False)] == [[1.0], [2.0]]
    assert _run(fixed).tolist() == [2.0]


def test_a_loop_body_reads_constants_of_the_main_graph() -> None:
    body = helper.make_graph(
        [
            _constant("step", np.array([3], np.float32)),
            helper.make_node("Add", ["sum_in", "step"], ["sum_out"]),
            helper.make_node("Identity", ["go_in"], ["go_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_in", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_out", TensorProto.FLOAT, [1]),
        ],
    )
    graph = helper.make_graph(
        [_constant("times", np.array(4, np.int64)), helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)],
        "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    net = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    special, _ = specialise(net)

    assert sorted(tensor.name for tensor in special.graph.initializer) == ["step", "times"]
    assert _run(special, x=np.array([1], np.float32)).tolist() == [13.0]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("rat", np.array(8000, np.int64), "rate"),
        ("rate", np.array(8000, np.int32), "takes int64 of shape \\[\\], found int32"),
        (
            "x",
            np.zeros((3, 7), np.float32),
            "takes float32 of shape \\[3, 8\\], found float32 of shape \\[3, 7\\]",
        ),
    ],
)
def test_a_wrong_fixed_input_is_refused(name: str, value: np.ndarray, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        specialise(_net(), {name: value})
