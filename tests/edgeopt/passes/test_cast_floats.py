# SPDX-License-Identifier: Apache-2.0
"""Half precision: which type is where, what overflows stays in float32, and what bfloat16 rounds to where nobody has it."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.bfloat16 import rounded
from edgeopt.passes import Order, cast_floats
from edgeopt_converters.model import Model
from edgeopt_wire.errors import UnsupportedError
from edgeopt_wire.tensor import TensorSpec

BFLOAT16 = cast_floats.Options("bfloat16")
node = helper.make_node


def _net(gain: float = 1.0) -> Model:
    """Convolution, ReLU6, squeeze-and-excite, resize (whose scales must stay float32), pooling, classifier."""
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int, factor: float = 0.3) -> Any:
        return numpy_helper.from_array((rng.normal(0, factor, shape)).astype(np.float32), name)

    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], "stem", pads=[1] * 4),
        node("Clip", ["c1", "zero", "six"], ["r1"], "relu6"),
        node("GlobalAveragePool", ["r1"], ["s"], "squeeze"),
        node("Conv", ["s", "w2"], ["e"], "excite"),
        node("HardSigmoid", ["e"], ["g"], "gate"),
        node("Mul", ["r1", "g"], ["m"], "scale"),
        node("Resize", ["m", "", "scales"], ["z"], "resize", mode="nearest"),
        node("GlobalAveragePool", ["z"], ["p"], "pool"),
        node("Flatten", ["p"], ["f"], "flatten"),
        node("Gemm", ["f", "w3", "b3"], ["logits"], "classifier", transB=1),
        node("Mul", ["logits", "gain"], ["large"], "amplify"),
        node("Mul", ["large", "gain"], ["larger"], "again"),
        node("Div", ["larger", "gain"], ["less"], "calm"),
        node("Div", ["less", "gain"], ["y"], "calmer"),
    ]
    tensors = [
        tensor("w1", 8, 3, 3, 3), tensor("b1", 8), tensor("w2", 8, 8, 1, 1), tensor("w3", 5, 8), tensor("b3", 5),
        numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
        *(numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("zero", 0), ("six", 6), ("gain", gain))),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    program = onnx.shape_inference.infer_shapes(program, strict_mode=True)
    spec = (TensorSpec("x", (1, 3, 8, 8), "float32", "NCHW"),)
    return Model("onnx", program, "net", spec, (TensorSpec("y", (1, 5), "float32"),))


def _samples() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(4)]


def _run(program: Any) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(program.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, sample)[0] for sample in _samples()])


def _sqnr_db(found: np.ndarray, exact: np.ndarray) -> float:
    return float(10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()))


def _types(program: Any) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(program, strict_mode=True)
    infos = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    return {info.name: info.type.tensor_type.elem_type for info in infos}


def test_operators_that_overflow_float16_with_the_samples_stay_in_float32() -> None:
    model = _net(gain=6e4)
    blind = cast_floats.apply(model, Order())
    assert cast_floats.UNSEEN in blind.notes
    assert _types(blind.model.program)["larger"] == TensorProto.FLOAT16
    assert np.isfinite(
        _run(blind.model.program)
    ).all()  # a CPU computes in float32 and cannot see what a GPU gets
    seeing = cast_floats.apply(model, Order(samples=_samples()))
    reader = next(entry for entry in seeing.model.program.graph.node if entry.name == "calm")
    writer = next(entry for entry in seeing.model.program.graph.node if reader.input[0] in entry.output)
    assert writer.name == "again"  # float32 from one to the other, no cast between
    assert _types(seeing.model.program)[writer.output[0]] == TensorProto.FLOAT
    assert _sqnr_db(_run(seeing.model.program), _run(model.program)) > 50
    assert any("again, calm" in note for note in seeing.notes)
    assert cast_floats.UNSEEN not in seeing.notes


def test_float16_keeps_more_than_fifty_decibels_where_nothing_overflows() -> None:
    model = _net()
    found = cast_floats.apply(model, Order(samples=_samples()))
    assert found.notes == ()
    assert _sqnr_db(_run(found.model.program), _run(model.program)) > 50


def test_excluding_an_operator_keeps_the_converters_own_exceptions() -> None:
    found = cast_floats.apply(_net(), Order(samples=_samples(), exclude=("Gemm",)))
    assert _sqnr_db(_run(found.model.program), _run(_net().program)) > 50
    weights = {t.name: t.data_type for t in found.model.program.graph.initializer}
    assert weights["w3"] == TensorProto.FLOAT
    assert weights["w1"] == TensorProto.FLOAT16


def test_bfloat16_is_everywhere_but_at_the_edges_and_where_the_operator_has_it_not() -> None:
    found = cast_floats.apply(_net(), Order(options=BFLOAT16))
    program = found.model.program
    onnx.checker.check_model(program, full_check=True)
    types = _types(program)
    assert types["x"] == types["y"] == TensorProto.FLOAT
    weights = {t.name: t for t in program.graph.initializer}
    assert weights["w1_bf16"].data_type == TensorProto.BFLOAT16
    assert weights["scales"].data_type == TensorProto.FLOAT
    inner = {entry.op_type: types[entry.output[0]] for entry in program.graph.node if entry.op_type != "Cast"}
    assert set(inner.values()) == {TensorProto.BFLOAT16}
    assert found.notes == ()
    nearest = numpy_helper.to_array(weights["w1_bf16"]).astype(np.float32)
    bits = numpy_helper.to_array(next(t for t in _net().program.graph.initializer if t.name == "w1")).view(
        np.uint32
    )
    wanted = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    np.testing.assert_array_equal(nearest, wanted)


def test_an_excluded_operator_stays_in_float32_between_casts_and_is_named() -> None:
    found = cast_floats.apply(_net(), Order(options=BFLOAT16, exclude=("classifier",)))
    onnx.checker.check_model(found.model.program, full_check=True)
    assert found.notes == ("1 operators stay in float32: classifier",)
    assert _types(found.model.program)["logits"] == TensorProto.FLOAT


def test_onnxruntime_has_no_bfloat16_and_the_rounded_twin_says_what_it_would_give() -> None:
    model = _net()
    small = cast_floats.apply(model, Order(options=BFLOAT16)).model.program
    with pytest.raises(Exception, match="Could not find an implementation"):
        _run(small)
    exact, found = _run(model.program), _run(rounded(small))
    assert 30 < _sqnr_db(found, exact) < 60
    huge = cast_floats.apply(_net(gain=6e4), Order(options=BFLOAT16)).model.program
    assert _sqnr_db(_run(rounded(huge)), exact) > 30  # nothing overflows


def test_the_twin_rounds_as_pytorch_does() -> None:
    torch = pytest.importorskip("torch")
    weight = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    graph = helper.make_graph(
        [node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["y"])], "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16])], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    program = onnx.shape_inference.infer_shapes(program)
    spec = (TensorSpec("x", (1, 6), "float32"),)
    model = Model("onnx", program, "net", spec, (TensorSpec("y", (1, 16), "float32"),))
    x = np.random.default_rng(1).normal(size=(1, 6)).astype(np.float32)
    twin = rounded(cast_floats.apply(model, Order(options=BFLOAT16)).model.program)
    session = ort.InferenceSession(twin.SerializeToString(), providers=["CPUExecutionProvider"])
    bf16 = torch.bfloat16
    wanted = torch.relu(
        (torch.tensor(x).to(bf16).float() @ torch.tensor(weight).to(bf16).float()).to(bf16)
    ).float()
    np.testing.assert_allclose(session.run(None, {"x": x})[0], wanted.numpy(), rtol=2**-7)


def test_a_model_with_branches_is_refused_with_the_way_out() -> None:
    model = _net()
    inner = helper.make_graph(
        [node("Identity", ["x"], ["o"])], "b", [], [helper.make_tensor_value_info("o", 1, None)]
    )
    model.program.graph.node.append(node("If", ["flag"], ["z2"], then_branch=inner, else_branch=inner))
    with pytest.raises(UnsupportedError, match=r"\[constants\]"):
        cast_floats.apply(model, Order(options=BFLOAT16))
