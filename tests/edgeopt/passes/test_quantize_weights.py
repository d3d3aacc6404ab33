# SPDX-License-Identifier: Apache-2.0
"""Weights only: what the runtime computes is what the grid says, files shrink, samples help, nothing is hidden."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.onnx_graphs import fold
from edgeopt.passes import Order, quantize_weights
from edgeopt.passes.quantize_weights import Options
from edgeopt.weights import mse, rtn
from edgeopt.weights.grid import Grid
from edgeopt_converters.model import Model
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

WIDTH, HIDDEN, ROWS, WORDS = 96, 160, 12, 40
SMALL = Options(method="rtn", group=32, skip_k_below=64, accuracy_level=1, smallest=512)


def _tensor(name: str, *shape: int, seed: int = 0) -> Any:
    values = np.random.default_rng([seed, len(name), *name.encode()]).standard_t(5, shape) / np.sqrt(shape[0])
    return numpy_helper.from_array(values.astype(np.float32), name)


def _ones(name: str, size: int) -> Any:
    return numpy_helper.from_array(np.ones(size, np.float32), name)


def _model(nodes: list[Any], tensors: list[Any], inputs: dict[str, Any], outputs: dict[str, Any]) -> Model:
    def values(entries: dict[str, Any]) -> list[Any]:
        kinds = {"ids": TensorProto.INT64, "rate": TensorProto.INT64}
        return [
            helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape)
            for name, shape in entries.items()
        ]

    graph = helper.make_graph(nodes, "net", values(inputs), values(outputs), tensors)
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(program)
    specs = tuple(
        TensorSpec(name, tuple(shape), "int64" if name in ("ids", "rate") else "float32")
        for name, shape in inputs.items()
    )
    return Model(
        "onnx", program, "net", specs, tuple(TensorSpec(n, tuple(s), "float32") for n, s in outputs.items())
    )


def _perceptron() -> Model:
    """Words, a normalization, two readers of it, GELU's place taken by Tanh (no scale passes), a product with bias."""
    nodes = [
        helper.make_node("Gather", ["words", "ids"], ["e"], "embed"),
        helper.make_node("LayerNormalization", ["e", "gain", "shift"], ["n"], "norm", axis=-1),
        helper.make_node("MatMul", ["n", "up"], ["u"], "up"),
        helper.make_node("MatMul", ["n", "gate"], ["g"], "gate"),
        helper.make_node("Relu", ["g"], ["r"]),
        helper.make_node("Mul", ["u", "r"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("Gemm", ["t", "down", "bias"], ["y"], "down", transB=1),
    ]
    tensors = [
        _tensor("words", WORDS, WIDTH), _ones("gain", WIDTH), _tensor("shift", WIDTH), _tensor("up", WIDTH, HIDDEN),
        _tensor("gate", WIDTH, HIDDEN), _tensor("down", WIDTH, HIDDEN), _tensor("bias", WIDTH),
    ]  # fmt: skip
    gain = np.ones(WIDTH, np.float32)
    gain[::24] = 15  # a few inputs of the products are far more active, as in trained transformers
    tensors[1] = numpy_helper.from_array(gain, "gain")
    return _model(nodes, tensors, {"ids": [ROWS]}, {"y": [ROWS, WIDTH]})


def _samples(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"ids": rng.integers(0, WORDS, ROWS)} for _ in range(count)]


def _run(program: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, inputs)[0]
    return result


def _sqnr(model: Model, quantized: Model) -> float:
    pairs = [(_run(model.program, one), _run(quantized.program, one)) for one in _samples(20, seed=9)]
    signal = sum(float((a**2).sum()) for a, _ in pairs)
    return 10 * float(np.log10(signal / sum(float(((a - b) ** 2).sum()) for a, b in pairs)))


def _types(model: Model) -> list[str]:
    return [node.op_type for node in model.program.graph.node]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_the_runtime_computes_with_the_weights_on_the_grid(bits: int, is_symmetric: bool) -> None:
    model = _perceptron()
    before = model.program.SerializeToString()
    options = Options(bits, 32, "rtn", is_symmetric, 1, 64, embedding_bits=bits, smallest=512)

    quantized = quantize_weights.apply(model, Order(options=options)).model

    assert model.program.SerializeToString() == before
    assert [_types(quantized).count(kind) for kind in ("MatMulNBits", "GatherBlockQuantized", "Gemm")] == [
        3,
        1,
        0,
    ]
    grid = Grid(bits, 32, is_symmetric)
    by_hand = onnx.ModelProto()
    by_hand.CopyFrom(model.program)
    for tensor in by_hand.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name in ("up", "gate"):
            values = rtn.quantize(values.T, grid).floats(WIDTH).T
        elif tensor.name == "down":
            values = rtn.quantize(values, grid).floats(HIDDEN)
        elif tensor.name == "words":
            values = (mse if bits == 4 else rtn).quantize(values, grid).floats(WIDTH)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
    for one in _samples(3):
        np.testing.assert_allclose(_run(quantized.program, one), _run(by_hand, one), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_narrow_products_are_stored_in_4_bits_and_computed_in_float(is_symmetric: bool) -> None:
    model = _perceptron()
    options = Options(4, 32, "rtn", is_symmetric, skip_k_below=1 << 20, embedding_bits=8, smallest=512)

    quantized = quantize_weights.apply(model, Order(options=options)).model

    assert "MatMulNBits" not in _types(quantized)
    grid = Grid(4, 32, is_symmetric)
    by_hand = onnx.ModelProto()
    by_hand.CopyFrom(model.program)
    for tensor in by_hand.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name in ("up", "gate"):
            values = rtn.quantize(values.T, grid).floats(WIDTH).T
        elif tensor.name == "down":
            values = rtn.quantize(values, grid).floats(HIDDEN)
        elif tensor.name == "words":
            values = rtn.quantize(values, Grid(8, 32, is_symmetric)).floats(WIDTH)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
    for one in _samples(3):
        wanted = _run(by_hand, one)
        assert (
            np.abs(_run(quantized.program, one) - wanted).max() < 2e-3 * np.abs(wanted).max()
        )  # half scales


def test_a_small_product_that_makes_the_output_keeps_8_bits() -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "wide", "b"], ["h"], "wide", transB=1),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "head", "c"], ["y"], "head", transB=1),
    ]
    tensors = [_tensor("wide", 1024, 512), _ones("b", 1024), _tensor("head", 8, 1024), _ones("c", 8)]
    model = _model(nodes, tensors, {"x": [1, 512]}, {"y": [1, 8]})

    result = quantize_weights.apply(model, Order(options=Options(method="rtn")))

    assert _types(result.model).count("MatMulNBits") == 1
    kept = next(tensor for tensor in result.model.program.graph.initializer if tensor.name == "head_q")
    assert kept.data_type == TensorProto.INT8
    assert any("1 weights stored in int8" in note for note in result.notes)


