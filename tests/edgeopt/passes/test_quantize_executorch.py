# SPDX-License-Identifier: Apache-2.0
"""What an int8 ExecuTorch program is made of: the weights of every other format, our ranges, integers everywhere."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt import coverage
from edgeopt.calibrate import Calibration
from edgeopt.passes import Order, quantize_executorch, quantize_static, round_weights
from edgeopt_agent import runtimes
from edgeopt_converters import executorch_file
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError, UnsupportedError
from edgeopt_wire.manifest import Variant
from edgeopt_wire.tensor import TensorSpec

pytest.importorskip("executorch")

INT8 = Scheme("int8", "int8", True, False)
MINMAX = Calibration("minmax")
DEAD = 5
SHAPE = (1, 3, 13, 13)

Nodes = list[tuple[str, list[str], dict[str, Any]]]


def _onnx(nodes: Nodes, weights: dict[str, tuple[int, ...]], seed: int = 0) -> Model:
    """An ONNX model of nodes (type, inputs, attributes): node n writes `v{n}`; the last one is the output."""
    rng = np.random.default_rng(seed)
    made = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in weights.items()}
    if "stem" in made:
        made["stem"][DEAD] = 0
    listed = [
        helper.make_node(kind, inputs, [f"v{n}"], f"{kind}_{n}", **attributes)
        for n, (kind, inputs, attributes) in enumerate(nodes)
    ]
    tensors = [numpy_helper.from_array(values, name) for name, values in made.items()]
    limits = [
        numpy_helper.from_array(np.array(value, np.float32), name)
        for name, value in (("zero", 0.0), ("six", 6.0))
    ]
    pads = numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 0, 1, 1], np.int64), "pads")
    last = f"v{len(nodes) - 1}"
    graph = helper.make_graph(
        listed, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)], [*tensors, *limits, pads],
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    import onnx

    shaped = onnx.shape_inference.infer_shapes(program)
    program.graph.output[0].CopyFrom(shaped.graph.output[0])
    made_shape = tuple(axis.dim_value for axis in shaped.graph.output[0].type.tensor_type.shape.dim)
    spec = (TensorSpec("x", SHAPE, "float32", "NCHW"),)
    return Model("onnx", program, "net", spec, (TensorSpec(last, made_shape, "float32"),))


def _mobile() -> Model:
    """Everything that a mobile net is made of: uneven padding, ReLU6, depthwise, a residual sum, a pooled classifier."""
    nodes: Nodes = [
        ("Conv", ["x", "stem", "b1"], {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
        ("Clip", ["v0", "zero", "six"], {}),
        ("Conv", ["v1", "depth", "b1"], {"group": 16, "pads": [1, 1, 1, 1]}),
        ("Relu", ["v2"], {}),
        ("Conv", ["v3", "point", "b1"], {}),
        ("Add", ["v4", "v1"], {}),
        ("Conv", ["v5", "wide", "b2"], {}),
        ("Clip", ["v6", "zero", "six"], {}),
        ("GlobalAveragePool", ["v7"], {}),
        ("Flatten", ["v8"], {}),
        ("Gemm", ["v9", "head", "b3"], {"transB": 1}),
    ]
    weights = {
        "stem": (16, 3, 3, 3), "b1": (16,), "depth": (16, 1, 3, 3), "point": (16, 16, 1, 1), "wide": (24, 16, 1, 1),
        "b2": (24,), "head": (10, 24), "b3": (10,),
    }  # fmt: skip
    return _onnx(nodes, weights)


def _images(count: int = 8, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=SHAPE).astype(np.float32)} for _ in range(count)]


@functools.cache
def _rounded() -> Model:
    return round_weights.apply(_mobile(), Order(samples=_images(16))).model


@functools.cache
def _quantized(made: Callable[[], Model] = _rounded, exclude: tuple[str, ...] = ()) -> Model:
    order = Order(scheme=INT8, calibration=MINMAX, samples=_images(16), exclude=exclude)
    return quantize_executorch.apply(made(), order).model


def _read(model: Model, folder: Path) -> coverage.Coverage:
    file = folder / "model.pte"
    file.write_bytes(model.program)
    return coverage.read(file, "executorch")


def _outputs(model: Model, folder: Path, rows: list[dict[str, np.ndarray]]) -> np.ndarray:
    file = folder / ("model.onnx" if model.format == "onnx" else "model.pte")
    program = model.program if isinstance(model.program, bytes) else model.program.SerializeToString()
    file.write_bytes(program)
    runtime = {"onnx": "onnxruntime", "executorch": "executorch"}[model.format]
    variant = Variant("v", runtime, "int8", file.name, model.inputs, model.outputs, "", 0.0)
    session = runtimes.find(runtime).load(file, variant)
    name = model.outputs[0].name
    found = np.concatenate([session.run(row)[name].reshape(1, -1) for row in rows])
    session.close()
    return found


def _sqnr_db(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10((wanted**2).sum() / ((found - wanted) ** 2).sum()))


def _onnx_integers(program: Any) -> list[np.ndarray]:
    """The int8 weights of each product, in order, its output channels first."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in program.graph.initializer}
    makers = {name: node for node in program.graph.node for name in node.output}
    return [
        tensors[makers[node.input[1]].input[0]]
        for node in program.graph.node
        if node.op_type in ("Conv", "Gemm")
    ]


