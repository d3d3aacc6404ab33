# SPDX-License-Identifier: Apache-2.0
"""Files take turns on the clock, and their inputs are found by name or place."""

import numpy as np
import pytest
import running
import timing


def test_files_are_timed_in_turns_whose_first_run_is_not_counted():
    order = []
    runs = {name: lambda _, name=name: order.append(name) for name in "ab"}
    times = timing.time_in_turns(runs, {})
    turn = ["a"] * (timing.RUNS_A_ROUND + 1) + ["b"] * (timing.RUNS_A_ROUND + 1)
    assert order == ["a"] * timing.WARMUP + ["b"] * timing.WARMUP + turn * timing.ROUNDS
    assert all(0 < found.min_ns <= found.p50_ns for found in times.values())


def test_a_slow_file_is_timed_in_fewer_rounds(monkeypatch):
    monkeypatch.setattr(timing, "BUDGET_S", 0.0)
    count = []
    timing.time_in_turns({"a": count.append}, {})
    assert len(count) == timing.WARMUP + timing.LEAST_ROUNDS * (timing.RUNS_A_ROUND + 1)


def test_files_are_timed_in_a_process_that_says_why_it_could_not(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"no model")
    with pytest.raises(RuntimeError, match=r"onnxruntime was not timed \(exit 1\): .*"):
        timing.time_files({"a": file}, "onnxruntime", 1, {"x": np.zeros(1)}, tmp_path / "scratch")


@pytest.mark.parametrize("fixed", [True, False])
def test_an_onnx_file_says_the_same_in_openvino(tmp_path, fixed):
    onnx = pytest.importorskip("onnx")
    for name in ("onnxruntime", "openvino"):
        pytest.importorskip(name)
    info, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    shape = [2, 3] if fixed else ["a", 3]
    graph = onnx.helper.make_graph(
        [node("Sub", ["x", "y"], ["d"]), node("Relu", ["d"], ["z"])], "net",
        [info("x", 1, shape), info("y", 1, shape)], [info("z", 1, shape)],
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "m.onnx")
    draw = np.random.default_rng(0)
    sample = {name: draw.normal(size=(2, 3)).astype(np.float32) for name in ("y", "x")}
    one, other = (
        running.open_file(tmp_path / "m.onnx", 1, name)(sample)[0] for name in ("onnxruntime", "openvino")
    )
    assert np.allclose(one, np.maximum(sample["x"] - sample["y"], 0))
    assert np.array_equal(one, other)


def test_a_file_of_openvino_is_as_large_as_its_weights_and_graph(tmp_path):
    (tmp_path / "m.xml").write_bytes(b"123")
    (tmp_path / "m.bin").write_bytes(b"12345")
    assert running.size_of(tmp_path / "m.xml") == 8
    assert running.size_of(tmp_path / "m.bin") == 5


def test_inputs_are_matched_by_name_else_by_place_and_constants_come_last():
    sample = {"input": np.zeros((1, 4)), "state": np.ones((2, 3)), "sr": np.array(16000)}
    assert list(running.feed(["state", "input"], [(2, 3), (1, 4)], sample)["state"][0]) == [1, 1, 1]
    placed = running.feed(["arg0", "arg1"], [(1, 4), (2, 3)], sample)
    assert [array.shape for array in placed.values()] == [(1, 4), (2, 3)]
    with pytest.raises(ValueError, match="wants 4 inputs"):
        running.feed(list("abcd"), [()] * 4, sample)


def test_photos_are_turned_where_a_file_wants_channels_last():
    photo = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    turned = running.feed(["x"], [(1, 3, 4, 2)], {"x": photo})["x"]
    assert np.array_equal(turned, photo.transpose(0, 2, 3, 1))


def test_outputs_of_a_converted_file_go_by_their_number():
    tensors = [{"name": f"serving_default_output_{number}_x"} for number in (10, 2, 1)]
    assert [entry["name"][23:25].strip("_") for entry in running._in_order(tensors)] == ["1", "2", "10"]
    odd = [{"name": "Identity"}, {"name": "output_0"}]
    assert running._in_order(odd) == odd
