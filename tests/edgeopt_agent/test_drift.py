# SPDX-License-Identifier: Apache-2.0
"""A model that sees something else than it was built for says so: after two odd windows, until three quiet ones."""

import io
import json
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt_agent.drift import FIRST_WINDOWS, Drift, DriftOptions, Memory, Monitor
from edgeopt_agent.features import MAX_VALUES, features_of, of_input, of_scores
from edgeopt_agent.outbox import Outbox
from edgeopt_agent.service import Service
from edgeopt_agent.telling import Teller
from edgeopt_wire.document import from_json, to_json
from edgeopt_wire.drift import Reference, chi_square, judge, make_reference, population_stability
from edgeopt_wire.manifest import Manifest
from edgeopt_wire.tensor import TensorSpec

ROWS = 64
OPTIONS = DriftOptions(every_s=0, rows=ROWS)
IMAGE = TensorSpec("image", (1, 2, 4, 4), "float32", "NCHW")


@pytest.fixture
def manifest(tmp_path: Path, make_package: Any) -> Manifest:
    found: Manifest = make_package(tmp_path, {"a": {}})
    return found


class Scene:
    """Pictures of one kind, and a clock that goes on by a second a look."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.seconds = 0.0
        self.told: list[dict[str, Any]] = []

    def monotonic(self) -> float:
        self.seconds += 0.5
        return self.seconds

    def picture(self, light: float = 0.0) -> dict[str, np.ndarray]:
        own = self.random.normal(light, 1)
        return {"image": self.random.normal(own, 1, (1, 2, 4, 4)).astype(np.float32)}

    def rows(self, manifest: Manifest, count: int) -> list[dict[str, float]]:
        return [features_of(manifest, self.picture(), {}) for _ in range(count)]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def _see(monitor: Monitor, scene: Scene, windows: int, light: float = 0.0) -> None:
    for _ in range(windows * ROWS):
        scene.seconds += 10_000
        assert monitor.is_due
        monitor.look(scene.picture(light), {})


def test_two_odd_windows_raise_an_alarm_and_three_quiet_ones_end_it(manifest: Manifest, scene: Scene) -> None:
    memory = Memory("1", make_reference(scene.rows(manifest, 400), "calibration"))
    monitor = Monitor(manifest, memory, OPTIONS, scene.told.append, scene.monotonic)
    _see(monitor, scene, 10)
    assert scene.told == []
    _see(monitor, scene, 1, light=3)
    assert (scene.told, monitor.summary()["state"]) == ([], "steady")
    _see(monitor, scene, 1)
    _see(monitor, scene, 2, light=3)
    (said,) = scene.told
    assert (said["what"], said["state"], said["model"], said["reference"]) == (
        "drift",
        "drift",
        manifest.name,
        "calibration",
    )
    assert said["feature"].startswith("image.mean")
    assert said["psi"] > said["limit"]
    assert 1 < said["shift"] < 3
    _see(monitor, scene, 2)
    assert len(scene.told) == 1
    _see(monitor, scene, 4)
    assert [entry["what"] for entry in scene.told] == ["drift", "quiet"]
    json.dumps(scene.told)


def test_a_package_without_statistics_has_its_first_windows_for_a_reference(
    manifest: Manifest, scene: Scene
) -> None:
    drift = Drift(OPTIONS, None, scene.monotonic)
    monitor = drift.monitor(manifest)
    assert monitor is not None
    assert monitor.summary() == {
        "version": "1",
        "state": "learning",
        "reference": "service",
        "reference_rows": 0,
        "windows": 0,
    }
    _see(monitor, scene, FIRST_WINDOWS)
    (said,) = drift.take()
    assert (said["what"], said["reference"], said["reference_rows"]) == (
        "reference",
        "service",
        FIRST_WINDOWS * ROWS,
    )
    _see(monitor, scene, 2, light=3)
    assert [entry["what"] for entry in drift.take()] == ["drift"]
    page = "\n".join(drift.metrics())
    assert 'edgeopt_drift{model="tiny",version="1"} 1' in page
    assert 'edgeopt_drift_psi{model="tiny",version="1",feature="image.mean.0"}' in page


def test_a_restart_goes_on_where_it_was_and_another_version_begins_anew(
    manifest: Manifest, scene: Scene, tmp_path: Path
) -> None:
    from dataclasses import replace

    path = tmp_path / "drift.json"

    def start(which: Manifest) -> tuple[Drift, Monitor]:
        drift = Drift(OPTIONS, path, scene.monotonic)
        monitor = drift.monitor(which)
        assert monitor is not None
        return drift, monitor

    drift, monitor = start(manifest)
    _see(monitor, scene, FIRST_WINDOWS + 1)
    drift.take()
    drift, monitor = start(manifest)
    assert monitor.summary()["windows"] == 1
    assert monitor.summary()["state"] == "steady"
    _see(monitor, scene, 2, light=3)
    drift.take()
    assert start(manifest)[1].summary()["state"] == "drift"
    statistics = to_json(make_reference(scene.rows(manifest, 200), "calibration"))
    fresh = replace(manifest, version="2", extra={"statistics": json.loads(json.dumps(statistics))})
    drift, monitor = start(fresh)
    assert monitor.summary()["reference"] == "calibration"
    _see(monitor, scene, 1)
    drift.take()
    assert start(fresh)[1].summary()["windows"] == 1
    assert Drift(DriftOptions(reference="service"), path).monitor(fresh).summary()["state"] == "learning"  # type: ignore[union-attr]
    path.write_bytes(b'{"models": {"tiny": {"version": 7}}}')
    assert start(manifest)[1].summary()["state"] == "learning"


def test_statistics_that_cannot_be_read_are_as_none(manifest: Manifest, scene: Scene) -> None:
    from dataclasses import replace

    odd = replace(
        manifest, extra={"statistics": {"rows": 3, "origin": "x", "features": {"a": {"edges": [2, 1]}}}}
    )
    assert Drift(OPTIONS).monitor(odd).summary()["state"] == "learning"  # type: ignore[union-attr]
    assert Drift(DriftOptions(rows=0)).monitor(manifest) is None


def test_looking_waits_until_it_cost_next_to_nothing(manifest: Manifest, scene: Scene) -> None:
    monitor = Monitor(manifest, Memory("1"), DriftOptions(every_s=1), scene.told.append, scene.monotonic)
    monitor.look(scene.picture(), {})  # this clock says that it took half a second
    assert not monitor.is_due
    scene.seconds += 240
    assert not monitor.is_due
    scene.seconds += 20
    assert monitor.is_due


def test_what_cannot_be_looked_at_costs_no_answer(manifest: Manifest, scene: Scene) -> None:
    monitor = Monitor(manifest, Memory("1"), OPTIONS, scene.told.append, scene.monotonic)
    monitor.look({"image": np.zeros((1, 0), np.float32)}, {})
    monitor.look({"image": np.array(3.0, np.float32)}, {})
    monitor.look({"image": np.full((1, 2, 4, 4), np.nan, np.float32)}, {})
    assert monitor.summary()["reference_rows"] <= 2


def test_numbers_of_a_row_are_the_same_in_both_layouts_and_cheap_for_large_ones() -> None:
    array = np.random.default_rng(0).normal(3, 2, (1, 3, 16, 24)).astype(np.float32)
    array[0, 1] += 5
    one = of_input(TensorSpec("x", array.shape, "float32", "NCHW"), array)
    other = array.transpose(0, 2, 3, 1)
    two = of_input(TensorSpec("x", other.shape, "float32", "NHWC"), other)
    assert one == pytest.approx(two, rel=1e-5)
    assert one["x.mean.1"] == pytest.approx(array[0, 1].mean(), rel=1e-5)
    assert one["x.std.0"] == pytest.approx(array[0, 0].std(), rel=1e-5)
    from edgeopt_agent.features import _lines

    large = np.zeros((1, 3, 2160, 3840), np.float32)
    assert _lines(TensorSpec("x", large.shape, "float32", "NCHW"), large).size <= max(MAX_VALUES, 3 * 3840)


def test_confidence_is_that_of_probabilities_or_of_logits() -> None:
    shares = np.array([[0.7, 0.2, 0.1]], np.float32)
    found = of_scores(shares)
    assert found["confidence.top1"] == pytest.approx(0.7)
    assert found["confidence.margin"] == pytest.approx(0.5)
    assert of_scores(np.log(shares)) == pytest.approx(found, rel=1e-5)
    assert of_scores(np.full((1, 4), 0.25, np.float32))["confidence.entropy"] == pytest.approx(1.0)
    assert of_scores(np.array([[0.3, 0.9]], np.float32), is_classifier=False) == pytest.approx(
        {"confidence.top1": 0.9}
    )


def test_psi_is_what_its_definition_gives_and_adds_up() -> None:
    assert population_stability([100] * 10, [50] * 10) == pytest.approx(0, abs=1e-9)
    before, now = [0.9, 0.1], [0.6, 0.4]
    expected = sum((b - a) * np.log(b / a) for a, b in zip(before, now, strict=True))
    assert population_stability([90_000, 10_000], [60_000, 40_000]) == pytest.approx(expected, rel=1e-3)
    assert chi_square(9, 0.999) == pytest.approx(27.877, rel=0.02)  # tables of chi-square
    assert chi_square(9, 0.9999) == pytest.approx(33.72, rel=0.02)


def test_a_number_that_never_changed_alarms_when_it_does() -> None:
    reference = make_reference([{"x": 2.5}] * 200, "calibration")
    again = from_json(Reference, json.loads(json.dumps(to_json(reference))))
    assert again == reference
    same, other = (
        [sum(again.features["x"].bin(v) == b for v in [value] * 100) for b in range(3)]
        for value in (2.5, 2.6)
    )
    assert not judge(again, {"x": same}, {})[0].is_drift
    assert judge(again, {"x": other}, {"x": 2.6})[0].is_drift
    assert judge(again, {"y": [1, 2]}, {}) == ()


def test_an_event_reaches_the_outbox(manifest: Manifest, scene: Scene, tmp_path: Path) -> None:
    from datetime import UTC, datetime

    from edgeopt_agent.transports.memory import MemoryTransport

    now = lambda: datetime(2026, 11, 25, tzinfo=UTC)  # noqa: E731
    drift = Drift(OPTIONS, None, scene.monotonic)
    monitor = drift.monitor(manifest)
    assert monitor is not None
    _see(monitor, scene, FIRST_WINDOWS)
    outbox = Outbox(tmp_path / "outbox", "d1")
    import queue

    teller = Teller(MemoryTransport(queue.Queue()), outbox, now, scene.monotonic, lambda: None)  # type: ignore[arg-type, return-value]
    teller.tell_service(Service(now, drift=drift))
    batch = outbox.batch()
    assert batch is not None
    assert [(event.kind, event.body["what"]) for event in batch.events] == [("drift", "reference")]


@pytest.mark.skipif(not os.environ.get("EDGEOPT_DATA"), reason="EDGEOPT_DATA names no folder of photos")
def test_real_photos_raise_no_alarm_and_dark_or_noisy_ones_do() -> None:
    from PIL import Image

    path = Path(os.environ["EDGEOPT_DATA"]) / "cifar10" / "cifar10-test-5k.zip"
    if not path.exists():
        pytest.skip("no CIFAR-10 there")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith((".jpg", ".png"))]
        random.Random(0).shuffle(names)
        photos = [
            np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB"), np.float32)
            for n in names[:1500]
        ]
    spec = TensorSpec("image", (1, 32, 32, 3), "float32", "NHWC")
    reference = make_reference([of_input(spec, photo[None]) for photo in photos[:500]], "calibration")

    def alarms(change: Any) -> int:
        rows = [of_input(spec, change(photo)[None]) for photo in photos[500:1500]]
        found = 0
        for start in range(0, 1000 - 128, 128):
            counts = {name: [0] * len(entry.counts) for name, entry in reference.features.items()}
            for row in rows[start : start + 128]:
                for name, value in row.items():
                    counts[name][reference.features[name].bin(value)] += 1
            found += judge(reference, counts, {})[0].is_drift
        return found

    noise = np.random.default_rng(0)
    assert alarms(lambda photo: photo) == 0
    assert alarms(lambda photo: photo * 0.7) == 7
    assert alarms(lambda photo: photo + noise.normal(0, 25, photo.shape).astype(np.float32)) == 7
