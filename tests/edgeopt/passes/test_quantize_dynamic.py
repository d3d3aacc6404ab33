# SPDX-License-Identifier: Apache-2.0
"""Int8 products with run-time ranges: the integers of the grid, fused by the runtime, close to float."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.onnx_graphs import fold
from edgeopt.onnx_products import unflatten
from edgeopt.passes import Order, quantize_dynamic, round_weights
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError, UnsupportedError
from edgeopt_wire.tensor import TensorSpec

WIDTH = 32


def _model(
    nodes: list[Any], tensors: dict[str, np.ndarray], x: list[int], y: list[int], kind: int = 1
) -> Model:
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", kind, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(program)
    dtype = "float32" if kind == TensorProto.FLOAT else "int64"
    specs = (TensorSpec("x", tuple(x), dtype),), (TensorSpec("y", tuple(y), "float32"),)
    return Model("onnx", program, "net", *specs)


def _attention() -> Model:
    """A table, two products of one activation, a product of two activations, a product with a bias."""
    rng = np.random.default_rng(0)
    tensors = {
        "table": rng.normal(size=(300, WIDTH)), "wq": rng.normal(size=(WIDTH, WIDTH)) / 6,
        "wk": rng.normal(size=(WIDTH, WIDTH)) / 6, "wo": rng.normal(size=(16, WIDTH)) / 6, "bo": rng.normal(size=16),
    }  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["e"], "embedding"),
        helper.make_node("MatMul", ["e", "wq"], ["q"], "query"),
        helper.make_node("MatMul", ["e", "wk"], ["k"], "key"),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["s"], "scores"),
        helper.make_node("Softmax", ["s"], ["p"], "softmax", axis=-1),
        helper.make_node("MatMul", ["p", "e"], ["c"], "context"),
        helper.make_node("ReduceMean", ["c", "axes"], ["m"], "mean", keepdims=0),
        helper.make_node("Gemm", ["m", "wo", "bo"], ["y"], "out", transB=1),
    ]
    floats = {name: values.astype(np.float32) for name, values in tensors.items()}
    floats["axes"] = np.array([1])
    return _model(nodes, floats, [1, 12], [1, 16], TensorProto.INT64)


def _samples(count: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.integers(0, 300, (1, 12))} for _ in range(count)]


def _run(model: Model, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = ort.InferenceSession(model.program.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, sample)[0] for sample in samples])


def _tensors(model: Model) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.program.graph.initializer}


def _types(model: Model) -> list[str]:
    return [node.op_type for node in model.program.graph.node]


def _fused(model: Model, folder: Path) -> list[str]:
    """The operators that ONNX Runtime makes of the file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.program.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def test_the_output_stays_close_and_the_file_shrinks_fourfold() -> None:
    model, unseen = _attention(), _samples(32)
    found = quantize_dynamic.apply(model, Order())
    exact = _run(model, unseen)
    error = _run(found.model, unseen) - exact
    assert (
        10 * np.log10((exact**2).sum() / (error**2).sum()) > 25
    )  # 8 bits; a wrong scale or zero point gives < 10
    sizes = [sum(values.nbytes for values in _tensors(entry).values()) for entry in (model, found.model)]
    assert sizes[1] < 0.35 * sizes[0]
    assert found.notes[0].startswith(
        "3 matrix products in int8 with ranges found at run time, 1 tables in int8"
    )


def test_the_runtime_fuses_every_product_and_quantizes_a_shared_input_once(tmp_path: Path) -> None:
    fused = _fused(quantize_dynamic.apply(_attention(), Order()).model, tmp_path)
    assert fused.count("DynamicQuantizeLinear") == 1  # query's and key's
    assert fused.count("MatMulIntegerToFloat") == 2
    assert fused.count("DynamicQuantizeMatMul") == 1  # out, with its bias
    assert "MatMulInteger" not in fused


def test_the_integers_are_those_of_weights_rounded_before() -> None:
    rounded = round_weights.apply(_attention(), Order(samples=_samples(16))).model
    found = _tensors(quantize_dynamic.apply(rounded, Order()).model)
    before = _tensors(rounded)
    for name, columns in (("wq", before["wq"]), ("wk", before["wk"]), ("wo_transposed", before["wo"].T)):
        scale = np.abs(columns.astype(np.float64)).max(0) / 127
        integers = columns / scale
        np.testing.assert_allclose(integers, np.rint(integers), atol=1e-3)
        np.testing.assert_array_equal(found[f"{name}_quantized"], np.rint(integers))
        np.testing.assert_allclose(found[f"{name}_scale"], scale, rtol=1e-6)


