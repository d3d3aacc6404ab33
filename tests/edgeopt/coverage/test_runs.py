# SPDX-License-Identifier: Apache-2.0
"""Shapes come from one run: of branches, of free axes with a sample, of what is quantized as it goes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.coverage import Coverage, problems, read
from edgeopt_wire.errors import RuntimeFailure

SIZE, OUTPUTS = 64, 32


def _save(folder: Path, nodes: list[Any], tensors: dict[str, Any], shape: list[Any], opset: int = 21) -> Path:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    file = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), file)
    return file


def _branches(folder: Path) -> Coverage:
    """Two branches with a float matrix product each, one quantized dynamically."""
    weights = np.ones((SIZE, OUTPUTS), np.float32)
    quantized = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "quantize"),
        helper.make_node("MatMulInteger", ["q", "w8", "z"], ["sums"], "inner_integer"),
        helper.make_node("Cast", ["sums"], ["real"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["real", "s"], ["then_y"], "scale"),
    ]
    plain = [helper.make_node("MatMul", ["x", "w"], ["else_y"], "inner_float")]
    then_branch = helper.make_graph(
        quantized, "then", [], [helper.make_tensor_value_info("then_y", TensorProto.FLOAT, [1, OUTPUTS])],
        [numpy_helper.from_array(np.ones((SIZE, OUTPUTS), np.int8), "w8")],
    )  # fmt: skip
    else_branch = helper.make_graph(
        plain, "else", [], [helper.make_tensor_value_info("else_y", TensorProto.FLOAT, [1, OUTPUTS])],
        [numpy_helper.from_array(weights, "w")],
    )  # fmt: skip
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["peak"], "peak", keepdims=0),
        helper.make_node("Greater", ["peak", "limit"], ["is_loud"], "compare"),
        helper.make_node("If", ["is_loud"], ["y"], "if", then_branch=then_branch, else_branch=else_branch),
    ]
    return read(_save(folder, nodes, {"limit": np.float32(0.5)}, [1, SIZE]), "onnxruntime")


def test_both_branches_are_counted_though_one_runs(tmp_path: Path) -> None:
    found = _branches(tmp_path)
    assert (found.products, found.integer_products, found.dynamic) == (2, 1, 1)
    assert found.macs == 2 * SIZE * OUTPUTS
    assert found.integer_macs == found.dynamic_macs == SIZE * OUTPUTS
    (left,) = found.left_out_products
    assert (left.name, left.cause) == ("inner_float", "left out")


def test_free_axes_have_the_length_of_the_sample(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    file = _save(tmp_path, nodes, {"w": np.ones((SIZE, OUTPUTS), np.float32)}, ["batch", "time", SIZE])
    sample = {"x": np.zeros((1, 7, SIZE), np.float32)}
    assert read(file, "onnxruntime").macs == SIZE * OUTPUTS
    assert read(file, "onnxruntime", sample=sample).macs == 7 * SIZE * OUTPUTS


def test_a_file_that_does_not_run_is_said(tmp_path: Path) -> None:
    """A reflecting pad wants more than the one value that a free axis has here."""
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["p"], "pad", mode="reflect"),
        helper.make_node("MatMul", ["p", "w"], ["y"], "product"),
    ]
    tensors = {"pads": np.array([0, 2, 0, 2]), "w": np.ones((5, OUTPUTS), np.float32)}
    file = _save(tmp_path, nodes, tensors, [1, "time"])
    found = read(file, "onnxruntime")
    assert (found.products, found.macs, found.uncounted) == (1, 0, ("product",))
    assert "unknown share" in found.sentence()
    assert "cannot run the model on zeros" in problems(found)[-1]
    with pytest.raises(RuntimeFailure, match="the sample"):
        read(file, "onnxruntime", sample={"x": np.zeros((1, 1), np.float32)})


@pytest.mark.parametrize(("level", "is_dynamic"), [(4, True), (0, False)])
def test_weights_in_four_bits_multiply_integers_at_accuracy_level_4_only(
    tmp_path: Path, level: int, is_dynamic: bool
) -> None:
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], "nbits", domain="com.microsoft", K=SIZE, N=OUTPUTS, bits=4,
        block_size=32, accuracy_level=level,
    )  # fmt: skip
    tensors = {"w": np.ones((OUTPUTS, 2, 16), np.uint8), "s": np.ones(OUTPUTS * 2, np.float32)}
    found = read(_save(tmp_path, [node], tensors, [1, SIZE]), "onnxruntime")
    assert found.macs == SIZE * OUTPUTS
    assert (found.dynamic, found.integer_macs) == ((1, SIZE * OUTPUTS) if is_dynamic else (0, 0))
    assert [left.cause for left in found.left_out] == ([] if is_dynamic else ["weights only"])


def test_a_recurrent_net_is_quantized_dynamically(tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    hidden, steps = 16, 5
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], "lstm", hidden_size=hidden)
    tensors = {
        "w": np.random.default_rng(0).normal(size=(1, 4 * hidden, SIZE)).astype(np.float32),
        "r": np.random.default_rng(1).normal(size=(1, 4 * hidden, hidden)).astype(np.float32),
    }
    file = _save(tmp_path, [node], tensors, [steps, 1, SIZE], opset=17)
    macs = steps * 4 * hidden * (SIZE + hidden)
    plain = read(file, "onnxruntime")
    assert (plain.macs, plain.integer_macs, plain.left_out[0].cause) == (macs, 0, "not quantized")
    quantize_dynamic(str(file), str(tmp_path / "dynamic.onnx"))
    found = read(tmp_path / "dynamic.onnx", "onnxruntime")
    assert (found.macs, found.dynamic_macs, found.dynamic_types) == (macs, macs, ("DynamicQuantizeLSTM",))


def test_a_product_that_ends_in_floats_is_static_where_its_input_is(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x_q"], "quantize"),
        helper.make_node("DequantizeLinear", ["x_q", "s", "z"], ["x_dq"], "dequantize"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["w_dq"], "w_dequantize", axis=0),
        helper.make_node("Transpose", ["w_dq"], ["w_t"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x_dq", "w_t"], ["y"], "product"),
    ]
    tensors = {
        "s": np.float32(0.02), "z": np.uint8(128), "w": np.ones((OUTPUTS, SIZE), np.int8),
        "ws": np.linspace(0.01, 0.02, OUTPUTS).astype(np.float32), "wz": np.zeros(OUTPUTS, np.int8),
    }  # fmt: skip
    found = read(_save(tmp_path, nodes, tensors, [1, SIZE]), "onnxruntime")
    assert (found.integer_products, found.integer_macs, found.dynamic) == (1, SIZE * OUTPUTS, 0)
    assert problems(found) == ()


def test_a_deep_net_is_read(tmp_path: Path) -> None:
    """Deeper than Python's recursion, with a quantized product at its end."""
    depth = 1200
    nodes = [
        helper.make_node("Sin", [f"h{at}" if at else "x"], [f"h{at + 1}"], f"sin_{at}") for at in range(depth)
    ]
    nodes += [
        helper.make_node("QuantizeLinear", [f"h{depth}", "s", "z"], ["x_q"], "quantize"),
        helper.make_node("DequantizeLinear", ["x_q", "s", "z"], ["x_dq"], "dequantize"),
        helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["w_dq"], "w_dequantize"),
        helper.make_node("MatMul", ["x_dq", "w_dq"], ["y"], "product"),
    ]
    tensors = {
        "s": np.float32(0.02), "z": np.uint8(128), "w": np.ones((OUTPUTS, SIZE), np.int8).T.copy(), "wz": np.int8(0),
    }  # fmt: skip
    found = read(_save(tmp_path, nodes, tensors, [1, SIZE]), "onnxruntime")
    assert (found.integer_products, found.float_operators) == (1, depth)
    assert {left.cause for left in found.left_out} == {"no integer kernel"}