def _executorch_integers(program: bytes) -> list[np.ndarray]:
    """The same of an ExecuTorch program: (out, height, width, in), depthwise (1, height, width, out)."""
    file = executorch_file.parse(program)
    graph = executorch_file.xnnpack_graph(bytes(file.program.backend_delegate_data[0].data))
    values = {}
    for entry in graph["xvalues"]:
        value = entry["xvalue_union"].get("tensor_value", entry["xvalue_union"])
        values[value["id_out"]] = value
    found = []
    for entry in graph["xnodes"]:
        if "filter_id" not in entry["xnode_union"]:
            continue
        value = values[entry["xnode_union"]["filter_id"]]
        key = graph["constant_data"][value["constant_buffer_idx"]]["named_key"]
        stored = bytes(file.named_data.buffers[file.named_data.pte_data[key].buffer_index])
        integers = np.frombuffer(stored, np.int8)[: int(np.prod(value["dims"]))].reshape(value["dims"])
        if entry["xnode_union_type"] == "XNNDepthwiseConv2d":
            integers = integers.transpose(3, 0, 1, 2)
        elif integers.ndim == 4:
            integers = integers.transpose(0, 3, 1, 2)
        found.append(integers)
    return found


def test_everything_in_a_mobile_net_computes_in_integers(tmp_path: Path) -> None:
    found = _read(_quantized(), tmp_path)
    assert (found.integer_products, found.products) == (5, 5)
    assert found.mac_share == 1.0
    assert found.left_out == ()
    assert found.outside == ()
    assert found.conversions == 2  # the input's and the output's


def test_weights_are_the_integers_of_the_onnx_file() -> None:
    order = Order(scheme=INT8, calibration=MINMAX, samples=_images(16))
    theirs = _onnx_integers(quantize_static.apply(_rounded(), order).model.program)
    ours = _executorch_integers(_quantized().program)
    assert len(ours) == len(theirs) == 5
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, two)


def test_outputs_are_near_to_floats_and_to_onnx_runtimes_integers(tmp_path: Path) -> None:
    rows = _images(32, seed=9)
    exact = _outputs(_mobile(), tmp_path, rows)
    ours = _outputs(_quantized(), tmp_path, rows)
    order = Order(scheme=INT8, calibration=MINMAX, samples=_images(16))
    theirs = _outputs(quantize_static.apply(_rounded(), order).model, tmp_path, rows)
    assert _sqnr_db(ours, exact) > 25
    # the same integers meet other roundings of their sums, and our logits are on a grid where theirs are floats
    assert _sqnr_db(ours, theirs) > 32
    assert _sqnr_db(ours, exact) > _sqnr_db(theirs, exact) - 2


def test_a_channel_without_weights_keeps_its_bias(tmp_path: Path) -> None:
    def lone() -> Model:
        nodes: Nodes = [("Conv", ["x", "stem", "b1"], {})]
        return _onnx(nodes, {"stem": (16, 3, 3, 3), "b1": (16,)})

    rows = _images(4, seed=3)
    exact = _outputs(lone(), tmp_path, rows).reshape(4, 16, -1)[:, DEAD]
    found = _outputs(_quantized(lone), tmp_path, rows).reshape(4, 16, -1)[:, DEAD]
    np.testing.assert_allclose(found, exact, atol=0.03)  # one step of the output's grid


def test_the_output_keeps_its_whole_range(tmp_path: Path) -> None:
    samples = _images(64)
    samples[40]["x"] = samples[40]["x"] * 6
    model = quantize_executorch.apply(
        _rounded(), Order(scheme=INT8, calibration=Calibration("percentile", 99.0), samples=samples)
    ).model
    floats = _outputs(_mobile(), tmp_path, samples)
    wanted, found = floats.max(), _outputs(model, tmp_path, samples).max()
    inner = np.sort(floats.max(axis=1))[-2]
    assert wanted > inner
    assert found > inner


def test_the_same_input_gives_the_same_bytes() -> None:
    order = Order(scheme=INT8, calibration=MINMAX, samples=_images(16))
    assert quantize_executorch.apply(_rounded(), order).model.program == _quantized().program


