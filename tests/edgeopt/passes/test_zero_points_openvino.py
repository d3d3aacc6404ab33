# SPDX-License-Identifier: Apache-2.0
"""OpenVINO multiplies activations in integers where their zero points are 0: files for it have that, and lose nothing by it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.coverage import Coverage, read
from edgeopt.fake_quantize import read_quantized
from edgeopt.passes import Order, Result, quantize_static
from edgeopt.side_by_side import loaded
from edgeopt.zero_points import suited
from edgeopt_converters.model import Model
from edgeopt_profiles.reader import shared_schemes
from edgeopt_wire.tensor import TensorSpec

PLAIN, ZERO = shared_schemes()["u8s8"], shared_schemes()["u8s8-zero"]
IMAGE = (1, 3, 32, 32)


def model(
    nodes: list[Any], shapes: dict[str, tuple[int, ...]], shape: tuple[int, ...], **more: np.ndarray
) -> Model:
    rng = np.random.default_rng(0)
    constants = {
        name: (rng.normal(size=size) * (2 / np.prod(size[1:])) ** 0.5).astype(np.float32)
        for name, size in shapes.items()
    } | more
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    program = onnx.shape_inference.infer_shapes(program)
    made = tuple(axis.dim_value for axis in program.graph.output[0].type.tensor_type.shape.dim)
    edge = TensorSpec("x", shape, "float32", "NCHW" if len(shape) == 4 else "")
    return Model("onnx", program, "net", (edge,), (TensorSpec("y", made, "float32"),))


def decoder(*, relu: bool, width: int = 32, size: int = 32) -> Model:
    """A transposed convolution between convolutions, with a ReLU in front of it or without."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w0"], ["a"], "stem", pads=[1] * 4),
        *([node("Relu", ["a"], ["r"], "act")] if relu else []),
        node("ConvTranspose", ["r" if relu else "a", "wt"], ["u"], "up", strides=[2, 2]),
        node("Relu", ["u"], ["v"], "act2"),
        node("Conv", ["v", "w1"], ["y"], "tail", pads=[1] * 4),
    ]
    shapes = {"w0": (width, 3, 3, 3), "wt": (width, width, 2, 2), "w1": (8, width, 3, 3)}
    return model(nodes, shapes, (1, 3, size, size))


def attention(length: int = 64, width: int = 128) -> Model:
    """One head: softmax(q k) v between projections."""
    node = helper.make_node
    nodes = [node("MatMul", ["x", f"w{name}"], [name], f"project_{name}") for name in "qkv"]
    nodes += [
        node("Transpose", ["k"], ["kt"], "turn", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"], "scores"),
        node("Softmax", ["s"], ["p"], "softmax", axis=-1),
        node("MatMul", ["p", "v"], ["o"], "mix"),
        node("MatMul", ["o", "wo"], ["y"], "out"),
    ]
    return model(nodes, {f"w{name}": (width, width) for name in "qkvo"}, (1, length, width))


def samples(shape: tuple[int, ...], seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=shape).astype(np.float32)} for _ in range(6)]


def quantized(source: Model, scheme: Any, exclude: tuple[str, ...] = ()) -> Result:
    order = Order(scheme=scheme, samples=samples(source.inputs[0].shape), exclude=exclude)
    return quantize_static.apply(source, order)


def covered(source: Model, folder: Path) -> Coverage:
    pytest.importorskip("openvino")
    onnx.save(source.program, folder / "model.onnx")
    return read(folder / "model.onnx", "openvino")


def sqnr_db(source: Model, made: Model) -> float:
    pytest.importorskip("openvino")
    rows = samples(source.inputs[0].shape, seed=9)
    exact, found = (
        np.stack([run["y"] for run in _run(entry, rows)]).astype(np.float64) for entry in (source, made)
    )
    return float(10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()))


def _run(source: Model, rows: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    with loaded(source.program.SerializeToString(), "openvino", source.inputs, source.outputs) as session:
        return [session.run(row) for row in rows]


@pytest.mark.parametrize(("source", "left"), [(decoder(relu=False), {"up"}), (attention(), {"scores"})])
def test_products_that_stayed_in_floats_run_in_integers(
    source: Model, left: set[str], tmp_path: Path
) -> None:
    before = covered(quantized(source, PLAIN).model, tmp_path)
    assert left <= {entry.name for entry in before.left_out_products}
    after = covered(quantized(source, ZERO).model, tmp_path)
    assert after.left_out_products == ()
    assert after.integer_products == after.products == before.products


@pytest.mark.parametrize("source", [decoder(relu=False), attention()])
def test_it_costs_no_accuracy(source: Model) -> None:
    plain, zero = (sqnr_db(source, quantized(source, scheme).model) for scheme in (PLAIN, ZERO))
    assert plain > 15
    assert zero > plain - 0.5


def test_only_what_such_products_read_is_symmetric_and_a_note_says_so() -> None:
    result = quantized(attention(), ZERO)
    grids = read_quantized(result.model.program).grids
    symmetric = {name for name, grid in grids.items() if grid.low == pytest.approx(-grid.high, rel=0.02)}
    assert {"q", "k", "kt", "v"} <= symmetric
    assert "x" not in symmetric
    assert grids["p"].low == 0, "what is never negative has zero point 0 in uint8 already"
    (note,) = [text for text in result.notes if "zero point 0" in text]
    assert set(note.rpartition(": ")[2].split(", ")) == {"q", "k", "kt", "v"}


def test_where_nothing_needs_it_the_file_is_that_of_the_other_runtime() -> None:
    source = decoder(relu=True)
    assert (
        quantized(source, ZERO).model.program.SerializeToString()
        == quantized(source, PLAIN).model.program.SerializeToString()
    )
    node = helper.make_node("Conv", ["x", "w"], ["y"], "only", pads=[1] * 4)
    plain = model([node], {"w": (8, 3, 3, 3)}, IMAGE)
    assert suited(ZERO, plain.program) == PLAIN, "no second calibration for the same bytes"
    assert suited(ZERO, source.program) == ZERO
    assert suited(PLAIN, source.program) == PLAIN


def test_an_excluded_product_wants_nothing() -> None:
    result = quantized(decoder(relu=False), ZERO, exclude=("ConvTranspose",))
    assert not [text for text in result.notes if "zero point 0" in text]
