# SPDX-License-Identifier: Apache-2.0
"""Reading model files: what is wrong with them is said, what can be made static is."""

import os
from pathlib import Path

import numpy as np
import pytest

from edgeopt_converters import graph
from edgeopt_converters.litert_file import load_litert
from edgeopt_converters.onnx_file import load_onnx, save_onnx
from edgeopt_wire.errors import RecipeError, StoreError, UnsupportedError
from edgeopt_wire.tensor import TensorSpec

onnx = pytest.importorskip("onnx")
FLOAT = onnx.TensorProto.FLOAT


def write(path, shape=("batch", 3, 8, 8), opset=18, ir_version=8, **options):
    """A convolution of a free batch, with its weight also listed as an input, as old files do."""
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    made = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
            onnx.helper.make_node("Relu", ["c"], ["y"], name="relu"),
        ],
        "g",
        [
            onnx.helper.make_tensor_value_info("x", FLOAT, shape),
            onnx.helper.make_tensor_value_info("w", FLOAT, weight.shape),
        ],
        [onnx.helper.make_tensor_value_info("y", FLOAT, ["batch", 4, None, None])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(
        made, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=ir_version
    )
    onnx.save_model(model, str(path), **options)
    return path


def test_free_batch_becomes_one_and_weights_are_no_inputs(tmp_path):
    model = load_onnx(write(tmp_path / "m.onnx"), name="m")
    assert model.inputs == (TensorSpec("x", (1, 3, 8, 8), "float32", "NCHW"),)
    assert model.outputs[0].shape == (1, 4, 6, 6)


def test_other_free_axis_is_refused_by_name_with_what_to_write(tmp_path):
    path = write(tmp_path / "m.onnx", shape=("batch", 3, "height", 8))
    with pytest.raises(RecipeError, match=r"axis 2 \('height'\) of input 'x' is free.*\[\[inputs\]\]"):
        load_onnx(path, name="m")
    given = TensorSpec("x", (1, 3, 16, 8), "float32", "NCHW")
    assert load_onnx(path, name="m", inputs=(given,)).outputs[0].shape == (1, 4, 14, 6)


def test_recipe_that_contradicts_the_file_is_refused(tmp_path):
    path = write(tmp_path / "m.onnx")
    with pytest.raises(RecipeError, match="axis 1 of input 'x' is 3, the recipe says 4"):
        load_onnx(path, name="m", inputs=(TensorSpec("x", (1, 4, 8, 8), "float32"),))
    with pytest.raises(RecipeError, match="unknown input 'image'"):
        load_onnx(path, name="m", inputs=(TensorSpec("image", (1, 3, 8, 8), "float32"),))


def test_what_is_no_onnx_model_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    for content in (b"", b"not a protobuf at all", b"\x89PNG\r\n"):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match="is not an ONNX model"):
            load_onnx(path, name="m")
    with pytest.raises(StoreError, match="cannot read"):
        load_onnx(tmp_path / "absent.onnx", name="m")


def test_weights_in_another_file_are_read_or_missed_by_name(tmp_path):
    path = write(
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    model = load_onnx(path, name="m")
    save_onnx(model, tmp_path / "whole.onnx")
    assert graph.of(load_onnx(tmp_path / "whole.onnx", name="m")).weight_bytes == 4 * 3 * 9 * 4
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(RecipeError, match=r"weights\.bin.*beside it"):
        load_onnx(path, name="m")


def test_operators_without_a_name_of_their_own_are_named_after_what_they_make(tmp_path):
    path = write(tmp_path / "m.onnx")
    for given, wanted in ((["", ""], ["Conv_c", "Relu_y"]), (["same", "same"], ["same", "Relu_y"])):
        program = onnx.load(str(path))
        for node, name in zip(program.graph.node, given, strict=True):
            node.name = name
        onnx.save_model(program, str(tmp_path / "unnamed.onnx"))
        found = load_onnx(tmp_path / "unnamed.onnx", name="m").program
        assert [node.name for node in found.graph.node] == wanted


def test_old_opset_is_brought_up(tmp_path):
    model = load_onnx(write(tmp_path / "m.onnx", opset=9, ir_version=4), name="m")
    assert model.program.opset_import[0].version == 17


def test_nhwc_input_is_recognized_by_the_transpose_behind_it(tmp_path):
    made = onnx.helper.make_graph(
        [onnx.helper.make_node("Transpose", ["x"], ["y"], perm=[0, 3, 1, 2])],
        "g",
        [onnx.helper.make_tensor_value_info("x", FLOAT, [1, 8, 8, 3])],
        [onnx.helper.make_tensor_value_info("y", FLOAT, [1, 3, 8, 8])],
    )
    path = tmp_path / "m.onnx"
    onnx.save_model(onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)]), str(path))
    assert load_onnx(path, name="m").inputs[0].layout == "NHWC"