def test_integer_products_stay_close_and_the_file_shrinks() -> None:
    model = _perceptron()
    options = Options(method="mse", group=32, skip_k_below=64, embedding_bits=4)

    result = quantize_weights.apply(model, Order(options=options))

    assert _sqnr(model, result.model) > 7  # 4 bits everywhere: about 20 dB a weight, three in a row
    assert result.model.program.ByteSize() < 0.2 * model.program.ByteSize()
    assert result.notes[0] == "1 tables in 4 bits"
    assert "3 matrix weights in 4 bits, groups of 32, symmetric, by mse" in result.notes[1]
    assert f"{result.model.program.ByteSize():,} after" in result.notes[-1]


def test_methods_that_see_samples_beat_nearest() -> None:
    model = _perceptron()
    got = {}
    for method in ("rtn", "gptq", "awq"):
        options = Options(method=method, group=32, skip_k_below=64, embedding_bits=8, samples=60)
        walked = []
        order = Order(samples=_samples(80), options=options, on_sample=lambda: walked.append(1))  # noqa: B023
        result = quantize_weights.apply(model, order)
        got[method] = _sqnr(model, result.model)
        assert len(walked) == quantize_weights.walks(order, 80) == (0 if method == "rtn" else 60)
        if method == "awq":
            assert any(
                "AWQ could not scale 1 inputs without a new operator: t" in note for note in result.notes
            )
    assert got["gptq"] > got["rtn"] + 1
    assert got["awq"] > got["rtn"] + 0.5


