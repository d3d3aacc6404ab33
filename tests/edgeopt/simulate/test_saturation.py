# SPDX-License-Identifier: Apache-2.0
"""What a model loses on x86 without VNNI, which layers are to blame, and that narrower weights cure them."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from edgeopt.calibrate import Calibration
from edgeopt.onnx_graphs import fold, observer
from edgeopt.passes import Order, quantize_static
from edgeopt.simulate.saturation import (
    CEILING_DB,
    Advice,
    SaturationReport,
    WeightRanges,
    check_saturation,
    narrow_ranges,
    seven_bit_layers,
    weight_layers,
)
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError, UnsupportedError
from edgeopt_wire.tensor import TensorSpec

U8S8 = Scheme("uint8", "int8", True, False)
S8S8 = Scheme("int8", "int8", True, True)
SHAPE = (1, 8, 10, 10)


def net(first: np.ndarray, second: np.ndarray, classifier: np.ndarray) -> Model:
    """Two convolutions with a depthwise one between, and a classifier."""
    rng = np.random.default_rng(5)
    depthwise = rng.normal(0, 0.4, (len(first), 1, 3, 3))
    arrays = {"w1": first, "wd": depthwise, "w2": second, "w3": classifier, "b3": np.zeros(len(classifier))}
    tensors = [numpy_helper.from_array(v.astype(np.float32), name) for name, v in arrays.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "wd"], ["cd"], "depthwise", group=len(first), pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["cd"], ["rd"]),
        helper.make_node("Conv", ["rd", "w2"], ["c2"], "second"),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "classifier", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, len(classifier)])], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(program)
    specs = TensorSpec("x", SHAPE, "float32"), TensorSpec("y", (1, len(classifier)), "float32")
    return Model("onnx", program, "net", (specs[0],), (specs[1],))


def saturating() -> Model:
    """Large weights of one sign next to each other, in every layer."""
    rng = np.random.default_rng(1)
    first = rng.uniform(0.7, 1.0, (16, 8, 3, 3)) * np.where(np.arange(16) % 3, 1, -1)[:, None, None, None]
    second = rng.uniform(0.6, 1.0, (32, 16, 1, 1)) * np.sign(rng.normal(size=(32, 1, 1, 1)))
    return net(first, second, rng.normal(0, 1, (10, 32)))


def harmless() -> Model:
    """Neighbouring channels have opposite signs, so no pair can overflow."""
    rng = np.random.default_rng(2)

    def weights(*shape: int) -> np.ndarray:
        signs = np.where(np.arange(shape[1]) % 2, 1, -1).reshape(1, -1, *(1,) * (len(shape) - 2))
        return np.asarray(rng.uniform(0.5, 1.0, shape) * signs)

    return net(weights(16, 8, 3, 3), weights(32, 16, 1, 1), weights(10, 32))


def bright(count: int = 4, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.beta(4, 1, SHAPE).astype(np.float32)} for _ in range(count)]


def quantized(model: Model, scheme: Scheme = U8S8) -> Model:
    return quantize_static.apply(model, Order(scheme, Calibration("minmax"), bright(8, seed=1))).model


def narrowed(model: Model, layers: tuple[str, ...]) -> Model:
    """Quantize with the runtime's own quantizer, the weights of some layers in safe ranges."""
    program = fold(model.program)
    overrides = {
        weight: [
            {"axis": ranges.axis, "quant_type": QuantType.QInt8, "symmetric": True}
            | {"rmin": np.float32(-end), "rmax": np.float32(end)}
            for end in ranges.magnitudes
        ]
        for weight, ranges in narrow_ranges(program, layers).items()
    }
    extremes: dict[str, tuple[float, float]] = {}
    for sample in bright(8, seed=1):
        for name, values in observer(program)(sample):
            low, high = extremes.get(name, (0.0, 0.0))
            extremes[name] = min(low, float(values.min())), max(high, float(values.max()))
    data = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in extremes.items()
    }
    quantizer = QDQQuantizer(
        program,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data),
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"],
        extra_options={"WeightSymmetric": True, "TensorQuantOverrides": overrides},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    return Model("onnx", quantizer.model.model, model.name, model.inputs, model.outputs)


def by_name(report: SaturationReport) -> dict[str, Any]:
    return {layer.name: layer for layer in report.layers}


def test_a_net_of_large_weights_of_one_sign_loses_its_answers() -> None:
    model = saturating()
    report = check_saturation(quantized(model), bright(), original=model)
    layers = by_name(report)
    assert layers["first"].share > 0.5
    assert layers["first"].worst_sum > 32767
    assert layers["first"].sqnr_db < 20
    assert layers["first"].advice is Advice.NARROW
    assert report.sqnr_db < 20
    assert report.exact_sqnr_db is not None
    assert report.saturated_sqnr_db is not None
    assert report.saturated_sqnr_db < report.exact_sqnr_db - 10
    assert "first" in report.sentence()


def test_depthwise_layers_never_saturate() -> None:
    layer = by_name(check_saturation(quantized(saturating()), bright(1)))["depthwise"]
    assert not layer.can_saturate
    assert layer.advice is Advice.NOTHING
    assert layer.sqnr_db == CEILING_DB


def test_seven_bits_where_they_are_needed_cure_it() -> None:
    model = saturating()
    broken = check_saturation(quantized(model), bright(), original=model)
    cured = check_saturation(narrowed(model, seven_bit_layers(broken)), bright(), original=model)
    assert seven_bit_layers(cured) == ()
    assert not any(layer.clipped for layer in cured.layers if layer.name in seven_bit_layers(broken))
    assert cured.sqnr_db > broken.sqnr_db + 20


