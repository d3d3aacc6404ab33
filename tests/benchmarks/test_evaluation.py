# SPDX-License-Identifier: Apache-2.0
"""Recurrent models hear their own state; agreement and KL are in the terms of the task."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from dataclasses import replace  # noqa: E402

from evaluation import Evaluation  # noqa: E402
from figures import AGREEMENTS, agreement, divergence  # noqa: E402
from models import About  # noqa: E402

from edgeopt.evaluate.outputs import Outputs  # noqa: E402
from edgeopt.evaluate.tasks import load_task  # noqa: E402


@pytest.fixture
def accumulator(tmp_path):
    """A net that adds what it hears to its state and says the sum."""
    info = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("Add", ["x", "state"], ["next"]),
        onnx.helper.make_node("Identity", ["next"], ["y"]),
    ]
    edges = [info("x", 1, [1, 1]), info("state", 1, [1, 1])], [info("y", 1, [1, 1]), info("next", 1, [1, 1])]
    graph = onnx.helper.make_graph(nodes, "net", *edges)
    path = tmp_path / "model.onnx"
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def test_a_recurrent_file_is_fed_the_state_that_it_made_and_begins_every_recording_anew(accumulator):
    about = About("sums", "frames", {"onnx": str(accumulator)}, loops={"state": 1}, steps=("x",))
    heard = np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1)
    given = Evaluation({"x": heard, "state": np.zeros((2, 1, 1), np.float32)}, None, about)
    assert given.outputs(accumulator).arrays["output 0"].tolist() == [[0, 1, 3], [3, 7, 12]]


def test_a_plain_file_gives_all_outputs_by_number(accumulator):
    about = About("sums", "regression", {"onnx": str(accumulator)})
    rows = np.ones((4, 1, 1), np.float32)
    found = Evaluation({"x": rows, "state": rows}, None, about).outputs(accumulator).arrays
    assert {name: array.shape for name, array in found.items()} == {"output 0": (4, 1), "output 1": (4, 1)}


def outputs(array, labels=None):
    return Outputs({"output 0": np.asarray(array, np.float32)}, labels)


def test_frames_agree_one_by_one_whatever_the_labels():
    float_file = outputs([[0.9, 0.1, 0.8, 0.2]] * 20, np.ones((20, 4), np.int64))
    other = replace(float_file, arrays={"output 0": np.asarray([[0.9, 0.1, 0.3, 0.2]] * 20, np.float32)})
    assert agreement(load_task("frames"), other, float_file) == pytest.approx(0.75)
    expected = (0.8 * np.log(0.8 / 0.3) + 0.2 * np.log(0.2 / 0.7)) / 4
    assert divergence("frames", other, float_file) == pytest.approx(expected, rel=1e-4)


def test_texts_agree_by_character():
    task = load_task("speech", {"alphabet": "abc"})
    said = np.eye(4, dtype=np.float32)[[[1, 2, 3, 0]] * 12] * 20
    other = np.eye(4, dtype=np.float32)[[[1, 2, 2, 0]] * 12] * 20
    truth = np.asarray(["abc"] * 12)
    assert agreement(task, outputs(other, truth), outputs(said, truth)) == pytest.approx(2 / 3)
    assert divergence("speech", outputs(said), outputs(said)) == 0
    assert divergence("speech", outputs(other), outputs(said)) > 1


def test_embeddings_have_neighbours_and_no_divergence():
    places = np.random.default_rng(0).normal(size=(30, 8))
    assert agreement(load_task("embeddings"), outputs(places), outputs(places)) == 1
    assert divergence("embeddings", outputs(places), outputs(places)) is None


def test_classes_agree_and_other_tasks_say_nothing():
    one, other = outputs(np.eye(4)), outputs(np.eye(4)[[0, 1, 2, 2]])
    assert agreement(load_task("classification"), other, one) == 0.75
    assert agreement(load_task("regression"), other, one) is None
    assert set(AGREEMENTS) == {"classification", "frames", "embeddings", "speech"}
