# SPDX-License-Identifier: Apache-2.0
"""`edgeopt build` as a user runs it: a real small net through real runtimes, and every mistake with its message."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytestmark = pytest.mark.flow

MODELS = Path(__file__).with_name("small_models.py")
EDGEOPT = str(Path(sys.executable).with_name("edgeopt"))


def edgeopt(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EDGEOPT, *map(str, args)], capture_output=True, text=True, check=False, cwd=cwd, timeout=280
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 3, 32, 32)).astype(np.float32)
    np.savez(folder / "calibration.npz", x=x[:8])
    np.savez(folder / "evaluation.npz", x=x[8:], y=rng.integers(0, 10, 16))
    np.savez(folder / "small.npz", x=x[:4, :, :16, :16])
    return folder


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("built")
    done = edgeopt(
        "build", f"{MODELS}:net", "--device", "host", "--calibration", data / "calibration.npz",
        "--evaluation", data / "evaluation.npz", "-o", folder, "--cache", folder / "cache", "--quick", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    report["folder"] = folder
    return report


def test_a_build_measures_baseline_and_candidates_and_packs_what_keeps_the_budget(
    built: dict[str, Any],
) -> None:
    assert built["schema"] == "edgeopt.build-report/1"
    candidates = {candidate["id"]: candidate for candidate in built["candidates"]}
    assert candidates["onnxruntime-fp32-1t"]["measurement"]["timing"]["n"] >= 100
    for runtime in ("onnxruntime", "litert"):
        candidate = candidates[f"{runtime}-int8-1t"]
        assert candidate["shipped"], candidate["reason"]
        assert candidate["measurement"]["golden_ok"]
        assert candidate["quality"]["samples"] == 16
        assert candidate["quality"]["sqnr_db"] > 15
        assert candidate["times_smaller"] > 1.5
        assert candidate["integer_operators"] > 0
    assert Path(built["files"]["package"]).is_file()


def test_the_page_stands_alone(built: dict[str, Any]) -> None:
    page = Path(built["files"]["page"]).read_text(encoding="utf-8")
    assert "<svg" in page
    assert "src=" not in page
    assert "onnxruntime-int8-1t" in page


def test_the_package_can_be_inspected_verified_run_and_benched(built: dict[str, Any], data: Path) -> None:
    package = built["files"]["package"]
    shown = json.loads(edgeopt("inspect", package, "--json").stdout)
    assert shown["variants"][0]["times_faster"] is not None
    assert shown["baseline"]["p50_ms"] > 0
    assert edgeopt("verify", package).returncode == 0
    np.save(data / "one.npy", np.load(data / "evaluation.npz")["x"][:1])
    answer = json.loads(edgeopt("run", package, data / "one.npy", "--json").stdout)
    assert len(answer["top"]) == 5
    benched = edgeopt("bench", package, "--rounds", "1", "--quick", "--json")
    assert benched.returncode == 0, benched.stderr
    assert all(row["golden_ok"] for row in json.loads(benched.stdout)["measurements"])


def test_inspect_without_the_report_says_what_is_missing(built: dict[str, Any], tmp_path: Path) -> None:
    copy = tmp_path / "alone.edgeopt"
    shutil.copy(built["files"]["package"], copy)
    shown = json.loads(edgeopt("inspect", copy, "--json").stdout)
    assert "edgeopt bench" in shown["measurements_missing"]
    assert shown["variants"][0]["p50_ms"] is None


def test_a_second_build_reuses_every_finished_stage_and_gives_the_same_bytes(
    built: dict[str, Any], data: Path
) -> None:
    folder = built["folder"]
    again = edgeopt(
        "build", f"{MODELS}:net", "--device", "host", "--calibration", data / "calibration.npz",
        "--evaluation", data / "evaluation.npz", "-o", folder / "again", "--cache", folder / "cache", "--quick", "--json",
    )  # fmt: skip
    report = json.loads(again.stdout)
    made = [
        stage for stage in report["stages"] if stage["name"].startswith(("lower", "quantize", "validate"))
    ]
    assert made
    assert all(stage["cached"] for stage in made)
    assert report["package_sha256"] == built["package_sha256"]


def test_a_build_without_cache_gives_the_same_bytes_too(
    built: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    again = edgeopt(
        "build", f"{MODELS}:net", "--device", "host", "--calibration", data / "calibration.npz",
        "--evaluation", data / "evaluation.npz", "-o", tmp_path, "--no-cache", "--quick", "--json",
    )  # fmt: skip
    assert json.loads(again.stdout)["package_sha256"] == built["package_sha256"]


def test_a_broken_budget_exits_with_3_and_writes_a_report_but_no_package(
    built: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    done = edgeopt(
        "build", f"{MODELS}:net", "--device", "host", "--calibration", data / "calibration.npz", "--max-size", "10B",
        "--evaluation", data / "evaluation.npz", "-o", tmp_path, "--cache", built["folder"] / "cache", "--quick",
    )  # fmt: skip
    assert done.returncode == 3
    assert "above --max-size" in done.stdout
    assert list(tmp_path.glob("*.edgeopt")) == []
    assert len(list(tmp_path.glob("*.report.html"))) == 1


def test_pt2_and_onnx_files_build_too(built: dict[str, Any], data: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from small_models import net; m, x = net();"
        "p = torch.export.export(m, (x,)); torch.export.save(p, sys.argv[2] + '/net.pt2');"
        "torch.onnx.export(p, dynamo=True, external_data=False).save(sys.argv[2] + '/net.onnx')"
    )
    subprocess.run([sys.executable, "-c", code, MODELS.parent, tmp_path], check=True, capture_output=True)
    for name in ("net.pt2", "net.onnx"):
        done = edgeopt(
            "build", tmp_path / name, "--device", "host", "--calibration", data / "calibration.npz", "-o", tmp_path,
            "--cache", built["folder"] / "cache", "--quick", "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert {c["runtime"] for c in report["candidates"] if c["shipped"]} == {"onnxruntime", "litert"}
        assert any("flatters" in warning for warning in report["warnings"])


def test_onnx_in_onnx_out_needs_no_torch(data: Path, tmp_path: Path) -> None:
    """With every trace of PyTorch and LiteRT hidden from Python, an ONNX model still becomes a host package."""
    model = tmp_path / "net.onnx"
    export = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from small_models import net; m, x = net();"
        "torch.onnx.export(torch.export.export(m, (x,)), dynamo=True, external_data=False).save(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", export, MODELS.parent, model], check=True, capture_output=True)
    hidden = tmp_path / "hide" / "sitecustomize.py"
    hidden.parent.mkdir()
    hidden.write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'litert_torch', 'ai_edge_litert', 'ai_edge_quantizer'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "def find_spec(name, package=None):\n"
        "    try:\n"
        "        return real(name, package)\n"
        "    except ModuleNotFoundError:\n"
        "        return None\n"
        "u.find_spec = find_spec\n"
    )
    import os

    done = subprocess.run(
        [
            EDGEOPT, "build", model, "--device", "host", "--calibration", data / "calibration.npz", "-o", tmp_path,
            "--no-cache", "--quick", "--json",
        ],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(hidden.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {candidate["runtime"] for candidate in report["candidates"]} == {"onnxruntime"}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nowhere.models:net", "--device", "host"], 2, "cannot import 'nowhere.models'"),
        (["missing.py:net", "--device", "host"], 2, "there is no such file"),
        ([f"{MODELS}:nett", "--device", "host"], 2, "has no function 'nett'; it offers"),
        ([f"{MODELS}:broken", "--device", "host"], 2, "RuntimeError: no weights here"),
        ([f"{MODELS}:lone_net", "--device", "host"], 2, "list [[inputs]]"),
        (["model.h5", "--device", "host"], 2, "cannot tell what 'model.h5' is"),
        (["missing.onnx", "--device", "host"], 2, "is not a file here"),
        ([f"{MODELS}:net", "--device", "raspberry-pi-6"], 2, "'raspberry-pi-5'"),
        ([f"{MODELS}:net", "--device", "host"], 2, "give --calibration DATA"),
        ([f"{MODELS}:net", "--device", "host", "--calibration", "none.npz"], 2, "is not a file here"),
        ([f"{MODELS}:net", "--device", "host", "--max-drop", "lots"], 2, "expected a share such as 1%"),
        ([f"{MODELS}:fft_net", "--device", "host", "--calibration", "SMALL8"], 1, "svd"),
    ],
)
def test_a_mistake_is_named_and_says_what_to_do(
    args: list[str], code: int, message: str, tmp_path: Path
) -> None:
    if "SMALL8" in args:
        np.savez(tmp_path / "x.npz", x=np.zeros((2, 3, 8, 8), np.float32))
        args = [*args[:-1], str(tmp_path / "x.npz")]
    done = edgeopt("build", *args, "-o", tmp_path, "--no-cache", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "error:" in done.stderr
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("*.edgeopt")) == []


def test_calibration_of_the_wrong_shape_says_expected_and_found(data: Path, tmp_path: Path) -> None:
    done = edgeopt(
        "build", f"{MODELS}:net", "--device", "host", "--calibration", data / "small.npz", "-o", tmp_path
    )
    assert done.returncode == 2
    assert "expected samples of shape (3, 32, 32)" in done.stderr
    assert "found (4, 3, 16, 16)" in done.stderr


def test_a_full_disk_leaves_nothing_half_written(built: dict[str, Any], data: Path, tmp_path: Path) -> None:
    import os

    if os.geteuid() != 0:
        return  # only root can mount a disk that is small enough to fill
    small = tmp_path / "small"
    small.mkdir()
    if (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], check=False).returncode
        != 0
    ):
        return  # a container without mounts
    try:
        done = edgeopt(
            "build", f"{MODELS}:net", "--device", "host", "--calibration", data / "calibration.npz",
            "--evaluation", data / "evaluation.npz", "-o", small, "--cache", built["folder"] / "cache", "--quick",
        )  # fmt: skip
        assert done.returncode == 1
        assert "free some space" in done.stderr
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_dry_run_shows_the_plan_and_makes_nothing(tmp_path: Path) -> None:
    done = edgeopt("build", f"{MODELS}:net", "--device", "jetson-orin", "--dry-run", "--json", cwd=tmp_path)
    plan = json.loads(done.stdout)
    assert plan["schema"] == "edgeopt.plan/1"
    assert any(candidate["accelerator"] == "tensorrt" for candidate in plan["candidates"])
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_transformer_shows_ranges_found_at_run_time(tmp_path: Path) -> None:
    tensors = [
        onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "w"),
        onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "v"),
    ]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
        onnx.helper.make_node("MatMul", ["h", "v"], ["y"], "second"),
    ]
    edges = [onnx.helper.make_tensor_value_info(name, 1, [1, 4, 8]) for name in ("x", "y")]
    graph = onnx.helper.make_graph(nodes, "products", edges[:1], edges[1:], tensors)
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "products.onnx")
    done = edgeopt("build", tmp_path / "products.onnx", "--device", "x86-64", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert "int8-dynamic" in done.stdout
    assert not (tmp_path / "packages").exists()


def test_labels_that_cannot_be_scored_end_a_build_before_it_quantizes(data: Path, tmp_path: Path) -> None:
    archive = np.load(data / "evaluation.npz")
    np.savez(tmp_path / "evaluation.npz", x=archive["x"], y=archive["y"] + 100)
    done = edgeopt(
        "build", f"{MODELS}:net", "--device", "host", "--calibration", data / "calibration.npz",
        "--evaluation", tmp_path / "evaluation.npz", "-o", tmp_path, "--cache", tmp_path / "cache", "--quick",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "label" in done.stderr
    assert "quantize" not in done.stderr


def test_what_int8_breaks_is_searched_for_and_left_in_floats(data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('effort = "default"\n[quantize]\nrounding = "nearest"\n', encoding="utf-8")
    done = edgeopt(
        "build", f"{MODELS}:fragile_net", "--device", "host", "--calibration", data / "calibration.npz",
        "--evaluation", _unlabelled(data), "--max-drop", "0.5%", "--recipe", recipe, "-o", tmp_path,
        "--cache", tmp_path / "cache", "--quick", "--json",
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    report = json.loads(done.stdout)
    search = next(found for name, found in report["searches"].items() if name.startswith("onnx-int8"))
    assert search["points"][0]["changes"] == []
    assert not search["points"][0]["kept"]
    best = [point for point in search["points"] if point["kept"]]
    assert best
    assert 1 <= len(best[-1]["changes"]) <= 4
    mixed = next(c for c in report["candidates"] if c["id"] == "onnxruntime-int8-mixed-1t")
    plain = next(c for c in report["candidates"] if c["id"] == "onnxruntime-int8-1t")
    assert mixed["quality"]["agreement"] > plain["quality"]["agreement"]
    assert "--max-drop" in plain["reason"]
    assert any(decision["subject"].startswith("search from") for decision in report["decisions"])
    assert any(decision["choice"].startswith("exclude = [") for decision in report["decisions"])
    assert list((tmp_path / "cache").rglob("search-*/best.bin"))
    assert {file.suffix for file in tmp_path.glob("*.pareto.*")} == {".svg", ".png"}


def test_an_analysis_names_the_tensor_that_breaks(data: Path, tmp_path: Path) -> None:
    done = edgeopt(
        "analyze", f"{MODELS}:fragile_net", "--calibration", data / "calibration.npz", "--json",
        "--cache", tmp_path / "cache",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == "edgeopt.analysis/1"
    worst = found["attribution"]["tensors"][0]
    assert worst["kind"] == "activation"
    assert worst["share"] > 0.5
    assert found["attribution"]["activations_db"] < found["attribution"]["weights_db"]
    assert found["exclude"]
    assert found["coverage"]["integer_products"] == found["coverage"]["products"]


def test_two_variants_of_a_package_can_be_compared(built: dict[str, Any]) -> None:
    package = built["files"]["package"]
    done = edgeopt("compare", f"{package}:onnxruntime-int8-1t", f"{package}:litert-int8-1t", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == "edgeopt.comparison/1"
    assert found["differences"][0]["sqnr_db"] > 15
    same = json.loads(
        edgeopt("compare", f"{package}:litert-int8-1t", f"{package}:litert-int8-1t", "--json").stdout
    )
    assert same["equal"]


def test_a_build_says_what_runs_in_integers_and_where_the_error_comes_from(built: dict[str, Any]) -> None:
    candidates = {candidate["id"]: candidate for candidate in built["candidates"]}
    for runtime in ("onnxruntime", "litert"):
        coverage = candidates[f"{runtime}-int8-1t"]["coverage"]
        assert coverage["integer_products"] == coverage["products"] == 5
        assert coverage["macs"] == coverage["integer_macs"] > 0
    attribution = next(iter(built["attributions"].values()))
    assert attribution["whole_db"] <= min(attribution["weights_db"], attribution["activations_db"]) + 1
    figures = {figure["name"] for figure in candidates["onnxruntime-int8-1t"]["figures"]}
    assert {"top1", "top5"} <= figures
    assert candidates["onnxruntime-int8-1t"]["fidelity"]["kl"] >= 0


def _unlabelled(data: Path) -> Path:
    file = data / "unlabelled.npz"
    rng = np.random.default_rng(5)
    np.savez(file, x=rng.normal(size=(64, 3, 32, 32)).astype(np.float32))
    return file
