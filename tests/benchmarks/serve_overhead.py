# SPDX-License-Identifier: Apache-2.0
"""What serving costs over the bare runtime call: in process, over the Unix socket, with shared memory; and batching.

    python tests/benchmarks/serve_overhead.py [--model FILE.onnx] [--rounds 400] [--json] [--markdown PAGE]

Every figure is a ratio or a difference within one run: the ways are taken in turn, in short blocks, so that a
change of the machine's speed meets them all. The server runs in a process of its own, as on a device. The model takes a
photo as uint8 (1, 224, 224, 3); without --model it is a small net made here, since the overhead does not depend on it.
"""

import argparse
import json
import multiprocessing
import os
import platform
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from table import write_between

from edgeopt_agent.client import Client
from edgeopt_agent.machine import Installed
from edgeopt_agent.serve.http import LocalServer
from edgeopt_agent.serve.models import Models
from edgeopt_agent.store import Store
from edgeopt_wire.document import to_json
from edgeopt_wire.manifest import Compatible, FileEntry, Manifest, Provenance, Variant
from edgeopt_wire.tensor import TensorSpec

BLOCK, SETTLE = 25, 5
MAX_IN_PROCESS, MAX_SOCKET_MS, MAX_SHARED_MS, MIN_BATCHING = 1.03, 0.6, 0.15, 1.5
"""The promises: ratio of p50, milliseconds added to p50 (twice), ratio of requests a second."""

WIDTH, LAYERS, CLIENTS, MAX_BATCH = 2048, 3, 32, 32


def make_photo_net(path: Path) -> None:
    """uint8 (1, 224, 224, 3) to (1, 1000): two strided convolutions, pooling and a layer, about 4 ms: a small vision net."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(0, 0.1, (96, 3, 7, 7)).astype(np.float32),
        "w2": rng.normal(0, 0.1, (128, 96, 3, 3)).astype(np.float32),
        "w3": rng.normal(0, 0.1, (128, 1000)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["real"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "w1"], ["c1"], strides=[4, 4], pads=[3, 3, 3, 3]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c2"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w3"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes, "photo",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 224, 224, 3])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 1000])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def make_dense_net(path: Path) -> None:
    """(n, 2048) to (n, 2048) through three dense layers: one row is bound by memory, many share what is read."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(0)
    nodes, constants, last = [], [], "x"
    for number in range(LAYERS):
        weight = rng.normal(0, WIDTH**-0.5, (WIDTH, WIDTH)).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"w{number}"))
        nodes += [
            helper.make_node("MatMul", [last, f"w{number}"], [f"m{number}"]),
            helper.make_node("Relu", [f"m{number}"], [f"r{number}" if number < LAYERS - 1 else "y"]),
        ]
        last = f"r{number}"
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "dense", edges[:1], edges[1:], constants)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def put(
    store: Store, name: str, source: Path, serving: dict[str, Any], *, edges: tuple[TensorSpec, ...]
) -> None:
    """Put a model file into a slot as an installed package has it."""
    folder = store.slot(name, "A")
    (folder / "variants").mkdir(parents=True)
    (folder / "variants/a.onnx").write_bytes(source.read_bytes())
    (folder / "golden").mkdir()
    samples = np.random.default_rng(2).normal(size=(2, *edges[0].shape)).astype(np.float16)
    np.save(folder / "golden/0.npy", samples.astype("uint8") if edges[0].dtype == "uint8" else samples)
    variant = Variant("a", "onnxruntime", "fp32", "variants/a.onnx", edges[:1], edges[1:], "golden", 30.0)
    entry = FileEntry("variants/a.onnx", source.stat().st_size, "0" * 64)
    manifest = Manifest(
        name, "1", "host", Compatible(("host",)), edges[:1], edges[1:], (variant,), (entry,), "golden", {},
        Provenance("0" * 64, "0" * 64), extra={"serving": serving},
    )  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(to_json(manifest)))


