# SPDX-License-Identifier: Apache-2.0
"""Which files carry the same integers is read from the files; how far their outputs are apart, from the runtimes."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.evaluate.outputs import Outputs
from edgeopt.evaluate.parity_runtimes import Entry, compare_runtimes
from edgeopt.integers import int8_weights, share_of_same
from edgeopt.passes import Order, quantize_static, round_weights
from edgeopt.report import parity_table
from edgeopt.side_by_side import loaded
from edgeopt_converters import path as conversion
from edgeopt_converters.model import Model
from edgeopt_profiles.reader import shared_schemes
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.tensor import TensorSpec

SHAPE = (1, 3, 16, 16)
SAMPLES = [{"x": np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)} for seed in range(8)]
SHAPES = {
    "w0": (16, 3, 3, 3),
    "w1": (16, 1, 3, 3),
    "w2": (24, 16, 1, 1),
    "w3": (24, 24, 1, 1),
    "w4": (10, 24),
}
EQUAL_SHAPES = 2  # w2 and w3 would be mistaken for each other by order alone where a format sorts otherwise


def net() -> Model:
    """A dense, a depthwise and two pointwise convolutions, and a classifier."""
    rng = np.random.default_rng(3)
    tensors = [
        numpy_helper.from_array((rng.normal(size=shape) / np.prod(shape[1:]) ** 0.5).astype(np.float32), name)
        for name, shape in SHAPES.items()
    ]
    nodes, last = [], "x"
    for number in range(4):
        pads = [SHAPES[f"w{number}"][2] // 2] * 4
        group = 16 if number == 1 else 1
        weights = [last, f"w{number}"]
        nodes.append(
            helper.make_node("Conv", weights, [f"c{number}"], f"conv{number}", group=group, pads=pads)
        )
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        last = f"r{number}"
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w4"], ["y"], "classifier", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 10))], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    inputs = (TensorSpec("x", SHAPE, "float32", "NCHW"),)
    return Model(
        "onnx",
        onnx.shape_inference.infer_shapes(program),
        "net",
        inputs,
        (TensorSpec("y", (1, 10), "float32"),),
    )


def rounded() -> Model:
    return round_weights.apply(net(), Order(samples=SAMPLES)).model


def in_onnx(model: Model, scheme: str = "u8s8") -> Model:
    return quantize_static.apply(model, Order(scheme=shared_schemes()[scheme], samples=SAMPLES)).model


def outputs_of(model: Model, runtime: str) -> Outputs:
    program: Any = model.program
    file = program if isinstance(program, bytes) else program.SerializeToString()
    with loaded(file, runtime, model.inputs, model.outputs) as session:
        found = [session.run(sample)["y"] for sample in SAMPLES]
    return Outputs({"y": np.concatenate(found)}, None)


def entry(name: str, runtime: str, model: Model) -> Entry:
    return Entry(name, runtime, int8_weights(model), outputs_of(model, runtime), model.outputs)


def test_weights_are_read_with_their_outputs_first() -> None:
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in rounded().program.graph.initializer}
    found = int8_weights(in_onnx(rounded()))
    wanted = [floats[name].reshape(len(floats[name]), -1) for name in SHAPES]
    assert [weights.shape for weights in found] == [weights.shape for weights in wanted]
    for integers, weights in zip(found, wanted, strict=True):
        scales = np.abs(weights).max(axis=1, keepdims=True) / 127
        assert np.abs(integers * scales - weights).max() <= 0.01 * scales.max(), "they lie on the grid"


def test_other_integers_are_told_and_not_compared() -> None:
    pytest.importorskip("openvino")
    model = rounded()
    plain, safe = in_onnx(model), in_onnx(net(), "u8s8-safe")
    (pair,) = compare_runtimes([entry("a", "onnxruntime", plain), entry("b", "openvino", safe)])
    assert pair.same_weights < 0.9
    assert pair.differences == ()
    assert parity_table.rows([pair]) == []
    assert f"{100 * pair.same_weights:.0f} % of their int8 weights" in parity_table.others([pair])[0]


def test_openvino_and_onnx_runtime_differ_by_less_than_the_integers_cost() -> None:
    pytest.importorskip("openvino")
    model = in_onnx(rounded())
    (pair,) = compare_runtimes([entry("ours", "onnxruntime", model), entry("theirs", "openvino", model)])
    assert pair.same_weights == 1.0
    (found,) = pair.differences
    one, two = (outputs_of(model, runtime).arrays["y"] for runtime in ("onnxruntime", "openvino"))
    assert found.max_abs == pytest.approx(np.abs(one - two).max(), rel=1e-4)
    assert found.mean_abs == pytest.approx(np.abs(one.astype(float) - two).mean(), rel=1e-4)
    exact = outputs_of(net(), "onnxruntime").arrays["y"]
    assert found.max_abs < np.abs(one - exact).max()
    assert from_bytes(type(pair), to_bytes(pair)) == pair
    (row,) = parity_table.rows([pair])
    assert row[:3] == ("ours / theirs", "100.00 %", "y")


def test_files_of_one_runtime_are_no_pair() -> None:
    model = in_onnx(rounded())
    assert compare_runtimes([entry("a", "onnxruntime", model), entry("b", "onnxruntime", model)]) == ()


def test_litert_carries_the_same_integers() -> None:
    pytest.importorskip("litert_torch")
    from edgeopt.passes import quantize_litert

    model = rounded()
    lowered = conversion.convert(model, "litert")
    (edge,) = lowered.inputs
    assert edge.shape == (1, 16, 16, 3)
    samples = [{edge.name: sample["x"].transpose(0, 2, 3, 1)} for sample in SAMPLES]
    found = quantize_litert.apply(lowered, Order(scheme=shared_schemes()["int8"], samples=samples)).model
    check_same(model, found)


def test_executorch_carries_the_same_integers() -> None:
    pytest.importorskip("executorch")
    from edgeopt.passes import quantize_executorch

    model = rounded()
    check_same(
        model, quantize_executorch.apply(model, Order(scheme=shared_schemes()["int8"], samples=SAMPLES)).model
    )


def check_same(model: Model, found: Model) -> None:
    ours, theirs = int8_weights(in_onnx(model)), int8_weights(found)
    assert len(theirs) == len(SHAPES)
    assert share_of_same(ours, theirs) > 0.999


def test_what_a_file_left_in_floats_counts_as_different() -> None:
    whole = in_onnx(rounded())
    order = Order(scheme=shared_schemes()["u8s8"], samples=SAMPLES, exclude=("Gemm",))
    part = quantize_static.apply(rounded(), order).model
    total = sum(np.prod(shape) for shape in SHAPES.values())
    found = share_of_same(int8_weights(whole), int8_weights(part))
    assert found == pytest.approx(1 - np.prod(SHAPES["w4"]) / total)
    assert found == share_of_same(int8_weights(part), int8_weights(whole))
    assert share_of_same(int8_weights(whole), ()) == 0.0


def test_products_of_equal_shape_are_matched_whatever_their_order() -> None:
    rng = np.random.default_rng(0)
    one, two = (rng.integers(-127, 128, (8, 8)).astype(np.int8) for _ in range(EQUAL_SHAPES))
    assert share_of_same((one, two), (two, one)) == 1.0
