# SPDX-License-Identifier: Apache-2.0
"""Files take turns on the clock, and their inputs are found by name or place."""

import numpy as np
import pytest
import running


def test_files_are_timed_in_turns():
    order = []
    runs = {name: lambda _, name=name: order.append(name) for name in "ab"}
    times = running.time_in_turns(runs, {})
    turn = ["a"] * running.RUNS_A_ROUND + ["b"] * running.RUNS_A_ROUND
    assert order == ["a"] * running.WARMUP + ["b"] * running.WARMUP + turn * running.ROUNDS
    assert all(0 < found.min_ns <= found.p50_ns for found in times.values())


def test_a_slow_file_is_timed_in_fewer_rounds(monkeypatch):
    monkeypatch.setattr(running, "BUDGET_S", 0.0)
    count = []
    running.time_in_turns({"a": count.append}, {})
    assert len(count) == running.WARMUP + running.LEAST_ROUNDS * running.RUNS_A_ROUND


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