def test_awq_scales_through_the_reshapes_that_the_optimizer_puts_before_products() -> None:
    nodes = [
        helper.make_node("Gather", ["words", "ids"], ["e"], "embed"),
        helper.make_node("LayerNormalization", ["e", "gain", "shift"], ["n"], "norm", axis=-1),
        *[
            node
            for name in ("up", "gate")
            for node in (
                helper.make_node("MatMul", ["n", name], [f"{name}_m"], name),
                helper.make_node("Add", [f"{name}_m", "bias"], [f"{name}_y"], f"{name}_add"),
            )
        ],
        helper.make_node("Mul", ["up_y", "gate_y"], ["y"]),
    ]
    gain = np.ones(WIDTH, np.float32)
    gain[::24] = 15
    tensors = [
        _tensor("words", WORDS, WIDTH), numpy_helper.from_array(gain, "gain"), _tensor("shift", WIDTH),
        _tensor("up", WIDTH, HIDDEN), _tensor("gate", WIDTH, HIDDEN), _tensor("bias", HIDDEN),
    ]  # fmt: skip
    model = _model(nodes, tensors, {"ids": [1, ROWS]}, {"y": [1, ROWS, HIDDEN]})
    assert [node.op_type for node in fold(model.program).graph.node].count("Reshape") >= 2
    got = {}
    for method in ("mse", "awq"):
        options = Options(method=method, group=32, skip_k_below=64, smallest=10**6)
        samples = [{"ids": one["ids"][None]} for one in _samples(30)]
        result = quantize_weights.apply(model, Order(samples=samples, options=options))
        assert _types(result.model).count("MatMulNBits") == 2
        assert not any("could not scale" in note for note in result.notes)
        pairs = [(_run(model.program, one), _run(result.model.program, one)) for one in samples]
        got[method] = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    assert got["awq"] < 0.8 * got["mse"]


def test_a_memory_limit_changes_the_walks_and_not_the_weights() -> None:
    programs = []
    for mib in (1, 1024):
        options = Options(method="gptq", group=32, skip_k_below=64, moments_mib=mib, samples=8)
        quantize_weights.MIB, old = (1 << 12 if mib == 1 else 1 << 20), quantize_weights.MIB
        try:
            order = Order(samples=_samples(8), options=options)
            programs.append(quantize_weights.apply(_perceptron(), order).model.program)
        finally:
            quantize_weights.MIB = old
    assert programs[0] == programs[1]


def test_samples_that_are_missing_are_asked_for() -> None:
    with pytest.raises(RecipeError, match="calibration"):
        quantize_weights.apply(_perceptron(), Order(options=Options(skip_k_below=64)))


def test_excluded_layers_stay_in_float_and_are_named() -> None:
    result = quantize_weights.apply(_perceptron(), Order(exclude=("down", "Gather"), options=SMALL))
    assert _types(result.model).count("Gemm") == 1
    assert "Gather" in _types(result.model)
    assert "in float: down (excluded by the recipe)" in result.notes[-1]


def _recurrent() -> Model:
    """A convolution over time, an LSTM with one unit far larger than the others, a narrow product."""
    gates = _tensor("gates", 1, 128, 24)
    uneven = numpy_helper.to_array(gates).copy()
    uneven[0, ::32] *= 20
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], "conv", pads=[1, 1]),
        helper.make_node("Transpose", ["c"], ["s"], perm=[2, 0, 1]),
        helper.make_node("LSTM", ["s", "gates", "again"], ["", "last"], "lstm", hidden_size=32),
        helper.make_node("Squeeze", ["last", "zero"], ["q"]),
        helper.make_node("MatMul", ["q", "head"], ["y"], "head"),
    ]
    tensors = [
        _tensor("kernel", 24, 16, 3), numpy_helper.from_array(uneven, "gates"), _tensor("again", 1, 128, 32),
        numpy_helper.from_array(np.array([0]), "zero"), _tensor("head", 32, 16),
    ]  # fmt: skip
    return _model(nodes, tensors, {"x": [1, 16, 10]}, {"y": [1, 16]})