def test_graph_tells_integers_from_floats_through_quantize_and_dequantize(tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")
    source, target = write(tmp_path / "f.onnx", shape=(1, 3, 8, 8)), tmp_path / "q.onnx"
    made = onnx.load(str(source))
    made.graph.node.append(onnx.helper.make_node("Softmax", ["y"], ["s"], name="softmax", axis=1))
    made.graph.output[0].name = "s"
    onnx.save_model(made, str(source))

    class Reader(quantization.CalibrationDataReader):
        left = 2

        def get_next(self):
            self.left -= 1
            rng = np.random.default_rng(self.left + 1)
            return {"x": rng.standard_normal((1, 3, 8, 8), np.float32)} if self.left >= 0 else None

    quantization.quantize_static(
        str(source), str(target), Reader(), per_channel=True, op_types_to_quantize=["Conv", "Relu"]
    )
    found = graph.of(load_onnx(target, name="q"))
    types = {operator.name: operator.dtype for operator in found.operators}
    assert types["conv"] == "int8"
    assert [operator.name for operator in found.floats()] == ["softmax"]
    conv = next(operator for operator in found.operators if operator.name == "conv")
    assert conv.inputs[1].dtype == "int8"
    assert conv.macs == 4 * 6 * 6 * 27
    assert conv.weight_bytes == 4 * 27
    assert [operator.name for operator in graph.of(load_onnx(source, name="f")).floats()] == [
        "conv",
        "relu",
        "softmax",
    ]


def test_graph_of_a_torch_model_is_refused():
    torch = pytest.importorskip("torch")
    from edgeopt_converters.torch_program import program_model

    model = program_model(torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), name="m")
    with pytest.raises(UnsupportedError, match="convert it first"):
        graph.of(model)


def test_pt2_files_of_other_kinds_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    from edgeopt_converters.torch_program import load_program

    path = tmp_path / "m.pt2"
    path.write_bytes(b"garbage")
    with pytest.raises(RecipeError, match=r"not a \.pt2 archive"):
        load_program(path)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(RecipeError, match="state_dict"):
        load_program(path)


def test_pt2_with_free_batch_becomes_static_and_other_free_axes_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    from edgeopt_converters.torch_program import load_program, program_model

    net, path = torch.nn.Conv2d(3, 4, 3).eval(), tmp_path / "m.pt2"
    for axis, is_fine in ((0, True), (2, False)):
        program = torch.export.export(
            net,
            (torch.zeros(4, 3, 16, 16),),
            dynamic_shapes=({axis: torch.export.Dim("free", min=1 if is_fine else 4, max=64)},),
        )
        torch.export.save(program, path)
        if is_fine:
            assert program_model(load_program(path), name="m").inputs[0].shape == (1, 3, 16, 16)
        else:
            with pytest.raises(RecipeError, match="axis 2 is free"):
                load_program(path)


def test_litert_files_are_read_without_running_them(tmp_path):
    pytest.importorskip("ai_edge_litert")
    path = tmp_path / "m.tflite"
    for content in (b"", b"not a flatbuffer at all", b"\x04\x00\x00\x00TFL3"):
        path.write_bytes(content)
        with pytest.raises(RecipeError):
            load_litert(path, name="m")


@pytest.mark.skipif("EDGEOPT_DATA" not in os.environ, reason="EDGEOPT_DATA is not set")
@pytest.mark.parametrize(
    ("file", "dtype", "integers"),
    [("pretrainedResnet", "float32", 0), ("pretrainedResnet_quant", "int8", 16)],
)
def test_mlperf_tiny_resnet_is_counted_as_published(file, dtype, integers):
    pytest.importorskip("ai_edge_litert")
    path = Path(os.environ["EDGEOPT_DATA"]) / "mlperf-tiny" / f"{file}.tflite"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    model = load_litert(path, name="resnet8")
    assert model.inputs[0].shape == (1, 32, 32, 3)
    assert model.inputs[0].dtype == dtype
    found = graph.of(model)
    assert found.macs == 12_501_632
    assert sum(operator.dtype == "int8" for operator in found.operators) == integers


def test_a_shape_that_one_reshape_computes_for_the_next_is_found(tmp_path):
    program = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 13]>
        twice (float[n, 4, 6] x) => (float[a, b, c] y)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[2] tail = {2, -1}, int64[1] rest = {-1}> {
          shape = Shape(x)
          batch = Slice(shape, zero, one)
          small = Cast <to = 6> (batch)
          wide = Cast <to = 7> (small)
          first = Concat <axis = 0> (wide, tail)
          halves = Reshape(x, first)
          again = Shape(halves)
          kept = Slice(again, zero, two)
          four = Mul(two, two)
          second = Concat <axis = 0> (kept, four, rest)
          whole = Reshape(halves, second)
          y = ReduceSum <keepdims = 0> (whole, rest)
        }"""
    )
    onnx.save(program, tmp_path / "m.onnx")
    assert [spec.shape for spec in load_onnx(tmp_path / "m.onnx", name="m").outputs] == [(1, 2, 4)]
