# SPDX-License-Identifier: Apache-2.0
"""Models in service: swapped under load, batched in a real runtime, and told by manifest and device how to serve."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt_agent.client import Client
from edgeopt_agent.machine import Installed
from edgeopt_agent.serve.descriptions import describe
from edgeopt_agent.serve.http import LocalServer
from edgeopt_agent.serve.models import Models, serving_of
from edgeopt_agent.serve.served import Call
from edgeopt_agent.store import Store
from edgeopt_wire.document import to_bytes
from edgeopt_wire.errors import RecipeError, RuntimeFailure, UnsupportedError
from edgeopt_wire.manifest import Compatible, FileEntry, Manifest, Provenance, Variant
from edgeopt_wire.tensor import TensorSpec

Rig = Any
ONES = np.ones((1, 2, 4, 4), np.float32)


def test_swapping_under_load_loses_no_request_and_closes_every_model_that_went(rig: Rig) -> None:
    rig.install(gain=1.0, latency_ns=200_000)
    rig.install("other", latency_ns=100_000)
    end = threading.Event()
    counts, failures, opened = [0] * 8, [], []

    def hammer(number: int) -> None:
        with rig.client() as client:
            while not end.is_set():
                try:
                    answer = client.infer("tiny", {"image": ONES})
                    assert answer.outputs["scores"][0, 0] == float(answer.version), (
                        "an answer of another version's model"
                    )
                    counts[number] += 1
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(len(counts))]
    for thread in threads:
        thread.start()
    for version in range(2, 22):
        opened.append(rig.models.describe("tiny"))
        rig.install(version=str(version), slot="AB"[version % 2], gain=float(version), latency_ns=200_000)
        time.sleep(0.02)
    end.set()
    for thread in threads:
        thread.join(20)
    assert not failures, failures[:3]
    assert min(counts) > 0
    for loaded in opened:
        with pytest.raises(RuntimeFailure, match="closed"):
            loaded.infer({"image": ONES})


def test_a_model_that_cannot_be_opened_leaves_the_one_before(rig: Rig) -> None:
    rig.install(gain=3.0)
    for after in (-1, 0):  # while it is loaded, and when it runs for the first time
        with pytest.raises(RuntimeFailure):
            rig.install(version="2", slot="B", failure="raise", fail_after=after)
    assert rig.models.infer("tiny", {"image": ONES})[1]["scores"][0, 0] == 3.0


def test_two_instances_run_two_requests_at_once(rig: Rig) -> None:
    for instances, most in ((1, 1), (2, 2)):
        rig.install(serving={"instances": instances}, latency_ns=150_000_000)
        started = time.monotonic()
        threads = [
            threading.Thread(target=rig.models.infer, args=("tiny", {"image": ONES})) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - started
        assert (took < 0.29) == (most == 2)


def test_a_queue_without_room_is_503_and_a_deadline_504(rig: Rig) -> None:
    rig.install(serving={"queue": 0}, latency_ns=500_000_000)
    body = (
        b'{"inputs":[{"name":"image","datatype":"FP32","shape":[1,2,4,4],"data":['
        + b",".join([b"1"] * 32)
        + b"]}]"
    )
    asked = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
    plain, hurried = body + b"}", body + b',"parameters":{"timeout":50000}}'
    first = threading.Thread(target=rig.raw, args=(asked % (len(plain), plain),))
    first.start()
    time.sleep(0.2)
    found = rig.raw(asked % (len(plain), plain))
    assert found.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: 1\r\n" in found
    first.join()
    rig.install(latency_ns=500_000_000)
    first = threading.Thread(target=rig.raw, args=(asked % (len(plain), plain),))
    first.start()
    time.sleep(0.2)
    assert rig.raw(asked % (len(hurried), hurried)).startswith(b"HTTP/1.1 504 ")
    first.join()


@pytest.mark.parametrize(
    ("serving", "says"),
    [({"max_batch": 0}, "max_batch"), ({"instances": 1000}, "instances"), ({"max_bach": 2}, "max_batch"),
     ({"response_cache": {"entries": -1}}, "entries"), ({"semantic_cache": {"threshold": 0.1}}, "threshold"),
     ({"semantic_cache": {"embedder": "tiny"}}, "name another")],
)  # fmt: skip
def test_a_manifest_that_asks_for_too_much_is_refused_with_the_key(rig: Rig, serving: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        rig.install(serving=serving)


def test_the_devices_own_keys_go_before_the_manifests(rig: Rig) -> None:
    rig.install(serving={"queue": 5, "timeout_ms": 7})
    manifest = rig.models.describe("tiny").manifest
    found = serving_of(manifest, {"queue": 9})
    assert (found.queue, found.timeout_ms) == (9, 7)


def dense_package(
    folder: Path, *, is_free: bool, serving: dict[str, Any], is_mixing: bool = False, rows: int = 1,
    runtime: str = "onnxruntime",
) -> None:  # fmt: skip
    """y = 2 x + 1 in real ONNX, its batch axis free or fixed; `is_mixing` scales by the largest of all rows."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    edges = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n" if is_free else rows, 3])
        for name in ("x", "y")
    ]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
    if is_mixing:
        nodes[1] = helper.make_node("Add", ["m", "b"], ["s"])
        nodes += [helper.make_node("ReduceMax", ["x"], ["top"]), helper.make_node("Div", ["s", "top"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "dense", edges[:1], edges[1:],
        [numpy_helper.from_array(2 * np.eye(3, dtype=np.float32), "w"),
         numpy_helper.from_array(np.ones(3, np.float32), "b")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "variants").mkdir(parents=True)
    onnx.save(model, folder / "variants/a.onnx")
    (folder / "golden").mkdir()
    np.save(folder / "golden/0.npy", np.random.default_rng(0).normal(size=(3, rows, 3)).astype(np.float16))
    x, y = (TensorSpec(name, (rows, 3), "float32") for name in ("x", "y"))
    manifest = Manifest(
        "dense", "1", "host", Compatible(("host",)), (x,), (y,),
        (Variant("a", runtime, "fp32", "variants/a.onnx", (x,), (y,), "golden", 30.0),),
        (FileEntry("variants/a.onnx", 1, "0" * 64),), "golden", {}, Provenance("0" * 64, "0" * 64),
        extra={"serving": serving},
    )  # fmt: skip
    (folder / "manifest.json").write_bytes(to_bytes(manifest))


@pytest.mark.parametrize(
    ("more", "file", "sizes"),
    [({}, {"is_free": True}, []), ({"fixed_batch": True}, {"is_free": True}, [8]),
     ({"batch_sizes": [2, 4, 8]}, {"is_free": True}, [2, 4, 8]), ({}, {"is_free": False, "rows": 8}, [8]),
     ({}, {"is_free": False, "rows": 8, "runtime": "openvino"}, [8])],
    ids=["free", "fixed", "sizes", "file", "openvino"],
)  # fmt: skip
def test_a_real_runtime_answers_each_of_a_batch_with_its_own_rows(
    tmp_path: Path, more: dict[str, Any], file: dict[str, Any], sizes: list[int]
) -> None:
    if "runtime" in file:
        pytest.importorskip(file["runtime"])
    store = Store(tmp_path)
    serving = {"max_batch": 8, "max_delay_us": 20_000, **more}
    dense_package(store.slot("dense", "A"), serving=serving, **file)
    models = Models(store)
    models.activate("dense", Installed("A", "1", "0" * 64, "a"))
    assert describe(models.served("dense"))["parameters"]["batching"] == {"max_rows": 8, "sizes": sizes}
    seen, session = set(), models.served("dense").loaded.session
    ran = session.run
    session.run = lambda inputs: (seen.add(len(inputs["x"])), ran(inputs))[1]
    wrong: list[Any] = []

    def ask(number: int) -> None:
        x = np.full((1 + number % 3, 3), number, np.float32)
        for _ in range(10):
            found = models.infer("dense", {"x": x})[1]["y"]
            if found.shape != x.shape or not (found == 2 * x + 1).all():
                wrong.append((number, found))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    counts = models.served("dense").scheduler.counts
    assert not wrong
    assert counts.rows == sum(10 * (1 + number % 3) for number in range(12))
    assert counts.runs < 120, "several ran together"
    assert seen <= set(sizes or range(1, 9)), "the runtime sees no other number of rows"
    with pytest.raises(RecipeError, match="1 to 8"):
        models.infer("dense", {"x": np.zeros((9, 3), np.float32)})


def test_a_net_whose_rows_see_each_other_is_not_served_in_batches(tmp_path: Path) -> None:
    store = Store(tmp_path)
    dense_package(store.slot("dense", "A"), is_free=True, serving={"max_batch": 4}, is_mixing=True)
    with pytest.raises(UnsupportedError, match="not independent"):
        Models(store).activate("dense", Installed("A", "1", "0" * 64, "a"))


def test_batches_and_shared_memory_are_swapped_under_load_as_well(tmp_path: Path) -> None:
    store, path = Store(tmp_path), tmp_path / "agent.sock"
    serving = {"max_batch": 4, "max_delay_us": 300}
    for slot in "AB":
        dense_package(store.slot("dense", slot), is_free=True, serving=serving)
    models = Models(store)
    models.activate("dense", Installed("A", "1", "0" * 64, "a"))
    server = LocalServer(path, models)
    server.start()
    end, failures, counts = threading.Event(), [], [0] * 6

    def hammer(number: int) -> None:
        try:
            with Client(path) as client, client.share("dense", rows=1 + number % 2) as shared:
                while not end.is_set():
                    shared.inputs["x"][...] = counts[number]
                    found = (
                        shared.run()["y"] if number % 3 else client.infer("dense", shared.inputs).outputs["y"]
                    )
                    assert (found == 2 * counts[number] + 1).all()
                    counts[number] += 1
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(len(counts))]
    for thread in threads:
        thread.start()
    for swap in range(15):
        models.activate("dense", Installed("BA"[swap % 2], "1", "0" * 64, "a"))
        time.sleep(0.03)
    end.set()
    for thread in threads:
        thread.join(20)
    server.stop()
    assert not failures, failures[:3]
    assert min(counts) > 0


def test_instances_of_onnx_runtime_share_one_session_and_run_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    dense_package(store.slot("dense", "A"), is_free=True, serving={"instances": 3})
    models = Models(store)
    models.activate("dense", Installed("A", "1", "0" * 64, "a"))
    assert len({id(loaded.session) for loaded in models.served("dense")._instances}) == 1
    wrong: list[Any] = []

    def ask(number: int) -> None:
        x = np.full((1, 3), number, np.float32)
        wrong.extend(x for _ in range(50) if not (models.infer("dense", {"x": x})[1]["y"] == 2 * x + 1).all())

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert models.served("dense").scheduler.counts.runs == 300


@pytest.mark.parametrize("keys", [
    {"batch_sizes": [2, 4]}, {"batch_sizes": [4, 2, 8]}, {"batch_sizes": [0, 8]}, {"batch_sizes": [2, 16]},
    {"batch_sizes": [8], "fixed_batch": True}, {"batch_sizes": [2, 2, 8]},
])  # fmt: skip
def test_batch_sizes_that_cannot_be_are_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    store = Store(tmp_path)
    dense_package(store.slot("dense", "A"), is_free=True, serving={"max_batch": 8, **keys})
    with pytest.raises(RecipeError, match="batch_sizes"):
        Models(store).activate("dense", Installed("A", "1", "0" * 64, "a"))


def test_a_file_with_a_fixed_batch_axis_is_not_served_in_batches(tmp_path: Path) -> None:
    store = Store(tmp_path)
    dense_package(store.slot("dense", "A"), is_free=False, serving={"max_batch": 4})
    with pytest.raises(UnsupportedError, match="free batch axis"):
        Models(store).activate("dense", Installed("A", "1", "0" * 64, "a"))
    dense_package(store.slot("four", "A"), is_free=False, rows=4, serving={"max_batch": 8})
    with pytest.raises(UnsupportedError, match="set max_batch to 4, the rows of its file"):
        Models(store).activate("four", Installed("A", "1", "0" * 64, "a"))
    whole = Models(store, {"four": {"max_batch": 1}})
    whole.activate("four", Installed("A", "1", "0" * 64, "a"))
    assert whole.infer("four", {"x": np.zeros((4, 3), np.float32)})[1]["y"].shape == (4, 3)
    with pytest.raises(RecipeError, match=r"expected shape \(4, 3\)"):
        whole.infer("four", {"x": np.zeros((1, 3), np.float32)})
    one = Models(store, {"dense": {"max_batch": 1}})
    one.activate("dense", Installed("A", "1", "0" * 64, "a"))
    assert one.answer("dense", Call({"x": np.zeros((1, 3), np.float32)}))[1].outputs["y"].tolist() == [
        [1.0] * 3
    ]
