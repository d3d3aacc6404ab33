# SPDX-License-Identifier: Apache-2.0
"""A build for OpenVINO as a user runs it: made, validated, measured, shipped, and installed by an agent."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt.keys import create_keys
from edgeopt.publish import publish
from edgeopt_wire.archive import PackageReader

pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.flow

BIN = Path(sys.executable).parent
SHAPE = (1, 3, 32, 32)


def run(program: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / program, *map(str, words)], capture_output=True, text=True, check=False, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def net(file: Path, *, loudness: float = 1.0) -> None:
    """Convolutions in front of a classifier, one depthwise; one channel may be made louder, and quieter again."""
    rng = np.random.default_rng(0)
    make, nodes, tensors, last, channels = onnx.helper.make_node, [], [], "x", 3
    for number, (out, kernel, group) in enumerate([(32, 3, 1), (32, 3, 32), (128, 1, 1), (128, 3, 1)]):
        shape = (out, channels // group, kernel, kernel)
        weights = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        weights[0] *= loudness if number == 2 else 1
        weights[:, 0] /= loudness if number == 3 else 1
        tensors.append(onnx.numpy_helper.from_array(weights, f"w{number}"))
        tensors.append(onnx.numpy_helper.from_array(rng.normal(0, 0.1, out).astype(np.float32), f"b{number}"))
        nodes.append(
            make("Conv", [last, f"w{number}", f"b{number}"], [f"c{number}"], f"conv{number}", group=group,
                 pads=[kernel // 2] * 4)
        )  # fmt: skip
        nodes.append(make("Relu", [f"c{number}"], [f"r{number}"], f"relu{number}"))
        last, channels = f"r{number}", out
    classes = rng.normal(0, 0.1, (channels, 10)).astype(np.float32)
    tensors.append(onnx.numpy_helper.from_array(classes, "w"))
    nodes += [
        make("GlobalAveragePool", [last], ["p"], "pool"),
        make("Flatten", ["p"], ["f"], "flatten"),
        make("Gemm", ["f", "w"], ["y"], "classifier"),
    ]
    edge = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "net", [edge("x", onnx.TensorProto.FLOAT, SHAPE)], [edge("y", onnx.TensorProto.FLOAT, (1, 10))], tensors
    )  # fmt: skip
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), file
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("openvino")
    net(found / "net.onnx")
    x = np.random.default_rng(1).normal(size=(24, *SHAPE[1:])).astype(np.float32)
    np.savez(found / "calibration.npz", x=x[:8])
    np.savez(found / "evaluation.npz", x=x[8:])
    np.save(found / "one.npy", x[:1])
    return found


def build(folder: Path, recipe: str, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / f"{name}.toml").write_text(recipe, encoding="utf-8")
    return run(
        "edgeopt", "build", folder / "net.onnx", "--device", "x86-64", "--recipe", folder / f"{name}.toml",
        "--calibration", folder / "calibration.npz", "--evaluation", folder / "evaluation.npz", "-o", folder / name,
        "--cache", folder / "cache", "--quick", "--json", **environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(folder: Path) -> dict[str, Any]:
    done = build(folder, 'runtimes = ["onnxruntime", "openvino"]', "both")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def candidates_of(report: dict[str, Any]) -> dict[str, Any]:
    return {candidate["id"]: candidate for candidate in report["candidates"]}


def test_openvino_is_judged_by_itself_against_its_own_floats(built: dict[str, Any]) -> None:
    found = candidates_of(built)
    reference, own = found["openvino-fp32-1t"], found["openvino-int8-1t"]
    assert reference["measurement"]["conditions"]["runtime"] == "openvino"
    assert not reference["shipped"]
    times = (entry["measurement"]["timing"]["p50_ns"] for entry in (reference, own))
    assert own["times_faster"] == pytest.approx(next(times) / next(times), abs=0.001)
    assert own["measurement"]["golden_ok"]
    assert own["quality"]["samples"] == 16
    assert own["quality"]["sqnr_db"] > 25
    assert own["coverage"]["runtime"] == "openvino"
    assert own["coverage"]["integer_products"] == own["coverage"]["products"] == 5
    assert built["provenance"]["tools"]["openvino"]


def test_runtimes_that_take_the_same_file_share_it(built: dict[str, Any]) -> None:
    with PackageReader(Path(built["files"]["package"])) as reader:
        variants = {variant.runtime: variant for variant in reader.manifest.variants}
        files = [entry.path for entry in reader.manifest.files if entry.path.startswith("variants/")]
    shipped = {candidate["runtime"] for candidate in built["candidates"] if candidate["shipped"]}
    assert set(variants) == shipped == {"onnxruntime", "openvino"}
    assert files == [variants["openvino"].file] == [variants["onnxruntime"].file]
    assert variants["openvino"].golden != variants["onnxruntime"].golden, "each has what its runtime says"
    assert list(built["attributions"]) == ["onnx-int8-u8s8-safe"], "one file has one error"


def test_how_far_the_runtimes_are_apart_is_reported(built: dict[str, Any]) -> None:
    (pair,) = built["runtime_pairs"]
    assert (pair["first"], pair["second"]) == ("onnx-int8-u8s8-safe", "openvino-int8-u8s8-safe")
    assert (pair["same_weights"], pair["samples"]) == (1.0, 16)
    (found,) = pair["differences"]
    assert 0 <= found["mean_abs"] <= found["max_abs"]
    assert found["sqnr_db"] > 40
    page = Path(built["files"]["page"]).read_text(encoding="utf-8")
    assert "The same integers in every runtime" in page
    assert "onnx-int8-u8s8-safe / openvino-int8-u8s8-safe" in page


def test_the_package_is_run_benched_compared_and_inspected(built: dict[str, Any], folder: Path) -> None:
    package = built["files"]["package"]
    answer = json.loads(
        run("edgeopt", "run", package, folder / "one.npy", "--variant", "openvino-int8-1t", "--json").stdout
    )
    assert (answer["variant"], len(answer["top"])) == ("openvino-int8-1t", 5)
    benched = run(
        "edgeopt", "bench", package, "--variant", "openvino-int8-1t", "--rounds", "1", "--quick", "--json"
    )
    (row,) = json.loads(benched.stdout)["measurements"]
    assert row["golden_ok"], benched.stderr
    names = (f"{package}:onnxruntime-int8-1t", f"{package}:openvino-int8-1t")
    compared = json.loads(run("edgeopt", "compare", *names, "--json").stdout)
    assert compared["differences"][0]["sqnr_db"] > 40, "the same integers"
    shown = json.loads(run("edgeopt", "inspect", package, "--json").stdout)
    assert "openvino-int8-1t" in [variant["id"] for variant in shown["variants"]]


def test_a_second_build_gives_the_same_bytes(built: dict[str, Any], folder: Path) -> None:
    again = json.loads(build(folder, 'runtimes = ["onnxruntime", "openvino"]', "again").stdout)
    assert again["package_sha256"] == built["package_sha256"]


def test_floats_and_half_floats_are_made_where_a_recipe_asks(folder: Path) -> None:
    done = build(folder, 'runtimes = ["openvino"]\nprecisions = ["fp16", "fp32"]', "floats")
    assert done.returncode == 0, done.stderr
    found = candidates_of(json.loads(done.stdout))
    half, whole = found["openvino-fp16-1t"], found["openvino-fp32-1t"]
    assert whole["quality"]["sqnr_db"] > 100
    assert 50 < half["quality"]["sqnr_db"] < 100
    assert half["file_bytes"] < 0.6 * whole["file_bytes"]


def test_what_a_search_finds_is_one_file_for_both_runtimes(folder: Path) -> None:
    net(folder / "loud.onnx", loudness=300)
    recipe = folder / "search.toml"
    recipe.write_text(
        'runtimes = ["onnxruntime", "openvino"]\n[quantize]\nrounding = "nearest"\n[search]\nmin_sqnr_db = 25.0\nmax_tries = 4\n'
    )
    done = run(
        "edgeopt", "build", folder / "loud.onnx", "--device", "x86-64", "--recipe", recipe, "--calibration",
        folder / "calibration.npz", "--evaluation", folder / "evaluation.npz", "-o", folder / "search", "--no-cache",
        "--quick", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found = candidates_of(report)
    ours, theirs = (found[f"{runtime}-int8-mixed-1t"] for runtime in ("onnxruntime", "openvino"))
    assert found["openvino-int8-1t"]["quality"]["sqnr_db"] < 25
    assert theirs["quality"]["sqnr_db"] >= 25
    assert theirs["measurement"]["conditions"]["runtime"] == "openvino"
    assert theirs["file_bytes"] == ours["file_bytes"]
    assert list(report["searches"]) == ["onnx-int8-u8s8-safe"], "one search"
    said = {decision["subject"]: decision["choice"] for decision in report["decisions"]}
    assert said["search from openvino-int8-u8s8-safe"] == "as found from onnx-int8-u8s8-safe"


def test_an_analysis_reads_what_openvino_computes_in_integers(folder: Path) -> None:
    (folder / "analysis.toml").write_text('runtimes = ["openvino"]')
    done = run(
        "edgeopt", "analyze", folder / "net.onnx", "--device", "x86-64", "--recipe", folder / "analysis.toml",
        "--calibration", folder / "calibration.npz", "--cache", folder / "cache", "--json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["coverage"]["runtime"] == "openvino"
    assert found["scheme"] == "openvino-int8-u8s8-safe"


@pytest.fixture(scope="module")
def repository(built: dict[str, Any], folder: Path) -> Path:
    create_keys(folder / "keys")
    now = datetime.now(UTC).replace(microsecond=0)
    publish(Path(built["files"]["package"]), folder / "repository", folder / "keys", now=now)
    return folder / "repository"


def installed(repository: Path, device: Path, **environment: str) -> dict[str, Any]:
    """Install on a device of its own; its measurements by variant."""
    device.mkdir()
    config = device / "agent.json"
    config.write_text(json.dumps({
        "schema": "edgeopt.agent/1", "device": "d1", "device_class": "x86-64", "state_dir": str(device / "state"),
        "root": str(repository / "metadata" / "1.root.json"), "transport": {"kind": "folder", "path": str(repository)},
    }))  # fmt: skip
    done = run("edgeopt-agent", "install", "--config", config, repository, **environment)
    assert done.returncode == 0, done.stderr
    events = [json.loads(file.read_text()) for file in (device / "state" / "outbox").iterdir()]
    return {event["body"]["variant"]: event["body"] for event in events if event.get("kind") == "measurement"}


def test_an_agent_measures_both_variants_and_keeps_one(repository: Path, folder: Path) -> None:
    probed = installed(repository, folder / "device")
    assert {"onnxruntime-int8-1t", "openvino-int8-1t"} <= set(probed)
    assert all(body["golden_ok"] for body in probed.values())
    config = folder / "device" / "agent.json"
    answer = json.loads(
        run("edgeopt-agent", "infer", "--config", config, folder / "one.npy", "--json").stdout
    )
    assert answer["outputs"]["y"]["shape"] == [1, 10]


def test_a_device_without_openvino_keeps_the_other_variant_of_the_file(
    repository: Path, folder: Path
) -> None:
    hidden = folder / "without"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nsys.modules['openvino'] = None\n")
    probed = installed(repository, folder / "bare", PYTHONPATH=str(hidden))
    assert probed["onnxruntime-int8-1t"]["golden_ok"]
    assert "edgeopt-agent[openvino]" in probed["openvino-int8-1t"]["error"]
    status = run("edgeopt-agent", "status", "--config", folder / "bare" / "agent.json", "--json")
    assert json.loads(status.stdout)["models"][0]["variant"].startswith("onnxruntime-int8")


def test_a_model_for_which_openvino_has_no_precision_is_told(folder: Path) -> None:
    """Nearly all products: ONNX Runtime gets ranges found at run time, which OpenVINO is not given."""
    weights = np.random.default_rng(0).normal(0, 0.1, (64, 64)).astype(np.float32)
    edge = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "product")], "products",
        [edge("x", onnx.TensorProto.FLOAT, (1, 64))], [edge("y", onnx.TensorProto.FLOAT, (1, 64))],
        [onnx.numpy_helper.from_array(weights, "w")],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "products.onnx")
    np.savez(folder / "rows.npz", x=np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32))
    done = run(
        "edgeopt", "build", folder / "products.onnx", "--device", "x86-64", "--recipe", folder / "both.toml",
        "--calibration", folder / "rows.npz", "-o", folder / "products", "--no-cache", "--quick", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [text for text in json.loads(done.stdout)["warnings"] if text.startswith("openvino")]
    assert len(said) == 1
    assert "nothing was made for it" in said[0]


def test_a_missing_library_is_told_before_anything_is_made(folder: Path) -> None:
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "real = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name == 'openvino' else real(name, package)\n"
    )
    done = build(folder, 'runtimes = ["openvino"]', "missing", PYTHONPATH=str(hidden))
    assert done.returncode == 1
    assert "pip install 'edgeopt[openvino]'" in done.stderr.replace("\n", " ")
    assert not (folder / "missing").exists()
