# SPDX-License-Identifier: Apache-2.0
"""Latencies of boards that are not at hand: fitted costs give back what was published, with an interval, or nothing."""

import os
from dataclasses import replace
from math import exp, log
from pathlib import Path

import numpy as np
import pytest

from edgeopt_profiles.latency import fit, table
from edgeopt_profiles.latency.architectures import family, layers
from edgeopt_profiles.latency.work import FEATURES, features
from edgeopt_profiles.profile import load_profile

FOUR = table.Asked("litert", 4)
NO_DATA = "EDGEOPT_DATA" not in os.environ
LITE0 = features(layers("efficientnet_lite0", 224))


def _estimate(
    device: str, asked: table.Asked, work: tuple[float, ...], number: str = "int8"
) -> table.Found | str:
    return table.estimate(table.load(), load_profile(device), asked, {number: work})


@pytest.mark.parametrize(
    ("model", "side", "macs_m", "parameters_m"),
    [
        ("mobilenet_v1_0.75", 192, 239.3, 2.57), ("mobilenet_v2_1.0", 224, 300.8, 3.47), ("vgg16", 224, 15470, 138.3),
        ("resnet50_v1.5", 224, 4089, 25.5), ("resnet18", 224, 1814, 11.7), ("efficientnet_lite4", 300, 2550, 12.9),
        ("mobilenet_v3_large_1.0", 224, 217, 5.45), ("mlperf_tiny_ad_autoencoder", 640, 0.264, 0.264),
    ],
)  # fmt: skip
def test_layers_have_the_papers_work(model: str, side: int, macs_m: float, parameters_m: float) -> None:
    found = layers(model, side)
    assert sum(entry.macs for entry in found) / 1e6 == pytest.approx(macs_m, rel=0.01)
    assert sum(entry.weights for entry in found) / 1e6 == pytest.approx(parameters_m, rel=0.02)


def test_what_is_not_known_has_no_layers() -> None:
    assert layers("vit_base", 224) == ()
    assert family("mobilenet_v2_0.35") == family("mobilenet_v2_1.4") == "mobilenet_v2"


@pytest.mark.parametrize(
    ("model", "side", "published_ms"),
    [("mobilenet_v2_1.0", 224, 17.0), ("mobilenet_v1_1.0", 224, 24.0)],
)
def test_a_raspberry_pi_4_takes_what_others_measured(model: str, side: int, published_ms: float) -> None:
    """XNNPACK's own figures, int8 with 4 threads (github.com/google/XNNPACK README)."""
    found = _estimate("raspberry-pi-4", FOUR, features(layers(model, side)))
    assert isinstance(found, table.Found)
    assert found.way == "runtime"
    assert found.low_ms <= published_ms <= found.high_ms
    assert found.sources


def test_an_interval_is_wider_the_further_away_its_evidence_is() -> None:
    same = _estimate("raspberry-pi-4", FOUR, LITE0)
    other = _estimate("raspberry-pi-4", table.Asked("onnxruntime", 4), LITE0)
    elsewhere = _estimate("raspberry-pi-5", FOUR, LITE0)
    assert [entry.way for entry in (same, other, elsewhere) if isinstance(entry, table.Found)] == [
        "runtime",
        "device",
        "kind",
    ]
    assert isinstance(same, table.Found)
    assert isinstance(other, table.Found)
    assert isinstance(elsewhere, table.Found)
    assert log(same.high_ms / same.low_ms) < log(elsewhere.high_ms / elsewhere.low_ms)
    assert log(same.high_ms / same.low_ms) < log(other.high_ms / other.low_ms)
    assert "no measurements of this board" in elsewhere.basis


def test_more_cores_and_a_faster_clock_are_faster() -> None:
    one, four = (_estimate("raspberry-pi-5", table.Asked("litert", count), LITE0) for count in (1, 4))
    assert isinstance(one, table.Found)
    assert isinstance(four, table.Found)
    assert four.ms < one.ms
    profile = load_profile("raspberry-pi-5")
    slow = replace(profile, cpu=replace(profile.cpu, max_mhz=1200))
    found = table.estimate(table.load(), slow, FOUR, {"int8": LITE0})
    assert isinstance(found, table.Found)
    assert found.ms > four.ms


def test_a_profile_without_a_clock_gives_a_reason_and_no_figure() -> None:
    found = _estimate("android", FOUR, LITE0)
    assert isinstance(found, str)
    assert "no clock" in found