def serve(folder: Path, names: tuple[str, ...], path: Path, ready: Any, end: Any) -> None:
    """The server's process."""
    models = Models(Store(folder))
    for name in names:
        models.activate(name, Installed("A", "1", "0" * 64, "a"))
    server = LocalServer(path, models)
    server.start()
    ready.set()
    end.wait()
    server.stop()


def timed(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Nanoseconds of every way: blocks of `BLOCK` calls in turn, without the first `SETTLE` of each.

    Blocks and not single calls, because a way's neighbours would otherwise find the caches full of another process.
    """
    found: dict[str, list[int]] = {name: [] for name in ways}
    for _ in range(max(2, rounds // (BLOCK - SETTLE))):
        for name, way in ways.items():
            for number in range(BLOCK):
                start = time.perf_counter_ns()
                way()
                if number >= SETTLE:
                    found[name].append(time.perf_counter_ns() - start)
    return {name: np.asarray(values) for name, values in found.items()}


def measure_overhead(folder: Path, path: Path, rounds: int) -> dict[str, float]:
    """Milliseconds at p50 of the bare call, in process, over the socket, and with shared memory.

    The bare call is ONNX Runtime's own `run` on the very session that serves in this process, so that both find the
    same weights in the same caches.
    """
    models = Models(Store(folder))
    models.activate("photo", Installed("A", "1", "0" * 64, "a"))
    bare = models.served("photo").loaded.session._session
    photo = np.random.default_rng(1).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    with Client(path) as client, client.share("photo") as shared:
        shared.inputs["image"][...] = photo
        np.testing.assert_array_equal(
            client.infer("photo", {"image": photo}).outputs["scores"], shared.run()["scores"]
        )
        inputs = {"image": photo}
        found = timed(
            {
                "bare": lambda: bare.run(None, inputs),
                "in_process": lambda: models.infer("photo", inputs),
                "socket": lambda: client.infer("photo", inputs),
                "shared": shared.run,
            },
            rounds,
        )
    return {name: float(np.median(values)) / 1e6 for name, values in found.items()}


def echo(sock: socket.socket, busy_ns: int) -> None:
    """The other process of `measure_floor`: busy for as long as the model runs, then one byte back."""
    while sock.recv(1):
        end = time.perf_counter_ns() + busy_ns
        while time.perf_counter_ns() < end:
            pass
        sock.sendall(b"1")


def measure_floor(busy_ms: float, rounds: int) -> float:
    """Milliseconds that one byte to another process and back adds to `busy_ms` of work there, at p50.

    Nothing that answers from another process on this machine, as loaded as it is, can add less.
    """
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("fork").Process(target=echo, args=(theirs, int(busy_ms * 1e6)))
    process.start()
    theirs.close()
    found = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        ours.sendall(b"1")
        ours.recv(1)
        found.append(time.perf_counter_ns() - start)
    ours.close()
    process.terminate()
    process.join(10)
    return float(np.median(found)) / 1e6 - busy_ms


def throughput(path: Path, model: str, seconds: float) -> float:
    """Requests a second of `CLIENTS` clients that each ask again as soon as they are answered."""
    end = time.monotonic() + seconds
    counts = [0] * CLIENTS

    def ask(number: int) -> None:
        x = np.random.default_rng(number).normal(size=(1, WIDTH)).astype(np.float32)
        with Client(path) as client:
            while time.monotonic() < end:
                client.infer(model, {"x": x})
                counts[number] += 1

    start = time.monotonic()
    workers = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.monotonic() - start)


def main() -> int:
    """Measure, print, and exit 3 where a promise is not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="an ONNX file that takes `image`, uint8 (1, 224, 224, 3)")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each half of the batching comparison")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", type=Path, help="also write the table here, between the page's marks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), options)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for key, value in found.items():
            print(f"{key:24} {value}")
    if options.markdown:
        write_between(options.markdown, markdown(found), "overhead")
    return 0 if all(found["kept"].values()) else 3