def test_what_is_excluded_stays_float_and_is_told(tmp_path: Path) -> None:
    order = Order(scheme=INT8, calibration=MINMAX, samples=_images(4), exclude=("role:depthwise",))
    result = quantize_executorch.apply(_rounded(), order)
    found = _read(result.model, tmp_path)
    assert result.notes == ("left in float by the recipe: role:depthwise",)
    assert [left.type for left in found.left_out_products] == ["DepthwiseConv2d"]
    assert "though the XNNPACK delegate has DepthwiseConv2d in int8" in found.left_out_products[0].reason
    with pytest.raises(RecipeError, match="no operator of name or type 'Convv'"):
        quantize_executorch.apply(_rounded(), replace(order, exclude=("Convv",)))


def test_a_gate_computes_in_floats_between_integers(tmp_path: Path) -> None:
    def gated() -> Model:
        nodes: Nodes = [
            ("Conv", ["x", "stem", "b1"], {}),
            ("GlobalAveragePool", ["v0"], {}),
            ("Conv", ["v1", "point", "b1"], {}),
            ("Sigmoid", ["v2"], {}),
            ("Mul", ["v0", "v3"], {}),
        ]
        return _onnx(nodes, {"stem": (16, 3, 3, 3), "b1": (16,), "point": (16, 16, 1, 1)})

    found = _read(_quantized(gated), tmp_path)
    assert found.integer_products == found.products == 2
    assert [(left.type, left.cause) for left in found.left_out] == [("Sigmoid", "no integer kernel")]
    rows = _images(8, seed=4)
    assert _sqnr_db(_outputs(_quantized(gated), tmp_path, rows), _outputs(gated(), tmp_path, rows)) > 30


def test_concatenated_values_share_a_grid_and_a_selecting_pool_keeps_it(tmp_path: Path) -> None:
    def joined() -> Model:
        nodes: Nodes = [
            ("Conv", ["x", "stem", "b1"], {}),
            ("Relu", ["v0"], {}),
            ("Conv", ["v1", "point", "b1"], {}),
            ("Concat", ["v1", "v2"], {"axis": 1}),
            ("MaxPool", ["v3"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
            ("Conv", ["v4", "narrow", "b2"], {}),
        ]
        weights = {"stem": (16, 3, 3, 3), "b1": (16,), "point": (16, 16, 1, 1), "narrow": (4, 32, 1, 1), "b2": (4,)}  # fmt: skip
        return _onnx(nodes, weights)

    found = _read(_quantized(joined), tmp_path)
    assert found.left_out == ()
    assert found.conversions == 2
    rows = _images(8, seed=4)
    assert _sqnr_db(_outputs(_quantized(joined), tmp_path, rows), _outputs(joined(), tmp_path, rows)) > 28


def test_a_clamp_that_others_read_past_is_not_folded_away(tmp_path: Path) -> None:
    def forked() -> Model:
        nodes: Nodes = [
            ("Conv", ["x", "stem", "b1"], {}),
            ("Relu", ["v0"], {}),
            ("Add", ["v0", "v1"], {}),
        ]
        return _onnx(nodes, {"stem": (16, 3, 3, 3), "b1": (16,)})

    assert _read(_quantized(forked), tmp_path).left_out == ()
    rows = _images(8, seed=4)
    assert _sqnr_db(_outputs(_quantized(forked), tmp_path, rows), _outputs(forked(), tmp_path, rows)) > 30


def test_an_added_constant_is_on_a_grid_of_its_own(tmp_path: Path) -> None:
    def shifted() -> Model:
        nodes: Nodes = [
            ("Conv", ["x", "stem", "b1"], {}),
            ("Relu", ["v0"], {}),
            ("Mul", ["v1", "factor"], {}),
            ("Conv", ["v2", "point", "b1"], {}),
        ]
        weights = {"stem": (16, 3, 3, 3), "b1": (16,), "factor": (1, 16, 11, 11), "point": (16, 16, 1, 1)}
        return _onnx(nodes, weights)

    assert _read(_quantized(shifted), tmp_path).left_out == ()
    rows = _images(8, seed=4)
    assert _sqnr_db(_outputs(_quantized(shifted), tmp_path, rows), _outputs(shifted(), tmp_path, rows)) > 28


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("uint8", "int8", True, False),
        Scheme("int8", "int8", False, False),
        Scheme("int8", "int8", True, True),
        Scheme("int8", "int8", True, False, io="int8"),
    ],
)
def test_a_scheme_that_xnnpack_has_not_is_refused(scheme: Scheme) -> None:
    with pytest.raises(UnsupportedError, match="quantize_executorch makes int8 weights per channel"):
        quantize_executorch.apply(_mobile(), Order(scheme=scheme, samples=_images(1)))


def test_without_a_scheme_or_samples_it_says_what_is_missing() -> None:
    with pytest.raises(RecipeError, match="needs a scheme"):
        quantize_executorch.apply(_mobile(), Order(samples=_images(1)))
    with pytest.raises(RecipeError, match="at least one sample"):
        quantize_executorch.apply(_mobile(), Order(scheme=INT8))
