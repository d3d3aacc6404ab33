# SPDX-License-Identifier: Apache-2.0
"""A build without a single sample: what it makes is called uncalibrated everywhere, and as good as evaluation says."""

import json
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgeopt.analyze import analyze
from edgeopt.budget import Budget
from edgeopt.build import BuildOutcome, build
from edgeopt.cache import Cache
from edgeopt.cli.inspect import command as inspect
from edgeopt.progress import Progress
from edgeopt.recipe import Recipe, load_recipe
from edgeopt.request import BuildRequest
from edgeopt.uncalibrated import SAID
from edgeopt.validate import NOT_MEASURED
from edgeopt_wire.errors import RecipeError

pytest.importorskip("sklearn")
pytest.importorskip("torch")

NET = Path(__file__).with_name("digit_net.py")
BLIND = '[calibration]\nmethod = "batchnorm"\ninput_range = [0.0, 1.0]\n'


def recipe(folder: Path, text: str = BLIND, *, runtimes: str = '["onnxruntime"]') -> Recipe:
    """A recipe from a real file; only ONNX Runtime unless a test wants more, because lowering takes seconds."""
    path = folder / "recipe.toml"
    path.write_text(f"runtimes = {runtimes}\n{text}", encoding="utf-8")
    return load_recipe(path)


def run(folder: Path, cache: Path, model: str = f"{NET}:net", **asked: Any) -> BuildOutcome:
    asked.setdefault("recipe", recipe(folder))
    # a device whose speed this machine does not judge: so small a net may be faster in floats
    request = BuildRequest(model=model, device="generic-arm64", output=folder, quick=True, **asked)
    return build(request, Cache(cache), Progress())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def evaluation(digit_net: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    images, targets = digit_net.digits()
    path = tmp_path_factory.mktemp("data") / "evaluation.npz"
    np.savez(path, x=images[digit_net.TRAINED :], labels=targets[digit_net.TRAINED :])
    return str(path)


@pytest.fixture(scope="module")
def measured(
    cache: Path, evaluation: str, digit_net: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> BuildOutcome:
    folder = tmp_path_factory.mktemp("measured")
    wanted = recipe(folder, runtimes='["onnxruntime", "litert"]')
    return run(folder, cache, recipe=wanted, evaluation=evaluation)


def test_evaluation_data_measures_what_no_data_has_calibrated(measured: BuildOutcome) -> None:
    """Both gave 29 dB here (35 and 36 with 200 digits to calibrate on), and no tensor was left to noise."""
    for name in ("onnxruntime-int8-1t", "litert-int8-1t"):
        candidate = measured.report.candidate(name)
        assert candidate.quality is not None
        assert candidate.quality.samples == 297
        assert candidate.quality.sqnr_db is not None
        assert candidate.quality.sqnr_db > 25
        assert candidate.quality.agreement is not None
        assert candidate.quality.agreement > 0.96
        assert candidate.calibration == "uncalibrated"
        assert any("of noise, not of data" in note for note in candidate.notes)
        assert not any("they took on noise" in note for note in candidate.notes), candidate.notes


def test_everyone_who_reads_is_told(measured: BuildOutcome) -> None:
    assert measured.package is not None
    with zipfile.ZipFile(measured.package) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    assert {variant["calibration"] for variant in manifest["variants"]} == {"uncalibrated"}
    assert all(SAID in variant["notes"] for variant in manifest["variants"])
    report = json.loads(measured.report_json.read_text())
    assert report["warnings"][0] == SAID
    labels = {entry["id"]: entry["calibration"] for entry in report["candidates"]}
    assert labels["onnxruntime-int8-1t"] == "uncalibrated"
    assert not labels["onnxruntime-fp32-1t"]
    assert "onnxruntime-int8-1t (uncalibrated)" in measured.report_html.read_text()
    shown = CliRunner().invoke(inspect, [str(measured.package)])
    assert "(uncalibrated)" in shown.output
    assert "no data was seen" in " ".join(shown.output.split())
    rows = json.loads(CliRunner().invoke(inspect, [str(measured.package), "--json"]).output)
    assert {row["calibration"] for row in rows["variants"]} == {"uncalibrated"}


def test_without_any_data_no_quality_is_claimed_and_no_drop_is_kept(
    cache: Path, digit_net: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = run(tmp_path, cache)
    assert all(candidate.quality is None for candidate in found.report.candidates)
    assert found.report.warnings[:2] == (SAID, NOT_MEASURED)
    assert found.package is not None
    assert "not measured" in found.report_html.read_text()
    assert SAID in caplog.text
    refused = run(tmp_path, cache, budget=Budget(max_drop=0.01))
    assert refused.package is None
    reason = refused.report.candidate("onnxruntime-int8-1t").reason
    assert "--max-drop cannot be checked: there is no evaluation data" in reason


def test_an_onnx_file_that_keeps_its_normalizations_gives_the_same_ranges_and_a_folded_one_is_refused(
    cache: Path, evaluation: str, digit_net: ModuleType, measured: BuildOutcome, tmp_path: Path
) -> None:
    import torch

    module, example = digit_net.net()
    for name, is_folded in (("kept", False), ("folded", True)):
        exported = torch.onnx.export(module, (example,), dynamo=True, optimize=is_folded, verbose=False)
        assert exported is not None
        exported.save(tmp_path / f"{name}.onnx")
    found = run(tmp_path, cache, str(tmp_path / "kept.onnx"), evaluation=evaluation)
    theirs, ours = (outcome.report.candidate("onnxruntime-int8-1t").quality for outcome in (found, measured))
    assert theirs is not None
    assert ours is not None
    assert theirs.sqnr_db == pytest.approx(ours.sqnr_db, abs=1.0)
    with pytest.raises(RecipeError, match="holds no batch normalization in evaluation mode") as refused:
        run(tmp_path, cache, str(tmp_path / "folded.onnx"))
    for help_text in ("--calibration DATA", "optimize=False", "module:factory"):
        assert help_text in str(refused.value)


def test_a_build_that_lacks_calibration_data_names_the_way_without(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r'\[calibration\] method = "batchnorm"'):
        run(tmp_path, cache, recipe=recipe(tmp_path, ""))


@pytest.mark.parametrize(
    ("more", "data", "expected"),
    [
        ("", "photos", "and --calibration photos is given: remove one of them"),
        ("[train]\nminutes = 1\n", "", "training needs some: give --calibration DATA"),
        ("[search]\nmin_sqnr_db = 30.0\n", "", "a search for mixed precision needs some"),
    ],
    ids=["data", "training", "search"],
)
def test_what_needs_data_is_refused(cache: Path, tmp_path: Path, more: str, data: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        run(tmp_path, cache, recipe=recipe(tmp_path, BLIND + more), calibration=data)


def test_an_extensive_effort_and_an_analysis_are_refused(cache: Path, tmp_path: Path) -> None:
    wanted = recipe(tmp_path, f'effort = "extensive"\n{BLIND}')
    with pytest.raises(RecipeError, match='or effort = "default"'):
        run(tmp_path, cache, recipe=wanted)
    request = BuildRequest(model=f"{NET}:net", device="host", recipe=recipe(tmp_path))
    with pytest.raises(RecipeError, match="an analysis needs calibration data: give --calibration DATA"):
        analyze(request, Cache(cache), Progress())