def test_narrowing_all_that_can_saturate_is_safe_for_every_input() -> None:
    model = saturating()
    broken = check_saturation(quantized(model), bright())
    safe = narrowed(model, seven_bit_layers(broken, math.inf))
    report = check_saturation(safe, _never(), original=model)
    assert report.is_safe
    assert report.samples == 0
    exact = check_saturation(quantized(model), bright(), original=model).exact_sqnr_db
    assert exact is not None
    assert sqnr_db(model, safe) > exact - 6.1, "seven bits cost at most one bit"


def test_a_net_that_cannot_saturate_is_left_alone_without_looking_at_samples() -> None:
    report = check_saturation(quantized(harmless()), _never())
    assert report.is_safe
    assert report.sqnr_db == CEILING_DB
    assert seven_bit_layers(report, math.inf) == ()
    assert all(layer.worst_sum <= 32767 for layer in report.layers)
    assert "none of 4" in report.sentence()


def test_ranges_of_harmless_weights_are_what_they_are_anyway() -> None:
    model = harmless()
    ranges = narrow_ranges(model.program, ["first", "second", "classifier"])
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.program.graph.initializer}
    for name, found in ranges.items():
        flat = np.abs(weights[name]).reshape(len(weights[name]), -1)
        assert found.magnitudes == tuple(flat.max(axis=1).tolist())


def test_signed_activations_do_not_help_on_x86() -> None:
    report = check_saturation(quantized(saturating(), S8S8), bright())
    assert by_name(report)["first"].share > 0.5


def test_a_dynamically_quantized_product_is_judged_too(tmp_path: Path) -> None:
    weights = np.abs(np.random.default_rng(4).normal(0, 1, (64, 16))).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "dynamic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5, 16])],
        [numpy_helper.from_array(weights, "w")],
    )
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    files = tmp_path / "float.onnx", tmp_path / "dynamic.onnx"
    onnx.save(program, files[0])
    quantize_dynamic(*files, per_channel=True, weight_type=QuantType.QInt8)
    specs = TensorSpec("x", (1, 5, 64), "float32"), TensorSpec("y", (1, 5, 16), "float32")
    model = Model("onnx", onnx.load(files[1]), "dynamic", (specs[0],), (specs[1],))
    sample = {"x": np.random.default_rng(5).beta(5, 1, (1, 5, 64)).astype(np.float32)}
    (layer,) = check_saturation(model, [sample]).layers
    assert layer.op_type == "MatMulInteger"
    assert layer.clipped > 0
    assert layer.sqnr_db < 40


def test_dark_inputs_are_to_be_watched_not_narrowed() -> None:
    dark = [{"x": 0.2 * sample["x"]} for sample in bright()]
    layer = by_name(check_saturation(quantized(saturating()), dark))["first"]
    assert (layer.clipped, layer.advice) == (0, Advice.WATCH)


def test_depthwise_layers_keep_their_ranges() -> None:
    assert narrow_ranges(saturating().program, ["depthwise"]) == {}


def test_layers_with_a_weight_matrix_are_listed() -> None:
    program = saturating().program
    assert weight_layers(program) == ("first", "depthwise", "second", "classifier")
    product = helper.make_node("MatMul", ["c1", "r1"], ["s"], "of activations")
    program.graph.node.append(product)
    assert weight_layers(program) == ("first", "depthwise", "second", "classifier")


def test_narrowing_every_layer_at_once_needs_no_samples() -> None:
    model = saturating()
    assert check_saturation(narrowed(model, weight_layers(fold(model.program))), _never()).is_safe


def test_a_shared_weight_gets_the_widest_range_that_it_needs() -> None:
    tensors = [numpy_helper.from_array(np.array([[1.0], [1.0], [0.5]], np.float32), "w")]
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["c"], "product"),
        helper.make_node("Gemm", ["b", "w"], ["d"], "other", transB=1),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n]) for name, n in (("a", 3), ("b", 1))
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n]) for name, n in (("c", 1), ("d", 3))
    ]
    program = helper.make_model(helper.make_graph(nodes, "shared", inputs, outputs, tensors))
    assert narrow_ranges(program, ["product"])["w"] == WeightRanges(1, (2.0,))
    with pytest.raises(UnsupportedError, match="along different axes"):
        narrow_ranges(program, ["product", "other"])


def test_mistakes_are_named() -> None:
    model = saturating()
    with pytest.raises(RecipeError, match="at least one sample"):
        check_saturation(quantized(model), [])
    with pytest.raises(RecipeError, match="first"):
        narrow_ranges(model.program, ["frist"])
    with pytest.raises(UnsupportedError, match="litert"):
        check_saturation(Model("litert", b"", "net", model.inputs, model.outputs), bright())


def sqnr_db(original: Model, candidate: Model) -> float:
    """Of the exact integers against the float model."""
    import onnxruntime as ort

    from edgeopt.simulate.integer import IntegerNet

    session = ort.InferenceSession(original.program.SerializeToString(), providers=["CPUExecutionProvider"])
    signal = noise = 0.0
    for sample in bright():
        expected = session.run(None, sample)[0].astype(np.float64)
        found = IntegerNet(candidate.program).run(sample).outputs["y"]
        signal, noise = signal + (expected**2).sum(), noise + ((expected - found) ** 2).sum()
    return float(10 * np.log10(signal / noise))


def _never() -> Iterator[Mapping[str, np.ndarray]]:
    raise AssertionError("the samples were walked")
    yield {}
