# SPDX-License-Identifier: Apache-2.0
"""What is shipped and why: nothing slower than float, nothing that covers too little, the float file in its place."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from edgeopt import reporting
from edgeopt.artifacts import Description, Made
from edgeopt.budget import Budget
from edgeopt.coverage import Coverage
from edgeopt.plan import make_plan
from edgeopt.predict import Estimate, Prediction
from edgeopt.recipe import Recipe
from edgeopt.report.choices import choose
from edgeopt.report.work import Work
from edgeopt.request import BuildRequest
from edgeopt.sources import Source
from edgeopt.validate import Validation
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import load_profile
from edgeopt_wire.manifest import Compatible, FileEntry, Manifest, Provenance, Quality, Variant
from edgeopt_wire.measurement import Conditions, Measurement, Timing
from edgeopt_wire.tensor import TensorSpec

SPEC = (TensorSpec("x", (1, 4), "float32"),)
DIGEST = "0" * 64


def _measurement(variant: str, p50_ns: int, min_ns: int | None = None) -> Measurement:
    samples = [min_ns or p50_ns, *[p50_ns] * 100]
    conditions = Conditions("onnxruntime", "1", 1, 1, "cpu", "x86_64", "cpu", "linux")
    return Measurement(
        DIGEST, "net", "1", variant, "int8", "host", "host", "1", datetime(2026, 1, 1, tzinfo=UTC), conditions,
        Timing.of(samples, warmup=1, load_ns=1, first_inference_ns=1), golden_ok=True,
    )  # fmt: skip


def _work(
    folder: Path, times: dict[str, tuple[int, int]], device: str = "host", budget: Budget | None = None
) -> Work:
    """A build of `device` whose candidates took these (p50, min) nanoseconds; all others took 100."""
    plan = make_plan(load_profile(device), Recipe())
    made = {}
    for artifact in plan.artifacts:
        file = folder / artifact.id
        file.write_bytes(b"x" * (10 if artifact.precision == "int8" else 40))
        made[artifact.id] = Made(artifact, file, Description(artifact.format, "net", SPEC, SPEC))
    variants = tuple(
        Variant(
            c.id, c.runtime, "int8", plan.artifact(c.artifact).file, SPEC, SPEC, "golden", 20.0, c.threads,
            quality=Quality(100, agreement=0.99, sqnr_db=25.0),
        )
        for c in plan.candidates
    )  # fmt: skip
    manifest = Manifest(
        "net", "1", "host", Compatible(("host",)), SPEC, SPEC, variants,
        tuple(FileEntry(artifact.file, 10, DIGEST) for artifact in plan.artifacts), "golden", {},
        Provenance(DIGEST, DIGEST),
    )  # fmt: skip
    measured = {c.id: _measurement(c.id, *times.get(c.id, (100, 100))) for c in plan.candidates}
    return Work(
        BuildRequest("net", device, budget=budget or Budget()), plan, made,
        Source(Model("onnx", None, "net", SPEC, SPEC), DIGEST, "net"), manifest, Validation({}, ()), measured,
    )  # fmt: skip


def test_what_is_faster_is_shipped_and_its_reference_is_not(tmp_path: Path) -> None:
    found = choose(_work(tmp_path, {"onnxruntime-int8-1t": (50, 50)}))
    assert found["onnxruntime-int8-1t"].shipped
    assert not found["onnxruntime-fp32-1t"].shipped


def test_what_is_slower_is_not_shipped_and_the_float_file_is(tmp_path: Path) -> None:
    found = choose(_work(tmp_path, {"onnxruntime-int8-1t": (130, 130)}))
    assert not found["onnxruntime-int8-1t"].shipped
    assert "0.77 times its speed" in found["onnxruntime-int8-1t"].reason
    assert found["onnxruntime-fp32-1t"].shipped
    assert "in its place" in found["onnxruntime-fp32-1t"].reason


@pytest.mark.parametrize("times", [(102, 102), (130, 90)])
def test_noise_is_not_taken_for_slowness(tmp_path: Path, times: tuple[int, int]) -> None:
    assert choose(_work(tmp_path, {"onnxruntime-int8-1t": times}))["onnxruntime-int8-1t"].shipped


def test_a_float_file_that_breaks_the_budget_is_not_shipped_instead(tmp_path: Path) -> None:
    found = choose(_work(tmp_path, {"onnxruntime-int8-1t": (130, 130)}, budget=Budget(max_size_bytes=20)))
    assert not found["onnxruntime-fp32-1t"].shipped
    assert "--max-size" in found["onnxruntime-fp32-1t"].reason


def test_another_kind_of_machine_does_not_judge_speed(tmp_path: Path) -> None:
    work = _work(tmp_path, {"onnxruntime-int8-1t": (130, 130)}, device="raspberry-pi-5")
    found = choose(work)
    candidate = next(c.id for c in work.plan.candidates if c.id.startswith("onnxruntime-int8"))
    assert found[candidate].shipped
    assert "the device's to measure" in found[candidate].reason


def _predicted(
    work: Work, own_ms: tuple[float, float, float], reference_ms: tuple[float, float, float]
) -> Work:
    def prediction(values: tuple[float, float, float]) -> Prediction:
        return Prediction(
            Estimate(*(round(value * 1e6) for value in values), "runtime", "published latencies")
        )

    return replace(
        work,
        predictions={
            "onnxruntime-int8-1t": prediction(own_ms),
            "onnxruntime-fp32-1t": prediction(reference_ms),
        },
    )


def test_what_is_estimated_to_be_slower_with_confidence_is_not_shipped(tmp_path: Path) -> None:
    work = _work(tmp_path, {}, device="raspberry-pi-5")
    found = choose(_predicted(work, (30, 21, 40), (15, 10, 20)))
    assert not found["onnxruntime-int8-1t"].shipped
    assert "estimated 30 ms (21 to 40)" in found["onnxruntime-int8-1t"].reason
    assert found["onnxruntime-fp32-1t"].shipped


def test_what_is_estimated_to_be_perhaps_slower_is_the_devices_to_measure(tmp_path: Path) -> None:
    work = _work(tmp_path, {}, device="raspberry-pi-5")
    found = choose(_predicted(work, (30, 19, 40), (15, 10, 20)))
    assert found["onnxruntime-int8-1t"].shipped
    assert "which measures it" in found["onnxruntime-int8-1t"].reason


def test_ranges_found_at_run_time_are_not_counted_as_static_integers(tmp_path: Path) -> None:
    work = _work(tmp_path, {"onnxruntime-int8-1t": (50, 50)}, budget=Budget(min_coverage=0.9))
    artifact = next(c.artifact for c in work.plan.candidates if c.id == "onnxruntime-int8-1t")
    coverage = Coverage(
        "onnxruntime", "1", 2, 2, 2, 2, macs=100, integer_macs=95, conversions=2, dynamic=1, dynamic_macs=20
    )
    reason = choose(replace(work, coverage={artifact: coverage}))["onnxruntime-int8-1t"].reason
    assert "75.0 %" in reason
    assert "another 20.0 % with ranges found at run time" in reason


def test_too_few_operations_in_integers_break_the_budget(tmp_path: Path) -> None:
    work = _work(tmp_path, {"onnxruntime-int8-1t": (50, 50)}, budget=Budget(min_coverage=0.9))
    artifact = next(c.artifact for c in work.plan.candidates if c.id == "onnxruntime-int8-1t")
    coverage = Coverage("onnxruntime", "1", 2, 1, 2, 1, macs=100, integer_macs=50, conversions=2, dynamic=0)
    found = choose(replace(work, coverage={artifact: coverage}))
    assert not found["onnxruntime-int8-1t"].shipped
    assert "50.0 %" in found["onnxruntime-int8-1t"].reason


def test_openvino_promises_nothing_for_cpus_without_the_instructions_that_it_was_timed_with() -> None:
    plan = make_plan(load_profile("x86-64"), Recipe(runtimes=("onnxruntime", "openvino")))
    (said,) = reporting._timed_otherwise(plan, ("avx2", "avx512_vnni"))
    assert "VNNI only" in said
    assert reporting._timed_otherwise(plan, ("avx2",)) == ()
    plain = make_plan(load_profile("x86-64"), Recipe(runtimes=("onnxruntime",)))
    assert reporting._timed_otherwise(plain, ("avx512_vnni",)) == ()
