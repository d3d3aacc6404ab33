# SPDX-License-Identifier: Apache-2.0
"""What OpenVINO computes in integers is read from the graph that it runs; the rules said of it are asked of the installed one."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.coverage import Coverage, problems, read
from edgeopt.passes import Order, quantize_static
from edgeopt_converters.model import Model
from edgeopt_profiles.reader import shared_schemes
from edgeopt_wire.errors import RuntimeFailure
from edgeopt_wire.tensor import TensorSpec

pytest.importorskip("openvino")

SHAPE = (1, 3, 16, 16)
SPEC = (TensorSpec("x", SHAPE, "float32", "NCHW"),)
MACS = 256 * 16 * 27 + 256 * 16 * 9 + 256 * 16 * 16 + 10 * 16


def graph_of(nodes: list[Any], shapes: dict[str, tuple[int, ...]], *, batch: int | str = 1) -> Model:
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(rng.normal(0, 0.3, shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *SHAPE[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    program = onnx.shape_inference.infer_shapes(program)
    return Model("onnx", program, "net", SPEC, (TensorSpec("y", (1, 1), "float32"),))


def residual(*, batch: int | str = 1) -> Model:
    """A stem, a block of a depthwise and a pointwise convolution that is added to it, a classifier."""
    shapes = {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "b2": (16,), "w3": (16, 16, 1, 1)}
    shapes |= {"b3": (16,), "w4": (10, 16), "b4": (10,)}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "act"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "depthwise", pads=[1, 1, 1, 1], group=16),
        helper.make_node("Conv", ["c2", "w3", "b3"], ["c3"], "pointwise"),
        helper.make_node("Add", ["r1", "c3"], ["a"], "residual"),
        helper.make_node("GlobalAveragePool", ["a"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], "classifier", transB=1),
    ]
    return graph_of(nodes, shapes, batch=batch)


def between(nodes: list[Any], shapes: dict[str, tuple[int, ...]]) -> Model:
    """Two convolutions of x, `left` and `right`, and operators that make `o` of them, before a last convolution."""
    shapes |= {"wl": (16, 3, 3, 3), "wr": (16, 3, 3, 3), "wt": (8, 16, 1, 1)}
    head = [
        helper.make_node("Conv", ["x", "wl"], ["left"], "head_left", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "wr"], ["right"], "head_right", pads=[1, 1, 1, 1]),
    ]
    return graph_of([*head, *nodes, helper.make_node("Conv", ["o", "wt"], ["y"], "tail")], shapes)


def quantized(model: Model, scheme: str = "u8s8-safe", exclude: tuple[str, ...] = ()) -> Any:
    rng = np.random.default_rng(1)
    samples = [{"x": rng.normal(size=SHAPE).astype(np.float32)} for _ in range(4)]
    order = Order(scheme=shared_schemes()[scheme], samples=samples, exclude=exclude)
    return quantize_static.apply(model, order).model.program


def judged(program: Any, folder: Path, **options: Any) -> Coverage:
    file = folder / "model.onnx"
    onnx.save(program, file)
    return read(file, "openvino", **options)


def test_a_float_file_computes_nothing_in_integers(tmp_path: Path) -> None:
    found = judged(residual().program, tmp_path)
    assert (found.products, found.integer_products, found.macs, found.integer_macs) == (4, 0, MACS, 0)
    assert (found.runtime, found.conversions) == ("openvino", 0)
    assert "is not quantized" in problems(found)[0]


def test_files_made_for_onnxruntime_compute_everything_in_integers(tmp_path: Path) -> None:
    found = judged(quantized(residual()), tmp_path)
    assert (found.products, found.integer_products, found.mac_share) == (4, 4, 1.0)
    assert found.integer_operators == found.operators
    assert found.macs == MACS
    assert problems(found) == ()


def test_an_excluded_layer_is_named_with_its_reason(tmp_path: Path) -> None:
    onnx.save(residual().program, tmp_path / "float.onnx")
    program = quantized(residual(), exclude=("pointwise",))
    found = judged(program, tmp_path, reference=tmp_path / "float.onnx")
    (left,) = found.left_out_products
    assert (left.type, left.name, left.macs) == ("Conv", "pointwise", 256 * 16 * 16)
    assert "are floats in the file" in left.reason
    assert "excluded" in left.help
    assert found.conversions > 1


def test_a_free_axis_has_the_samples_length(tmp_path: Path) -> None:
    program = quantized(residual(batch="n"))
    two = {"x": np.zeros((2, *SHAPE[1:]), np.float32)}
    assert judged(program, tmp_path).macs == MACS
    assert judged(program, tmp_path, sample=two).macs == 2 * MACS


def test_a_product_of_activations_with_zero_points_is_in_floats_and_the_reason_says_so(
    tmp_path: Path,
) -> None:
    model = between([helper.make_node("MatMul", ["left", "right"], ["o"], "scores")], {})
    found = judged(quantized(model), tmp_path)
    (left,) = found.left_out_products
    assert (left.name, left.cause) == ("scores", "zero point")
    symmetric = judged(quantized(model, "tensorrt"), tmp_path)
    assert symmetric.left_out_products == ()


def test_a_transposed_convolution_wants_zero_point_0(tmp_path: Path) -> None:
    node = helper.make_node("ConvTranspose", ["left", "up"], ["o"], "upsample", strides=[2, 2])
    model = between([node], {"up": (16, 16, 2, 2)})
    found = judged(quantized(model), tmp_path)
    (left,) = found.left_out_products
    assert (left.name, left.cause, left.macs) == ("upsample", "zero point", 256 * 16 * 16 * 4)
    assert judged(quantized(model, "tensorrt"), tmp_path).left_out_products == ()


def test_an_operator_without_integers_is_named_and_its_conversions_are_counted(tmp_path: Path) -> None:
    model = between([helper.make_node("Softmax", ["left"], ["o"], "probabilities", axis=-1)], {})
    found = judged(quantized(model), tmp_path)
    assert [(left.name, left.cause) for left in found.left_out] == [("probabilities", "no integer kernel")]
    assert found.conversions >= 3  # in, around the Softmax


def test_weights_alone_are_not_integer_arithmetic(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.integers(-127, 128, (64, 64)).astype(np.int8),
        "s": np.full(64, 0.01, np.float32),
        "z": np.zeros(64, np.int8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"], axis=1),
        helper.make_node("MatMul", ["x", "wd"], ["y"], "product"),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 64])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = judged(program, tmp_path)
    assert [(left.name, left.cause) for left in found.left_out_products] == [("product", "weights only")]
    assert (found.macs, found.dynamic) == (8 * 64 * 64, 0)


def test_a_file_that_cannot_be_loaded_is_a_runtime_failure(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x08nonsense")
    with pytest.raises(RuntimeFailure, match=r"bad\.onnx"):
        read(tmp_path / "bad.onnx", "openvino")
