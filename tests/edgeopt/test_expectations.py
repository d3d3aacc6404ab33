# SPDX-License-Identifier: Apache-2.0
"""A build writes into the package what its data looked like and how sure the model was; the device compares with that."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from publishing import write_package

from edgeopt.build import build
from edgeopt.cache import Cache
from edgeopt.evaluate.samples import Sample
from edgeopt.expectations import LEAST, with_expectations
from edgeopt.progress import Progress
from edgeopt.request import BuildRequest
from edgeopt_agent.drift import Drift, DriftOptions, reference_of
from edgeopt_wire.archive import PackageReader
from edgeopt_wire.manifest import Manifest

sys.path.append(str(Path(__file__).parent.parent / "flows"))
MODEL = f"{Path(__file__).parent.parent / 'flows' / 'small_models.py'}:net"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("built")
    pixels = np.random.default_rng(0)
    for name, count in (("calibration", 8), ("evaluation", 64)):
        x = pixels.normal(1, 2, (count, 3, 32, 32)).astype(np.float32)
        labels = pixels.integers(0, 10, count)
        np.savez(folder / f"{name}.npz", x=x, y=labels)
    request = BuildRequest(
        MODEL,
        "host",
        calibration=str(folder / "calibration.npz"),
        evaluation=str(folder / "evaluation.npz"),
        output=folder,
        quick=True,
    )
    outcome = build(request, Cache(None), Progress())
    assert outcome.package is not None
    with PackageReader(outcome.package) as reader:
        return reader.manifest


@pytest.mark.slow
def test_a_package_carries_statistics_of_its_data_and_its_answers(manifest: Manifest) -> None:
    reference = reference_of(manifest)
    assert reference is not None
    assert (reference.rows, reference.origin) == (64, "evaluation")
    name = manifest.signature_inputs[0].name
    assert reference.features[f"{name}.mean.1"].mean == pytest.approx(1, abs=0.05)
    assert reference.features[f"{name}.std.2"].mean == pytest.approx(2, rel=0.05)
    assert 0.1 <= reference.features["confidence.top1"].mean <= 1


@pytest.mark.slow
def test_a_device_compares_with_it_from_the_first_window_on(manifest: Manifest) -> None:
    seconds = [0.0]

    def clock() -> float:
        seconds[0] += 100
        return seconds[0]

    monitor = Drift(DriftOptions(every_s=0, rows=64), None, clock).monitor(manifest)
    assert monitor is not None
    spec = manifest.signature_inputs[0]
    pixels = np.random.default_rng(5)
    for mean in (1.0, 1.0, 2.0, 2.0):
        for _ in range(64):
            monitor.look({spec.name: pixels.normal(mean, 2, spec.shape).astype(np.float32)}, {})
        if mean == 1.0:
            assert monitor.summary()["state"] == "steady"
    summary = monitor.summary()
    assert (summary["state"], summary["reference"]) == ("drift", "evaluation")
    assert summary["feature"].startswith(f"{spec.name}.mean")


def test_too_little_data_makes_no_reference(tmp_path: Path) -> None:
    manifest = write_package(tmp_path, {"a": {}})
    spec = manifest.signature_inputs[0]
    few = [Sample({spec.name: np.ones(spec.shape, np.float32)})] * (LEAST - 1)
    plain = replace(manifest, extra={})
    assert with_expectations(tmp_path, plain, evaluation=None, calibration=few) == plain  # type: ignore[arg-type]
    known = with_expectations(tmp_path, plain, evaluation=few[:3], calibration=few * 2)  # type: ignore[arg-type]
    found = reference_of(known)
    assert found is not None
    assert (found.origin, found.rows) == ("calibration", 2 * (LEAST - 1))
    assert not any(name.startswith("confidence") for name in found.features), "no variant is there to ask"