def _waves(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    return [{"x": rng.normal(size=(1, 16, 10)).astype(np.float32)} for _ in range(count)]


def _wave_sqnr(program: Any, quantized: Any) -> float:
    pairs = [(_run(program, one), _run(quantized, one)) for one in _waves(20)]
    return 10 * float(
        np.log10(sum((a**2).sum() for a, _ in pairs) / sum(((a - b) ** 2).sum() for a, b in pairs))
    )


def test_recurrent_nets_run_in_integers_and_the_rest_is_stored_in_int8() -> None:
    model = _recurrent()

    result = quantize_weights.apply(model, Order(options=SMALL))

    assert _types(result.model).count("DynamicQuantizeLSTM") == 1
    assert _types(result.model)[:2] == ["Cast", "Mul"]
    assert _types(result.model).count("BitShift") == 1  # the narrow product
    assert result.model.program.ByteSize() < 0.4 * model.program.ByteSize()
    coarse = onnx.ModelProto()
    coarse.CopyFrom(model.program)
    gates = next(tensor for tensor in coarse.graph.initializer if tensor.name == "gates")
    values = numpy_helper.to_array(gates)
    step = np.abs(values).max() / 127
    gates.CopyFrom(numpy_helper.from_array((np.rint(values / step) * step).astype(np.float32), "gates"))
    ours, one_scale = (_wave_sqnr(model.program, program) for program in (result.model.program, coarse))
    assert ours > 15
    assert ours > one_scale + 3  # a scale for each gate of each unit: the large units spoil no other
    assert any("1 weights stored in int8" in note for note in result.notes)
    assert any("1 of them of fewer than 64 inputs" in note for note in result.notes)


def test_stored_weights_are_unpacked_when_the_model_is_loaded(tmp_path: Any) -> None:
    quantized = quantize_weights.apply(_recurrent(), Order(options=SMALL, exclude=("LSTM",))).model
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(quantized.program.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node}
    assert not {"Cast", "Mul", "Mod", "BitShift", "Concat", "Sub", "Reshape"} & left


def test_weights_in_branches_are_quantized_too() -> None:
    branches = []
    for name in ("then", "else"):
        weight = numpy_helper.to_array(_tensor(name, WIDTH, 32))
        nodes = [
            helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight)),
            helper.make_node("MatMul", ["x", "w"], ["o"], f"{name}_product"),
        ]
        output = helper.make_tensor_value_info("o", TensorProto.FLOAT, [1, 32])
        branches.append(helper.make_graph(nodes, name, [], [output]))
    nodes = [
        helper.make_node("Cast", ["rate"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], "by_rate", then_branch=branches[0], else_branch=branches[1]),
    ]
    model = _model(nodes, [], {"x": [1, WIDTH], "rate": []}, {"y": [1, 32]})

    quantized = quantize_weights.apply(model, Order(options=SMALL)).model

    assert quantized.program.ByteSize() < 0.3 * model.program.ByteSize()
    for rate in (0, 1):
        inputs = {
            "x": np.random.default_rng(2).normal(size=(1, WIDTH)).astype(np.float32),
            "rate": np.array(rate),
        }
        expected = _run(model.program, inputs)
        assert (
            np.square(_run(quantized.program, inputs) - expected).mean() < 0.03 * np.square(expected).mean()
        )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"bits": 3}, "bits must be"), ({"method": "best"}, "rtn, mse"), ({"accuracy_level": 2}, "accuracy_level"),
     ({"samples": 0}, "positive"), ({"group": 48}, "group one of")],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Options(**wrong)
