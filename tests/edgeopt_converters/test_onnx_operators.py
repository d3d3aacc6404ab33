# SPDX-License-Identifier: Apache-2.0
"""Every operator of `onnx_to_torch` gives what ONNX's official node tests say, or refuses by name; never a wrong answer."""

import functools
import warnings
from collections import defaultdict

import numpy as np
import pytest

from edgeopt_wire.errors import UnsupportedError

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from edgeopt_converters.onnx_module import build_module  # noqa: E402
from edgeopt_converters.onnx_ops import table  # noqa: E402

RELATIVE, ABSOLUTE = 1e-3, 1e-5  # what ONNX's own backend test runner allows
FOLDED = {"Constant", "Shape", "Size"}
PARAMETERS = ("Resize", "Clip", "Pad", "OneHot")
WITHOUT_OFFICIAL_CASE = {
    "Upsample": "opset 9 and before only; onnx_file brings those files to Resize",
    "GlobalLpPool": "ONNX has no node test of it; compared with ONNX Runtime below",
    "GRU": "ONNX's node tests all use linear_before_reset 0; compared with ONNX Runtime below",
}


@functools.cache
def official_cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    found = defaultdict(list)
    known = {*table(), *FOLDED}
    for case in cases:
        types = {node.op_type for node in case.model.graph.node}
        arrays = [value for values in case.data_sets for side in values for value in side]
        if types <= known and all(_torch_has(array) for array in arrays):
            for kind in types:
                found[kind].append(case)
    return found


def _torch_has(value):
    return (
        isinstance(value, np.ndarray | np.generic)
        and value.dtype.kind in "fiub"
        and value.dtype.isbuiltin == 1
    )  # not bfloat16 and its like


