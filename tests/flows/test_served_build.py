# SPDX-License-Identifier: Apache-2.0
"""A recipe says how a model is served, and a device serves the package so: built, installed, asked in batches."""

import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt.served_package import free_batch_axis
from edgeopt_agent.machine import Installed
from edgeopt_agent.serve.models import Models
from edgeopt_agent.serve.served import Call
from edgeopt_agent.store import Store

pytestmark = pytest.mark.flow
MODELS = Path(__file__).with_name("small_models.py")
EDGEOPT = str(Path(sys.executable).with_name("edgeopt"))
RECIPE = """
name = "net"
version = "1"
runtimes = ["onnxruntime"]
precisions = ["int8"]
{more}
"""


def build(folder: Path, more: str) -> subprocess.CompletedProcess[str]:
    rng = np.random.default_rng(0)
    np.savez(folder / "calibration.npz", x=rng.normal(size=(8, 3, 32, 32)).astype(np.float32))
    (folder / "recipe.toml").write_text(RECIPE.format(more=more))
    return subprocess.run(
        [EDGEOPT, "build", f"{MODELS}:net", "--device", "host", "--calibration", folder / "calibration.npz", "-o", folder,
         "--recipe", folder / "recipe.toml", "--quick", "--json"],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip


def test_a_package_is_built_for_batches_and_served_in_batches(tmp_path: Path) -> None:
    more = '[postprocess]\nkind = "classify"\ntop = 2\n[serving]\nmax_batch = 8\nmax_delay_us = 20000\n'
    done = build(tmp_path, more)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    store = Store(tmp_path / "state")
    with zipfile.ZipFile(tmp_path / report["package"]) as package:
        package.extractall(store.slot("net", "A"))
    manifest = store.manifest("net", "A")
    assert manifest.extra["serving"] == {"max_batch": 8, "max_delay_us": 20000}
    models = Models(store)
    for variant in manifest.variants:
        models.activate("net", Installed("A", "1", "0" * 64, variant.id))
        name = manifest.signature_inputs[0].name
        images = np.random.default_rng(1).normal(size=(8, 3, 32, 32)).astype(np.float32)
        alone = [models.infer("net", {name: image[None]})[1] for image in images]
        found: list[Any] = [None] * 8

        def ask(row: int, name: str = name, images: np.ndarray = images, found: list[Any] = found) -> None:
            found[row] = models.answer("net", Call({name: images[row][None]}, ("top_index",)))[1].outputs[
                "top_index"
            ]

        runs = models.served("net").scheduler.counts.runs
        threads = [threading.Thread(target=ask, args=(row,)) for row in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert models.served("net").scheduler.counts.runs - runs < 8, "several ran together"
        for row in range(8):
            scores = next(iter(alone[row].values()))[0]
            assert scores[found[row][0, 0]] == scores.max()


@pytest.mark.parametrize(
    ("more", "says"),
    [("[serving]\nmax_bach = 8\n", "max_batch"), ("[serving]\nqueue = -1\n", "queue"),
     ('[postprocess]\nkind = "classfy"\n', "classify"), ('[postprocess]\noutput = "none"\n', "unknown output")],
)  # fmt: skip
def test_a_key_that_a_device_would_refuse_ends_the_build(tmp_path: Path, more: str, says: str) -> None:
    done = build(tmp_path, more)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr


def test_constant_shapes_follow_the_free_axis(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes = [
        helper.make_node("Reshape", ["x", "s1"], ["a"]), helper.make_node("Reshape", ["a", "s2"], ["b"], allowzero=1),
        helper.make_node("Reshape", ["w", "s3"], ["c"]), helper.make_node("Squeeze", ["c", "z"], ["d"]),
        helper.make_node("MatMul", ["b", "d"], ["y"]),
    ]  # fmt: skip
    shapes = {"s1": [1, 2, 3], "s2": [1, -1], "s3": [1, 6, 1]}
    graph = helper.make_graph(
        nodes,
        "shapes",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 1])],
        [*(numpy_helper.from_array(np.int64(value), name) for name, value in shapes.items()),
         numpy_helper.from_array(np.int64([0]), "z"), numpy_helper.from_array(np.arange(6, dtype=np.float32), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    free_batch_axis(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0][:, 0], x @ np.arange(6), rtol=1e-5)