def test_what_is_far_larger_than_anything_published_gives_a_reason() -> None:
    found = _estimate("raspberry-pi-4", FOUR, tuple(1000 * value for value in LITE0))
    assert isinstance(found, str)
    assert "far from the published" in found


def test_what_stays_in_floats_costs_what_floats_cost() -> None:
    half = tuple(value / 2 for value in LITE0)
    mixed = table.estimate(
        table.load(), load_profile("raspberry-pi-4"), FOUR, {"int8": half, "float32": half}
    )
    whole = _estimate("raspberry-pi-4", FOUR, LITE0)
    floats = _estimate("raspberry-pi-4", FOUR, LITE0, "float32")
    assert isinstance(mixed, table.Found)
    assert isinstance(whole, table.Found)
    assert isinstance(floats, table.Found)
    assert whole.ms < mixed.ms < floats.ms


def test_costs_are_found_again_from_latencies_that_they_made() -> None:
    rng = np.random.default_rng(0)
    truth = np.log(np.array(fit.START_MS)) + rng.normal(0, 0.3, len(FEATURES))
    names = (
        "mobilenet_v1_0.25",
        "mobilenet_v2_1.0",
        "resnet18",
        "resnet50",
        "vgg16",
        "efficientnet_b0",
        "mnasnet_1.0",
    )
    work = np.array([features(layers(name, side)) for name in names for side in (96, 160, 224)])
    latency = fit.predict_ms(work, truth) * np.exp(rng.normal(0, 0.02, len(work)))
    found = fit.fit_one(work, latency, np.log(np.array(fit.START_MS)))
    unseen = np.array([features(layers("mobilenet_v3_large_1.0", 224))])
    assert float(fit.predict_ms(unseen, found)[0]) == pytest.approx(
        float(fit.predict_ms(unseen, truth)[0]), rel=0.1
    )


def test_one_throttled_run_does_not_bend_a_fit() -> None:
    mean = np.log(np.array(fit.START_MS))
    work = np.array([features(layers("mobilenet_v2_1.0", side)) for side in (96, 128, 160, 192, 224)])
    latency = fit.predict_ms(work, mean)
    latency[2] *= 4
    found = fit.fit_one(work, latency, mean)
    assert float(fit.predict_ms(work[4], found)) == pytest.approx(
        float(fit.predict_ms(work[4], mean)), rel=0.15
    )


def test_the_table_is_small_and_every_interval_holds_its_estimate() -> None:
    assert table.FILE.stat().st_size < 16_000
    for low, high in table.load().residuals.values():
        assert low < 0 < high
        assert exp(high - low) < 12


@pytest.mark.skipif(NO_DATA, reason="EDGEOPT_DATA names no folder of real data")
def test_layers_have_the_work_that_is_published_beside_each_latency() -> None:
    from edgeopt_profiles.latency.published import read

    rows = read(Path(os.environ["EDGEOPT_DATA"]))
    assert len(rows) > 2900
    for row in rows:
        macs = sum(row.work[2:7])
        # what papers and vendors count differs by bias, gates and rounding of channels
        assert macs == pytest.approx(row.macs_m, rel=0.22, abs=1.5), row.model


@pytest.mark.skipif(NO_DATA, reason="EDGEOPT_DATA names no folder of real data")
def test_a_network_that_was_left_out_is_estimated_better_than_by_its_multiply_accumulates() -> None:
    """One network of the whole table that `tests/benchmarks/estimator.py` prints."""
    from edgeopt_profiles.latency.published import grouped, read

    rows = read(Path(os.environ["EDGEOPT_DATA"]))
    train = grouped(tuple(row for row in rows if row.model != "mobilenet_v1_0.75"), lambda row: row.group)
    groups = {
        name: fit.Group(
            of[0].kind, np.array([row.work for row in of]), np.array([row.latency_ms for row in of])
        )
        for name, of in train.items()
    }
    costs, _ = fit.fit_groups(groups)
    held = [row for row in rows if row.model == "mobilenet_v1_0.75" and row.group in costs]
    ours = [abs(float(fit.predict_ms(row.work, costs[row.group])) / row.latency_ms - 1) for row in held]
    per_mac = []
    for row in held:
        rate = np.median([entry.latency_ms / entry.macs_m for entry in train[row.group]])
        per_mac.append(abs(rate * row.macs_m / row.latency_ms - 1))
    assert np.median(ours) < 0.15
    assert np.median(ours) < np.median(per_mac) / 2