def test_products_of_activations_stay_in_float_and_are_named() -> None:
    result = quantize_dynamic.apply(_attention(), Order())
    assert _types(result.model).count("MatMul") == 2
    assert "scores (not an activation by a constant)" in result.notes[1]
    assert "context (not an activation by a constant)" in result.notes[1]


def test_excluded_products_and_types_keep_their_floats() -> None:
    model = _attention()
    result = quantize_dynamic.apply(model, Order(exclude=("key", "Gather")))
    kept = _tensors(result.model)
    np.testing.assert_array_equal(kept["wk"], _tensors(model)["wk"])
    np.testing.assert_array_equal(kept["table"], _tensors(model)["table"])
    assert "wq_quantized" in kept
    assert "key (excluded by the recipe)" in result.notes[1]
    with pytest.raises(RecipeError, match="no operator of name or type 'valu'"):
        quantize_dynamic.apply(model, Order(exclude=("valu",)))


def test_unsigned_weights_are_the_same_integers_and_the_same_output() -> None:
    model, unseen = _attention(), _samples(8)
    signed = quantize_dynamic.apply(model, Order()).model
    unsigned = quantize_dynamic.apply(
        model, Order(options=quantize_dynamic.Options(unsigned_weights=True))
    ).model
    shifted = _tensors(unsigned)["wq_quantized"]
    assert shifted.dtype == np.uint8
    np.testing.assert_array_equal(shifted.astype(np.int16) - 128, _tensors(signed)["wq_quantized"])
    np.testing.assert_allclose(_run(unsigned, unseen), _run(signed, unseen), rtol=1e-5, atol=1e-6)


def test_one_scale_for_a_whole_matrix_if_asked() -> None:
    found = quantize_dynamic.apply(
        _attention(), Order(options=quantize_dynamic.Options(per_channel=False, tables=False))
    )
    assert np.unique(_tensors(found.model)["wq_scale"]).size == 1
    assert "table" in _tensors(found.model)


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    weight[:, 2] = 0
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    found = quantize_dynamic.apply(_model(nodes, {"w": weight}, [1, 8], [1, 4]), Order()).model
    output = _run(found, [{"x": np.ones((1, 8), np.float32)}])
    assert output[0, 2] == 0
    np.testing.assert_allclose(output[0], weight.sum(0), atol=0.05)


def test_a_convolution_alone_is_refused_with_its_name() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "stem")]
    model = _model(nodes, {"w": np.ones((4, 3, 1, 1), np.float32)}, [1, 3, 8, 8], [1, 4, 8, 8])
    with pytest.raises(UnsupportedError, match=r"stem \(no fast integer kernel"):
        quantize_dynamic.apply(model, Order())


def test_other_weights_than_int8_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="int16"):
        quantize_dynamic.apply(_attention(), Order(scheme=Scheme("uint8", "int16", True, False)))


def test_products_that_folding_flattened_are_found_again() -> None:
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"w1": (8, 6), "b1": (6,), "w2": (8, 6), "b2": (6,)}.items()
    }
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "act"),
        helper.make_node("MatMul", ["r", "w1"], ["p1"], "first"), helper.make_node("Add", ["p1", "b1"], ["a1"], "add1"),
        helper.make_node("MatMul", ["r", "w2"], ["p2"], "second"), helper.make_node("Add", ["p2", "b2"], ["a2"], "add2"),
        helper.make_node("Mul", ["a1", "a2"], ["y"], "gate"),
    ]  # fmt: skip
    model = _model(nodes, tensors, [1, 5, 8], [1, 5, 6])
    folded = fold(model.program)
    assert [node.op_type for node in folded.graph.node].count("Gemm") == 2  # what this is about
    back = unflatten(folded)
    assert [node.op_type for node in back.graph.node] == ["Relu", "MatMul", "Add", "MatMul", "Add", "Mul"]
    onnx.checker.check_model(back)
    sample = [{"x": rng.normal(size=(1, 5, 8)).astype(np.float32)}]
    unflattened = Model("onnx", back, "net", model.inputs, model.outputs)
    np.testing.assert_allclose(_run(unflattened, sample), _run(model, sample), rtol=1e-5, atol=1e-6)
    assert _types(quantize_dynamic.apply(model, Order()).model).count("DynamicQuantizeLinear") == 1


def test_the_model_given_is_left_as_it_was() -> None:
    model = _attention()
    before = model.program.SerializeToString()
    quantize_dynamic.apply(model, Order())
    assert model.program.SerializeToString() == before


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="table_rows"):
        quantize_dynamic.Options(table_rows=0)
