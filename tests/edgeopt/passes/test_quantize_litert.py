# SPDX-License-Identifier: Apache-2.0
"""What an int8 LiteRT model is made of: the weights decided before, our ranges, whole outputs, the edges asked for."""

import functools
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.calibrate import Calibration
from edgeopt.passes import Order, quantize_litert, round_weights
from edgeopt_converters import path as conversion
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError, UnsupportedError
from edgeopt_wire.tensor import TensorSpec

pytest.importorskip("ai_edge_quantizer")

INT8 = Scheme("int8", "int8", True, False)
EDGE = Scheme("int8", "int8", True, False, io="int8")
MINMAX = Calibration("minmax")
DEAD = 5


def _onnx(*, dead: bool = True) -> Model:
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> Any:
        values = rng.normal(0, 0.3, shape).astype(np.float32)
        if name == "w1" and dead:
            values[DEAD] = 0
        return numpy_helper.from_array(values, name)

    tensors = [
        tensor("w1", 16, 3, 3, 3), tensor("b1", 16), tensor("w2", 16, 1, 3, 3), tensor("b2", 16),
        tensor("w3", 24, 16, 1, 1), tensor("b3", 24), tensor("w4", 10, 24), tensor("b4", 10),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "stem", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "depthwise", group=16, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("Conv", ["r2", "w3", "b3"], ["c3"], "pointwise"),
        helper.make_node("Relu", ["c3"], ["r3"], "relu3"),
        helper.make_node("GlobalAveragePool", ["r3"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], "classifier", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    spec = (TensorSpec("x", (1, 3, 12, 12), "float32", "NCHW"),)
    return Model("onnx", program, "net", spec, (TensorSpec("y", (1, 10), "float32"),))


def _images(count: int = 8, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(1, 3, 12, 12)).astype(np.float32)} for _ in range(count)]


@functools.cache
def _rounded() -> Model:
    return round_weights.apply(_onnx(), Order(samples=_images(16))).model


@functools.cache
def _litert() -> Model:
    return conversion.convert(_rounded(), "litert")


def _samples(count: int = 8, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """The images in the LiteRT model's own layout."""
    spec = _litert().inputs[0]
    axes = (0, 2, 3, 1) if spec.shape[-1] == 3 else (0, 1, 2, 3)
    return [{spec.name: np.ascontiguousarray(row["x"].transpose(axes))} for row in _images(count, seed)]


def _result(scheme: Scheme = INT8, calibration: Calibration = MINMAX, **more: Any) -> Any:
    return quantize_litert.apply(_litert(), Order(scheme, calibration, **({"samples": _samples()} | more)))


@functools.cache
def _quantized(scheme: Scheme = INT8, calibration: Calibration = MINMAX) -> Model:
    found: Model = _result(scheme, calibration).model
    return found


def _graph(model: Model) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(model.program, 0))


def _constants(model: Model) -> list[tuple[np.ndarray, Any]]:
    """Every constant int8 tensor with its quantization."""
    from ai_edge_litert import schema_py_generated as schema

    parsed = _graph(model)
    return [
        (np.frombuffer(bytes(parsed.buffers[t.buffer].data), np.int8).reshape(t.shape), t.quantization)
        for t in parsed.subgraphs[0].tensors
        if t.type == schema.TensorType.INT8 and parsed.buffers[t.buffer].data is not None
    ]


def _run(model: Model, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=model.program, num_threads=1)
    interpreter.allocate_tensors()
    entry, leave = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    rows = []
    for sample in samples:
        values = next(iter(sample.values()))
        if entry["dtype"] != np.float32:
            scale, zero = entry["quantization"]
            values = np.clip(np.rint(values / scale) + zero, -128, 127).astype(entry["dtype"])
        interpreter.set_tensor(entry["index"], values)
        interpreter.invoke()
        rows.append(interpreter.get_tensor(leave["index"]).copy())
    found = np.concatenate(rows)
    if leave["dtype"] != np.float32:
        scale, zero = leave["quantization"]
        found = (found.astype(np.float32) - zero) * scale
    return found


def _sqnr_db(found: np.ndarray, exact: np.ndarray) -> float:
    return float(10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum()))


