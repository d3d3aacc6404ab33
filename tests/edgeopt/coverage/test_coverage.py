# SPDX-License-Identifier: Apache-2.0
"""What runs in integers is read from the runtime, and every configuration known to be bad is named with its reason."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.coverage import problems, read
from edgeopt.passes import Order, quantize_static
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError, RuntimeFailure
from edgeopt_wire.tensor import TensorSpec

MACS = 16 * 3 * 9 * 64 + 16 * 16 * 64 + 10 * 16


def _net(activation: str = "Relu") -> Model:
    rng = np.random.default_rng(0)
    shapes = {
        "w1": (16, 3, 3, 3),
        "b1": (16,),
        "w2": (16, 16, 1, 1),
        "b2": (16,),
        "w3": (10, 16),
        "b3": (10,),
    }
    tensors = [
        numpy_helper.from_array(rng.normal(0, 0.3, shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node(activation, ["c1"], ["r1"], "act"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "pointwise"),
        helper.make_node("Add", ["r1", "c2"], ["a"], "residual"),
        helper.make_node("GlobalAveragePool", ["a"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "classifier", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    spec = (TensorSpec("x", (1, 3, 8, 8), "float32", "NCHW"),)
    return Model("onnx", program, "net", spec, (TensorSpec("y", (1, 10), "float32"),))


def _samples() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(4)]


def _quantized(model: Model, exclude: tuple[str, ...] = ()) -> Any:
    scheme = Scheme("uint8", "int8", True, False)
    return quantize_static.apply(
        model, Order(scheme=scheme, samples=_samples(), exclude=exclude)
    ).model.program


def _save(program: Any, folder: Path) -> Path:
    file = folder / "model.onnx"
    onnx.save(program, file)
    return file


def test_a_float_file_computes_nothing_in_integers(tmp_path: Path) -> None:
    found = read(_save(_net().program, tmp_path), "onnxruntime")
    assert (found.products, found.integer_products, found.macs, found.integer_macs) == (3, 0, MACS, 0)


def test_our_own_file_computes_everything_in_integers(tmp_path: Path) -> None:
    found = read(_save(_quantized(_net()), tmp_path), "onnxruntime")
    assert (found.products, found.integer_products, found.mac_share) == (3, 3, 1.0)
    assert found.integer_operators == found.operators
    assert found.macs == MACS
    assert found.conversions == 1  # the input's; the classifier writes floats itself
    assert problems(found) == ()


def test_an_excluded_layer_is_named_with_its_reason(tmp_path: Path) -> None:
    found = read(_save(_quantized(_net(), ("pointwise",)), tmp_path), "onnxruntime")
    left = next(entry for entry in found.left_out if entry.macs)
    assert (left.type, left.name, left.macs) == ("Conv", "pointwise", 16 * 16 * 64)
    assert "'w2' and its output 'c2' are floats" in left.reason
    assert "excluded" in left.help
    assert "1 of 3" in problems(found)[0]


def test_mixed_types_are_the_reason_where_they_are(tmp_path: Path) -> None:
    """What other quantizers write: int8 zero points here, uint8 ones there."""
    program = _quantized(_net())
    constants = {tensor.name: tensor for tensor in program.graph.initializer}
    for node in program.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[2].startswith("r1"):
            zero = numpy_helper.from_array(np.array(-128, np.int8), "int8_zero")
            node.input[2] = "int8_zero"
            constants.setdefault("int8_zero", zero)
    program.graph.initializer.append(constants["int8_zero"])
    found = read(_save(program, tmp_path), "onnxruntime")
    assert found.integer_products < found.products
    assert any("one type" in left.reason for left in found.left_out)


def test_an_operator_without_an_integer_kernel_is_the_reason(tmp_path: Path) -> None:
    found = read(_save(_quantized(_net("Elu")), tmp_path), "onnxruntime")
    assert found.left_out
    assert any(left.type == "Elu" and "no integer kernel" in left.reason for left in found.left_out)


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_the_defaults_of_the_runtimes_own_quantizer_are_seen_through(tmp_path: Path, method: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic
    from onnxruntime.quantization import quantize_static as peer_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(_samples())

        def get_next(self) -> Any:
            return next(self.rows, None)

    source, target = _save(_net().program, tmp_path), tmp_path / "peer.onnx"
    if method == "static":
        peer_static(str(source), str(target), Reader())
    else:
        quantize_dynamic(str(source), str(target))
    found = read(target, "onnxruntime")
    if method == "static":
        assert found.integer_products < found.products
        assert "in floats" in problems(found)[0]
    else:
        assert found.dynamic >= 2
        assert "in every inference" in problems(found)[-1]


def test_damage_and_unknown_runtimes_are_said(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"no model")
    with pytest.raises(RuntimeFailure, match=r"cannot load model\.onnx"):
        read(file, "onnxruntime")
    with pytest.raises(RecipeError, match="onnxruntime"):
        read(file, "onnxruntme")
