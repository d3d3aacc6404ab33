# SPDX-License-Identifier: Apache-2.0
"""Each known way to keep ONNX Runtime out of integers is found by experiment and named, on two convolutions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.coverage import Coverage, problems, read

CHANNELS = 8


@dataclass
class Net:
    """x -> Q -> DQ -> Conv "first" -> Relu -> Q -> DQ -> Conv "second" -> Q -> DQ -> y, to be spoiled."""

    opset: int = 21
    is_per_channel: bool = True
    tensors: dict[str, Any] = field(default_factory=dict)
    nodes: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pair("x", 0.02, np.uint8(128))
        self.weights("first")
        self.node("Conv", "first", ["x_dq", "first_w_dq", "first_b_dq"], "c1", pads=[1, 1, 1, 1])
        self.node("Relu", "act", ["c1"], "r1")
        self.pair("r1", 0.02, np.uint8(0))
        self.weights("second")
        self.node("Conv", "second", ["r1_dq", "second_w_dq", "second_b_dq"], "c2", pads=[1, 1, 1, 1])
        self.pair("c2", 0.02, np.uint8(128), end="y")

    def node(self, op_type: str, name: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name, **attributes))

    def pair(self, name: str, scale: float, zero: Any, *, end: str = "") -> None:
        self.tensors |= {f"{name}_s": np.float32(scale), f"{name}_z": np.asarray(zero)}
        self.node("QuantizeLinear", f"{name}_quantize", [name, f"{name}_s", f"{name}_z"], f"{name}_q")
        inputs = [f"{name}_q", f"{name}_s", f"{name}_z"]
        self.node("DequantizeLinear", f"{name}_dequantize", inputs, end or f"{name}_dq")

    def weights(self, name: str) -> None:
        shape = (CHANNELS, CHANNELS, 3, 3)
        many = (CHANNELS,) if self.is_per_channel else ()
        axis = {"axis": 0} if self.is_per_channel else {}
        self.tensors |= {
            f"{name}_w": np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8),
            f"{name}_ws": np.full(many, 0.01, np.float32),
            f"{name}_wz": np.zeros(many, np.int8),
            f"{name}_b": np.zeros(CHANNELS, np.int32),
            f"{name}_bs": np.full(many, 0.02 * 0.01, np.float32),
            f"{name}_bz": np.zeros(many, np.int32),
        }
        inputs = [f"{name}_w", f"{name}_ws", f"{name}_wz"]
        self.node("DequantizeLinear", f"{name}_w_dequantize", inputs, f"{name}_w_dq", **axis)
        inputs = [f"{name}_b", f"{name}_bs", f"{name}_bz"]
        self.node("DequantizeLinear", f"{name}_b_dequantize", inputs, f"{name}_b_dq", **axis)

    def find(self, name: str) -> Any:
        return next(node for node in self.nodes if node.name == name)

    def drop(self, name: str) -> None:
        self.nodes.remove(self.find(name))

    def insert(self, before: str, op_type: str, inputs: list[str], output: str) -> None:
        at = self.nodes.index(self.find(before))
        self.nodes.insert(at, helper.make_node(op_type, inputs, [output], output))

    def read(self, folder: Path) -> Coverage:
        used = {name for node in self.nodes for name in node.input}
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, CHANNELS, 8, 8])],
            [helper.make_empty_tensor_value_info("y")],
            [
                numpy_helper.from_array(np.asarray(value), name)
                for name, value in self.tensors.items()
                if name in used
            ],
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        file = folder / "net.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), file)
        return read(file, "onnxruntime")


def int8_read_twice(net: Net) -> None:
    net.tensors |= {"x_z": np.int8(0), "r1_z": np.int8(-128), "c2_z": np.int8(0)}
    net.nodes[-1].output[0] = "c2_dq"
    net.node("Add", "residual", ["r1_dq", "c2_dq"], "a")
    net.pair("a", 0.02, np.int8(0), end="y")


def mixed_types(net: Net) -> None:
    net.tensors["c2_z"] = np.int8(0)
    net.nodes[-1].output[0] = "c2_dq"
    net.node("Sub", "difference", ["c2_dq", "r1_dq"], "d")
    net.node("Add", "sum", ["c2_dq", "d"], "y")


def no_rounding_behind(net: Net) -> None:
    net.drop("c2_quantize")
    net.drop("c2_dequantize")
    net.node("Softplus", "softplus", ["c2"], "y")


def left_out(net: Net) -> None:
    net.tensors["second_wf"] = net.tensors["second_w"].astype(np.float32)
    net.find("second").input[1] = "second_wf"
    net.drop("second_w_dequantize")
    net.drop("second_b_dequantize")
    net.tensors["second_bf"] = np.zeros(CHANNELS, np.float32)
    net.find("second").input[2] = "second_bf"
    no_rounding_behind(net)


def activation_per_channel(net: Net) -> None:
    net.tensors |= {"r1_s": np.full(CHANNELS, 0.02, np.float32), "r1_z": np.zeros(CHANNELS, np.uint8)}


def activation_not_absorbed(net: Net) -> None:
    net.tensors["r1_z"] = np.uint8(128)


def float_bias(net: Net) -> None:
    """The runtime quantizes a float bias itself, but not where an activation stands before the rounding."""
    net.tensors["first_bf"] = np.ones(CHANNELS, np.float32)
    net.find("first").input[2] = "first_bf"


def sixteen_bits(net: Net) -> None:
    net.tensors["r1_z"] = np.uint16(0)


def weights_along_inputs(net: Net) -> None:
    node = net.find("second_w_dequantize")
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", 1))
    net.tensors["second_ws"] = np.linspace(0.001, 0.05, CHANNELS).astype(np.float32)
    net.tensors["second_bs"] = np.float32(0.02) * net.tensors["second_ws"]


def bias_of_another_scale(net: Net) -> None:
    net.tensors["second_bs"] = net.tensors["second_bs"] * 2


def swish(net: Net) -> None:
    net.drop("act")
    net.insert("r1_quantize", "Sigmoid", ["c1"], "gate")
    net.insert("r1_quantize", "Mul", ["c1", "gate"], "r1")


def no_rounding_before(net: Net) -> None:
    net.drop("x_quantize")
    net.drop("x_dequantize")
    net.find("first").input[0] = "x"


def no_kernel(net: Net) -> None:
    net.find("act").op_type = "Elu"
    net.find("act").input[0] = "c1_dq"
    net.pair("c1", 0.02, np.uint8(128))
    net.tensors["r1_z"] = np.uint8(128)


def scaled_gemm(net: Net) -> None:
    net.nodes[-1].output[0] = "c2_dq"
    net.node("GlobalAveragePool", "pool", ["c2_dq"], "p")
    net.pair("p", 0.02, np.uint8(128))
    net.node("Flatten", "flatten", ["p_dq"], "f")
    net.pair("f", 0.02, np.uint8(128))
    net.tensors |= {"g_w": np.ones((CHANNELS, 4), np.int8), "g_s": np.float32(0.01), "g_z": np.int8(0)}
    net.tensors |= {"g_b": np.zeros(4, np.int32), "g_bs": np.float32(0.02 * 0.01), "g_bz": np.int32(0)}
    net.node("DequantizeLinear", "g_dequantize", ["g_w", "g_s", "g_z"], "g_dq")
    net.node("DequantizeLinear", "g_b_dequantize", ["g_b", "g_bs", "g_bz"], "g_b_dq")
    net.node("Gemm", "classifier", ["f_dq", "g_dq", "g_b_dq"], "y", beta=0.5)


def float_constant(net: Net) -> None:
    net.nodes[-1].output[0] = "c2_dq"
    net.tensors["half"] = np.full((1, CHANNELS, 1, 1), 0.5, np.float32)
    net.node("Mul", "product", ["c2_dq", "half"], "m")
    net.pair("m", 0.02, np.uint8(128), end="y")


def int8_read_once(net: Net) -> None:
    net.tensors |= {"x_z": np.int8(0), "r1_z": np.int8(-128), "c2_z": np.int8(0)}


def test_a_correct_net_is_all_integers(tmp_path: Path) -> None:
    found = Net().read(tmp_path)
    assert (found.integer_products, found.integer_operators, found.conversions) == (2, 2, 2)
    assert found.macs == found.integer_macs == CHANNELS * CHANNELS * 9 * (8 * 8 + 8 * 8)
    assert problems(found) == ()


@dataclass(frozen=True)
class Case:
    """How a net is spoiled, and what must be said of which operator."""

    spoil: Callable[[Net], None]
    operator: str
    cause: str
    words: str


CASES = (
    Case(int8_read_twice, "second", "int8 activations", "'r1_q' is read 2 times"),
    Case(mixed_types, "second", "mixed types", "reads uint8 and writes int8"),
    Case(no_rounding_behind, "second", "float output", "'c2' goes to Softplus 'softplus' in floats"),
    Case(no_rounding_before, "first", "float input", "'x' enters the model in floats"),
    Case(left_out, "second", "left out", "the quantizer left it out"),
    Case(activation_per_channel, "second", "activations per channel", "one scale"),
    Case(activation_not_absorbed, "first", "activation not absorbed", "the Relu 'act'"),
    Case(sixteen_bits, "second", "uint16 activations", "uint16"),
    Case(bias_of_another_scale, "second", "int32 bias", "'second_b_dq' is int32"),
    Case(float_constant, "product", "float constant", "'half' is a float"),
    Case(swish, "r1", "float input", "'c1' comes from Conv 'first' in floats"),
    Case(no_kernel, "act", "no integer kernel", "no integer kernel for Elu"),
    Case(scaled_gemm, "classifier", "alpha or beta", "beta=0.5"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.spoil.__name__)
def test_the_cause_is_found(tmp_path: Path, case: Case) -> None:
    net = Net()
    case.spoil(net)
    found = net.read(tmp_path)
    left = next(entry for entry in found.left_out if entry.name == case.operator)
    assert left.cause == case.cause
    assert case.words in left.reason
    assert left.help
    if left.macs:
        assert any(left.reason in text and left.help in text for text in problems(found))
        assert found.integer_macs < found.macs


@pytest.mark.parametrize("spoil", [int8_read_once, float_bias])
def test_what_the_runtime_mends_itself_is_no_cause(tmp_path: Path, spoil: Callable[[Net], None]) -> None:
    net = Net()
    spoil(net)
    found = net.read(tmp_path)
    assert (found.integer_products, found.mac_share) == (2, 1.0)
    assert found.left_out_products == ()


def test_an_old_opset_is_the_cause_where_it_is(tmp_path: Path) -> None:
    """Opset 12 gave MaxPool its integers."""
    causes = {}
    for opset in (11, 13):
        net = Net(opset=opset, is_per_channel=False)
        net.nodes[-1].output[0] = "c2_dq"
        net.node("MaxPool", "pool", ["c2_dq"], "p", kernel_shape=[2, 2])
        net.pair("p", 0.02, np.uint8(128), end="y")
        causes[opset] = {left.name: left.cause for left in net.read(tmp_path).left_out}
    assert causes == {11: {"pool": "old opset"}, 13: {}}


def test_wrong_results_of_the_runtime_are_said(tmp_path: Path) -> None:
    """Weights with scales along the inputs are fused as if they lay along the outputs: the file says something else."""
    net = Net()
    weights_along_inputs(net)
    found = net.read(tmp_path)
    assert found.wrong == ("second",)
    assert "wrong results" in problems(found)[0]
    x = np.random.default_rng(1).normal(size=(1, CHANNELS, 8, 8)).astype(np.float32)
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    told, fused = (
        ort.InferenceSession(tmp_path / "net.onnx", options).run(None, {"x": x})[0]
        for options in (plain, None)
    )
    assert np.abs(told - fused).max() > 10 * net.tensors["c2_s"]
    assert Net().read(tmp_path).wrong == ()


def test_the_first_operator_in_floats_is_the_first_to_run(tmp_path: Path) -> None:
    net = Net()
    no_rounding_behind(net)
    found = net.read(tmp_path)
    assert found.first is not None
    assert [left.name for left in found.left_out] == ["second", "softplus"]
    assert found.first.name == "second"


def test_operators_have_the_names_of_the_reference(tmp_path: Path) -> None:
    net = Net()
    no_rounding_behind(net)
    renamed = Net()
    renamed.find("second").name = "head"
    renamed.read(tmp_path)
    reference = (tmp_path / "net.onnx").rename(tmp_path / "reference.onnx")
    net.read(tmp_path)
    found = read(tmp_path / "net.onnx", "onnxruntime", reference=reference)
    assert found.first is not None
    assert found.first.name == "head"


def test_operators_without_names_are_told_apart(tmp_path: Path) -> None:
    net = Net()
    no_rounding_behind(net)
    for node in net.nodes:
        node.name = ""
    found = net.read(tmp_path)
    assert found.integer_products == 1
    assert found.first is not None
    assert (found.first.type, found.first.cause) == ("Conv", "float output")