def _run(case, inputs):
    """What a model would hold as constants (axes, shapes, sizes) becomes a constant; the rest are inputs."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    kind = model.graph.node[0].op_type
    kept, arguments = [], []
    for position, (value, array) in enumerate(zip(case.model.graph.input, inputs, strict=True)):
        is_parameter = array.ndim <= 1 and (array.dtype.kind in "iu" or kind in PARAMETERS)
        if position > 0 and is_parameter:
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        else:
            kept.append(value)
            arguments.append(torch.from_numpy(np.array(array)))
    del model.graph.input[:]
    model.graph.input.extend(kept)
    with torch.no_grad():
        return [tensor.detach().numpy() for tensor in build_module(model, arguments)(*arguments)]


@pytest.mark.parametrize("kind", sorted({*table(), *FOLDED}))
def test_operator_computes_what_onnx_says_or_refuses(kind):
    if kind in WITHOUT_OFFICIAL_CASE:
        pytest.skip(WITHOUT_OFFICIAL_CASE[kind])
    outcomes = [_outcome(case.name) for case in official_cases()[kind]]
    assert not [problem for problem in outcomes if problem not in ("computed", "refused")]
    assert "computed" in outcomes, f"no official case of {kind} was computed"


@functools.cache
def _outcome(name):
    case = next(case for cases in official_cases().values() for case in cases if case.name == name)
    for inputs, expected in case.data_sets:
        try:
            found = _run(case, inputs)
        except UnsupportedError as error:
            return "refused" if "keep the model in ONNX" in str(error) else f"{name}: {error}"
        for got, want in zip(found, expected, strict=True):
            if got.dtype != want.dtype or got.shape != want.shape:
                return f"{name}: expected {want.dtype} {want.shape}, found {got.dtype} {got.shape}"
            if not np.allclose(got, want, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True):
                return f"{name}: expected {want}, found {got}"
    return "computed"


def _compare_with_onnxruntime(nodes, inputs, weights, outputs, opset=18):
    ort = pytest.importorskip("onnxruntime")
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, v.shape) for n, v in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    expected = ort.InferenceSession(model.SerializeToString()).run(None, inputs)
    tensors = [torch.from_numpy(value) for value in inputs.values()]
    with torch.no_grad():
        found = build_module(model, tensors)(*tensors)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=RELATIVE, atol=ABSOLUTE)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent_layers_agree_with_onnxruntime(kind, direction):
    rng = np.random.default_rng(7)
    hidden, size, gates, ways = 5, 4, {"LSTM": 4, "GRU": 3}[kind], 2 if direction == "bidirectional" else 1
    weights = {
        "w": rng.standard_normal((ways, gates * hidden, size), np.float32),
        "r": rng.standard_normal((ways, gates * hidden, hidden), np.float32),
        "b": rng.standard_normal((ways, 2 * gates * hidden), np.float32),
    }
    more = {"linear_before_reset": 1} if kind == "GRU" else {}
    outputs = ["y", "h", "c"] if kind == "LSTM" else ["y", "h"]
    node = onnx.helper.make_node(
        kind, ["x", "w", "r", "b"], outputs, hidden_size=hidden, direction=direction, **more
    )
    _compare_with_onnxruntime([node], {"x": rng.standard_normal((6, 2, size), np.float32)}, weights, outputs)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("groups", [1, 4])
def test_padded_and_grouped_convolutions_agree_with_onnxruntime(auto_pad, groups):
    rng = np.random.default_rng(8)
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["a"], auto_pad=auto_pad, group=groups, strides=[2, 2]),
        onnx.helper.make_node("MaxPool", ["a"], ["m"], kernel_shape=[2, 3], auto_pad=auto_pad),
        onnx.helper.make_node("AveragePool", ["m"], ["y"], kernel_shape=[2, 2], auto_pad=auto_pad),
    ]
    weights = {"w": rng.standard_normal((8, 8 // groups, 3, 2), np.float32)}
    _compare_with_onnxruntime(nodes, {"x": rng.standard_normal((1, 8, 15, 14), np.float32)}, weights, ["y"])


def test_asymmetric_pads_agree_with_onnxruntime():
    rng = np.random.default_rng(9)
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["a"], pads=[0, 1, 2, 0]),
        onnx.helper.make_node("ConvTranspose", ["a", "v"], ["b"], pads=[1, 0, 0, 1], strides=[2, 2]),
        onnx.helper.make_node("GlobalLpPool", ["b"], ["y"], p=2),
    ]
    weights = {
        "w": rng.standard_normal((4, 3, 3, 3), np.float32),
        "v": rng.standard_normal((4, 2, 3, 3), np.float32),
    }
    _compare_with_onnxruntime(
        nodes, {"x": rng.standard_normal((1, 3, 8, 8), np.float32)}, weights, ["b", "y"]
    )


def test_unknown_operator_is_refused_with_node_opset_and_advice():
    node = onnx.helper.make_node("NonZero", ["x"], ["y"], name="where_am_i")
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [1, 3])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    with pytest.raises(
        UnsupportedError, match=r"NonZero \(node 'where_am_i', opset 18\).*keep the model in ONNX"
    ):
        build_module(model, (torch.zeros(3),))


def test_a_constant_that_is_gathered_by_elements_along_a_long_axis_is_folded():
    """ONNX's reference implementation cannot: an axis of 33 is too long for NumPy's choose."""
    helper, rng = onnx.helper, np.random.default_rng(0)
    table, places = rng.normal(size=(1, 512)).astype(np.float32), rng.integers(0, 512, (1, 128))
    graph = helper.make_graph(
        [
            helper.make_node("GatherElements", ["table", "places"], ["row"], axis=1),
            helper.make_node("Add", ["x", "row"], ["y"]),
        ],
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 128])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 128])],
        [onnx.numpy_helper.from_array(table, "table"), onnx.numpy_helper.from_array(places, "places")],
    )
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    x = torch.zeros(1, 128)
    (found,) = build_module(program, (x,))(x)
    np.testing.assert_array_equal(found.detach().numpy(), np.take_along_axis(table, places, 1))
