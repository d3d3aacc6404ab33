# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates are counted where a bias is computed by the graph: exporters that do not optimize expand a zero."""

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgeopt_converters.onnx_graph import operators


def _unoptimized(kind: str) -> Any:
    """A layer whose bias is expanded to as many values as its weights have rows."""
    weight = (4, 3, 3, 3) if kind == "Conv" else (4, 3)
    data = [1, 3, 8, 8] if kind == "Conv" else [1, 3]
    made = [1, 4, 6, 6] if kind == "Conv" else [1, 4]
    nodes = [
        helper.make_node("Shape", ["w"], ["rows"], start=0, end=1),
        helper.make_node("Expand", ["rows", "one"], ["length"]),
        helper.make_node("Expand", ["zero", "length"], ["bias"]),
        helper.make_node(
            kind, ["x", "w", "bias"], ["y"], "layer", **({} if kind == "Conv" else {"transB": 1})
        ),
    ]
    tensors = [
        numpy_helper.from_array(np.ones(weight, np.float32), "w"),
        numpy_helper.from_array(np.array([1], np.int64), "one"),
        numpy_helper.from_array(np.float32(0), "zero"),
    ]
    edges = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", data), ("y", made))
    ]
    graph = helper.make_graph(nodes, "net", edges[:1], edges[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_a_convolution_with_an_expanded_bias_is_counted() -> None:
    assert [found.macs for found in operators(_unoptimized("Conv"))] == [0, 0, 0, 4 * 6 * 6 * 27]


def test_a_matrix_product_with_an_expanded_bias_is_counted() -> None:
    assert [found.macs for found in operators(_unoptimized("Gemm"))] == [0, 0, 0, 12]