def markdown(found: dict[str, Any]) -> str:
    """The figures beside the promises, as a table."""
    rows = (
        ("in process", f"{found['in_process_ratio']:.3f} x the bare call", f"{MAX_IN_PROCESS} x"),
        ("Unix socket", f"+{found['socket_adds_ms']:.2f} ms", f"+{MAX_SOCKET_MS} ms"),
        ("shared memory", f"+{found['shared_adds_ms']:.2f} ms", f"+{MAX_SHARED_MS} ms"),
        ("one byte to another process and back", f"+{found['floor_adds_ms']:.2f} ms", ""),
        (
            f"batching, {CLIENTS} clients",
            f"{min(found['batching_gains']):.1f} x the requests a second",
            f"{MIN_BATCHING} x",
        ),
    )
    where = found["conditions"]
    said = (
        f"p50, bare call {found['p50_ms']['bare']:.2f} ms; {where['machine']}, {where['cpus']} cores, load average "
        f"{where['load']:.1f}, Python {where['python']}."
    )
    lines = [f"| {name} | {value} | {promise} |" for name, value, promise in rows]
    return "\n".join([said, "", "| way | measured | promise |", "|---|---:|---:|", *lines]) + "\n"


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures, and which promises are kept."""
    store = Store(folder / "state")
    photo, dense = options.model or folder / "photo.onnx", folder / "dense.onnx"
    if options.model is None:
        make_photo_net(photo)
    make_dense_net(dense)
    put(store, "photo", photo, {}, edges=(
        TensorSpec("image", (1, 224, 224, 3), "uint8", "NHWC"), TensorSpec("scores", (1, 1000), "float32"),
    ))  # fmt: skip
    rows = (TensorSpec("x", (1, WIDTH), "float32"), TensorSpec("y", (1, WIDTH), "float32"))
    put(store, "single", dense, {}, edges=rows)
    put(store, "batched", dense, {"max_batch": MAX_BATCH, "max_delay_us": 2000}, edges=rows)
    context = multiprocessing.get_context("spawn")
    ready, end, path = context.Event(), context.Event(), folder / "agent.sock"
    process = context.Process(
        target=serve, args=(store.folder, ("photo", "single", "batched"), path, ready, end)
    )
    process.start()
    try:
        if not ready.wait(60):
            raise SystemExit("the server did not start")
        p50 = measure_overhead(store.folder, path, options.rounds)
        rates = [
            (throughput(path, "single", options.seconds), throughput(path, "batched", options.seconds))
            for _ in range(2)
        ]
        with Client(path) as client:
            stats = client.statistics("batched")
    finally:
        end.set()
        process.join(30)
    gains = sorted(batched / single for single, batched in rates)
    found = {
        "p50_ms": {name: round(value, 4) for name, value in p50.items()},
        "in_process_ratio": round(p50["in_process"] / p50["bare"], 4),
        "socket_adds_ms": round(p50["socket"] - p50["bare"], 4),
        "shared_adds_ms": round(p50["shared"] - p50["bare"], 4),
        "floor_adds_ms": round(measure_floor(p50["bare"], options.rounds // 2), 4),
        "requests_per_second": [[round(rate, 1) for rate in pair] for pair in rates],
        "batching_gains": [round(gain, 2) for gain in gains],
        "rows_per_run": round(stats["inference_count"] / stats["execution_count"], 1),
        "conditions": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg()[0],
            "python": sys.version.split()[0],
        },
    }
    found["kept"] = {
        "in_process": found["in_process_ratio"] <= MAX_IN_PROCESS,
        "socket": found["socket_adds_ms"] <= MAX_SOCKET_MS,
        "shared": found["shared_adds_ms"] <= MAX_SHARED_MS,
        "batching": gains[0] >= MIN_BATCHING,
    }
    return found


if __name__ == "__main__":
    sys.exit(main())
