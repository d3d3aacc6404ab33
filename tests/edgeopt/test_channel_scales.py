# SPDX-License-Identifier: Apache-2.0
"""Scales of channels found for a whole tensor are those that ONNX Runtime's quantizer finds in its loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from edgeopt.channel_scales import channel_scales
from edgeopt.onnx_graphs import fold
from edgeopt.passes import quantize_static
from edgeopt.ranges import Range
from edgeopt_profiles.profile import Scheme

LAYERS = ("conv", "depthwise", "rows", "columns", "product")


def net(rng: np.random.Generator) -> Any:
    """Every layer with weights per channel, and channels that are all zero, tiny and huge."""
    weights = {
        "w.conv": rng.normal(size=(8, 3, 3, 3)),
        "w.depthwise": rng.normal(size=(8, 1, 3, 3)),
        "w.rows": rng.normal(size=(6, 8)),
        "w.columns": rng.normal(size=(6, 5)),
        "w.product": rng.normal(size=(5, 4)),
        "b.rows": rng.normal(size=6) * 1e6,
        "b.columns": rng.normal(size=5),
    }
    weights["w.conv"][0] = 0
    weights["w.conv"][1] *= 1e-39
    weights["w.depthwise"][2] *= 1e30
    weights["w.rows"][3] *= 1e-8
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["x", "w.conv"], ["a"], "conv", pads=[1, 1, 1, 1]),
        node("Conv", ["a", "w.depthwise"], ["b"], "depthwise", pads=[1, 1, 1, 1], group=8),
        node("GlobalAveragePool", ["b"], ["c"], "pool"),
        node("Flatten", ["c"], ["d"], "flat"),
        node("Gemm", ["d", "w.rows", "b.rows"], ["e"], "rows", transB=1),
        node("Gemm", ["e", "w.columns", "b.columns"], ["f"], "columns"),
        node("MatMul", ["f", "w.product"], ["y"], "product"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4])],
        [onnx.numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("activation", ["uint8", "int8"])
def test_files_are_the_same_byte_by_byte(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fold(net(np.random.default_rng(0)))
    scheme = Scheme(activation, "int8", per_channel=True, symmetric_activations=activation == "int8")
    names = {name for node in program.graph.node for name in node.output} | {"x"}
    ranges = dict.fromkeys(names, Range(-1.0, 3.0))
    ours = quantize_static.with_ranges(program, scheme, ranges)
    monkeypatch.setattr(quantize_static, "channel_scales", lambda *_args, **_kw: {})
    theirs = quantize_static.with_ranges(program, scheme, ranges)
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


def test_every_layer_has_one_scale_a_channel() -> None:
    found = channel_scales(net(np.random.default_rng(0)), LAYERS, pair_safe=False)
    assert {name: len(entries) for name, entries in found.items()} == {
        "w.conv": 8, "w.depthwise": 8, "w.rows": 6, "w.columns": 5, "w.product": 4,
    }  # fmt: skip
    assert found["w.conv"][0]["scale"] == 1.0  # nothing to scale, and no division by zero


def test_what_is_left_in_float_or_used_twice_has_none() -> None:
    program = net(np.random.default_rng(0))
    program.graph.node.append(onnx.helper.make_node("Identity", ["w.rows"], ["z"], "again"))
    assert set(channel_scales(program, ["conv", "rows"], pair_safe=False)) == {"w.conv"}