def _expected(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A layer's rounded weights as integers, channel by channel, and their scales."""
    weight = next(t for t in _rounded().program.graph.initializer if t.name == name)
    values = numpy_helper.to_array(weight).astype(np.float64)
    if values.ndim == 4:
        values = values.transpose(0, 2, 3, 1)  # LiteRT's order
    rows = values.reshape(len(values), -1)
    scales = np.abs(rows).max(1) / 127
    return np.rint(rows / np.where(scales > 0, scales, 1)[:, None]), scales


@pytest.mark.parametrize("name", ["w1", "w2", "w3", "w4"])
def test_integers_are_the_rounded_weights_and_scales_their_largest(name: str) -> None:
    integers, scales = _expected(name)
    matches = []
    for values, quantization in _constants(_quantized()):
        axis = quantization.quantizedDimension
        rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        alive = scales > 0
        if rows.shape == integers.shape and np.array_equal(rows[alive], integers[alive]):
            np.testing.assert_allclose(quantization.scale[alive], scales[alive], rtol=1e-5)
            assert not np.any(quantization.zeroPoint)
            assert not rows[~alive].any()
            matches.append(rows)
    assert len(matches) == 1


def test_a_dead_channel_is_zero_and_its_scale_is_finite() -> None:
    for values, quantization in _constants(_quantized()):
        assert np.isfinite(quantization.scale).all()
        assert (np.asarray(quantization.scale) > 0).all()
        assert values.dtype == np.int8
    assert np.isfinite(_run(_quantized(), _samples(seed=5))).all()


@pytest.mark.parametrize("scheme", [INT8, EDGE], ids=["float edges", "int8 edges"])
def test_it_says_nearly_what_the_float_model_says(scheme: Scheme) -> None:
    unseen = _samples(32, seed=9)
    assert _sqnr_db(_run(_quantized(scheme), unseen), _run(_litert(), unseen)) > 22


def test_float_edges_keep_the_models_own_inputs_and_outputs() -> None:
    found = _quantized()
    assert (found.inputs, found.outputs) == (_litert().inputs, _litert().outputs)


def test_int8_edges_are_told_with_their_scales() -> None:
    found = _quantized(EDGE)
    for spec, plain in zip(
        (*found.inputs, *found.outputs), (*_litert().inputs, *_litert().outputs), strict=True
    ):
        assert (spec.dtype, spec.shape, spec.name) == ("int8", plain.shape, plain.name)
        assert spec.affine is not None
    images = np.stack([next(iter(sample.values())) for sample in _samples()])
    affine = found.inputs[0].affine
    assert affine is not None
    assert affine.scale == pytest.approx((images.max() - images.min()) / 255, rel=1e-4)
    assert -128 <= affine.zero_point <= 127


def test_no_float_is_left_between_int8_edges() -> None:
    from ai_edge_litert import schema_py_generated as schema

    tensors = _graph(_quantized(EDGE)).subgraphs[0].tensors
    assert [t.name for t in tensors if t.type == schema.TensorType.FLOAT32] == []


def test_a_percentile_clips_inside_and_leaves_the_output_whole() -> None:
    """The output's grid goes from the smallest to the largest logit of the samples, whatever is clipped before it."""
    exact = _run(_litert(), _samples())
    tight, whole = _quantized(EDGE, Calibration("percentile", 90.0)), _quantized(EDGE)
    for model in (tight, whole):
        affine = model.outputs[0].affine
        assert affine is not None
        low, high = (affine.scale * (edge - affine.zero_point) for edge in (-128, 127))
        assert low == pytest.approx(min(exact.min(), 0), abs=affine.scale)
        assert high == pytest.approx(max(exact.max(), 0), abs=affine.scale)
    assert tight.inputs[0].affine is not None
    assert whole.inputs[0].affine is not None
    assert tight.inputs[0].affine.scale < 0.8 * whole.inputs[0].affine.scale


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("uint8", "int8", True, False),
        Scheme("int8", "uint8", True, False),
        Scheme("int8", "int8", False, False),
    ],
    ids=["uint8 activations", "uint8 weights", "per tensor"],
)
def test_a_scheme_it_cannot_do_is_refused_with_what_it_can(scheme: Scheme) -> None:
    with pytest.raises(UnsupportedError, match="int8 weights per channel"):
        _result(scheme)


def test_no_scheme_and_no_samples_are_refused() -> None:
    with pytest.raises(RecipeError, match="scheme"):
        quantize_litert.apply(_litert(), Order(samples=_samples()))
    with pytest.raises(RecipeError, match="calibration"):
        _result(samples=())


def test_the_model_given_stays_and_two_runs_give_the_same_bytes() -> None:
    before = bytes(_litert().program)
    assert _result().model.program == _result().model.program
    assert _litert().program == before


def _pooled(stride: int) -> Model:
    """A pool with padding of values that are nearly all negative."""
    import torch

    from edgeopt_converters.torch_program import program_model

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
            torch.nn.init.constant_(self.conv.bias, -2.0)
            self.head = torch.nn.Conv2d(8, 4, 3)

        def forward(self, x: Any) -> Any:
            pooled = torch.nn.functional.max_pool2d(self.conv(x), 3, stride, 1)
            return self.head(pooled).flatten(1)

    program = torch.export.export(Net().eval(), (torch.randn(1, 3, 12, 12),))
    return conversion.convert(program_model(program, name="pooled"), "litert")


@pytest.mark.parametrize(("stride", "pads"), [(2, ["PADV2"]), (1, [])], ids=["padded", "the pool's own"])
def test_max_pools_of_negative_values_are_exact_in_integers(stride: int, pads: list[str]) -> None:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    from edgeopt_converters.litert_graph import type_names

    model = _pooled(stride)
    name = model.inputs[0].name
    samples = [{name: row["x"].transpose(0, 2, 3, 1).copy()} for row in _images()]
    made = quantize_litert.apply(model, Order(INT8, MINMAX, samples=samples)).model
    parsed = _graph(made)
    kinds = type_names(parsed)
    assert [kind for kind in kinds if kind.startswith("PAD")] == pads
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(
        model_content=made.program,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=plain,
    )
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], samples[0][name])
    interpreter.invoke()
    pool = parsed.subgraphs[0].operators[kinds.index("MAX_POOL_2D")]
    conv = parsed.subgraphs[0].operators[kinds.index("CONV_2D")]
    before, after = (interpreter.get_tensor(int(entry.outputs[0]))[0] for entry in (conv, pool))
    around = np.pad(
        before.astype(int), ((1, 1), (1, 1), (0, 0)), constant_values=-1000
    )  # below every integer
    windows = np.lib.stride_tricks.sliding_window_view(around, (3, 3), axis=(0, 1))[::stride, ::stride]
    assert before.dtype == after.dtype == np.int8
    np.testing.assert_array_equal(after, windows.max(axis=(-2, -1)))
    error = _run(made, samples) - _run(model, samples)
    assert 10 * np.log10((_run(model, samples) ** 2).mean() / (error**2).mean()) > 30
