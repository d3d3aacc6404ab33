# SPDX-License-Identifier: Apache-2.0
import hashlib
import importlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from edgeopt_agent.probe import ProbeRequest
from edgeopt_wire.document import canonical_bytes, from_bytes, to_bytes
from edgeopt_wire.errors import RecipeError, StoreError
from edgeopt_wire.manifest import Compatible, FileEntry, Manifest, Provenance, Variant
from edgeopt_wire.measurement import Conditions, Measurement, Timing
from edgeopt_wire.tensor import TensorSpec

subject = importlib.import_module("edgeopt.measure")  # the package's attribute of that name is the function

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
DIGEST = "b" * 64
IDENTITY = {"package_sha256": DIGEST, "device_id": "build-host", "device_class": "host"}


def measured(p50_ns: int, **changes: object) -> Measurement:
    found = Measurement(
        package_sha256=DIGEST,
        model="tiny",
        version="1",
        variant="a",
        precision="fp32",
        device_id="build-host",
        device_class="host",
        agent_version="0",
        measured_at=NOON,
        conditions=Conditions("null", "1.0", 1, 1, "cpu", "x86_64", "", ""),
        timing=Timing.of([p50_ns] * 100, warmup=1, load_ns=1, first_inference_ns=1),
        golden_ok=True,
        stable=True,
    )
    return replace(found, **changes)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ProbeRequest]]:
    """Requests in the order in which they were made; round r of any variant takes 5 - r ms."""
    requests: list[ProbeRequest] = []

    def answer(request: ProbeRequest, **_: object) -> Measurement:
        requests.append(request)
        number = sum(earlier.variant == request.variant for earlier in requests) - 1
        return measured((5 - number) * 1_000_000, variant=request.variant)

    monkeypatch.setattr(subject, "run_probe", answer)
    return requests


def test_rounds_are_interleaved_and_the_fastest_counts(asked: list[ProbeRequest]) -> None:
    seen: list[tuple[str, int]] = []
    found = subject.measure(
        Path("package"),
        ["a", "b"],
        **IDENTITY,
        rounds=3,
        progress=lambda variant, number, _: seen.append((variant, number)),
    )
    assert [request.variant for request in asked] == ["a", "b", "a", "b", "a", "b"]
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    timing = found["b"].timing
    assert timing is not None
    assert timing.p50_ns == 3_000_000
    assert [entry["p50_ns"] for entry in found["b"].extra["rounds"]] == [5_000_000, 4_000_000, 3_000_000]
    assert from_bytes(Measurement, to_bytes(found["b"])) == found["b"]


def test_budget_and_identity_reach_the_probe(asked: list[ProbeRequest]) -> None:
    subject.measure(Path("package"), ["a"], **IDENTITY, stand_in_for="raspberry-pi-4", budget=subject.QUICK)
    (request,) = asked
    assert (request.minimum_runs, request.minimum_ns) == (
        subject.QUICK.minimum_runs,
        subject.QUICK.minimum_ns,
    )
    assert (request.package_sha256, request.device_id, request.stand_in_for) == (
        DIGEST,
        "build-host",
        "raspberry-pi-4",
    )


def test_a_round_that_failed_is_the_result_however_fast_the_others_were() -> None:
    crash = measured(1, timing=None, error="died", golden_ok=False)
    found = subject.best_round([measured(5), crash, measured(4)])
    assert found.error == "died"
    assert found.extra["rounds"][1] == {"error": "died"}


def test_a_round_that_missed_the_golden_outputs_is_the_result() -> None:
    assert not subject.best_round([measured(5), measured(9, golden_ok=False), measured(4)]).golden_ok


@pytest.mark.parametrize(("variants", "rounds"), [([], 1), (["a", "a"], 1), (["a"], 0)])
def test_nothing_to_measure_is_refused(variants: list[str], rounds: int) -> None:
    with pytest.raises(RecipeError, match="at least one round"):
        subject.measure(Path("package"), variants, **IDENTITY, rounds=rounds)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no package"):
        subject.measure(tmp_path, ["a"], **IDENTITY)


def test_null_variants_are_measured_for_real_on_this_host(tmp_path: Path) -> None:
    spec = TensorSpec("x", (1, 2), "float32")
    contents = {"fast": {"latency_ns": 0}, "slow": {"latency_ns": 3_000_000}}
    for name, model in contents.items():
        (tmp_path / f"{name}.json").write_bytes(canonical_bytes({"schema": "edgeopt.null-model/1", **model}))
    for folder in ("golden/inputs", "golden/outputs/tiny"):
        (tmp_path / folder).mkdir(parents=True)
        np.save(tmp_path / folder / "0.npy", np.ones((1, 2), np.float32))
    manifest = Manifest(
        name="tiny",
        version="1",
        device="host",
        compatible=Compatible(("host",)),
        signature_inputs=(spec,),
        signature_outputs=(spec,),
        variants=tuple(
            Variant(name, "null", "fp32", f"{name}.json", (spec,), (spec,), "golden/outputs/tiny", 30.0)
            for name in contents
        ),
        files=tuple(
            FileEntry(file.name, file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
            for file in sorted(tmp_path.glob("*.json"))
        ),
        golden_inputs="golden/inputs",
        baseline={},
        provenance=Provenance("0" * 64, "0" * 64),
    )
    (tmp_path / "manifest.json").write_bytes(to_bytes(manifest))
    brief = subject.ProbeBudget(warmup_ns=0, minimum_runs=20, minimum_ns=0, maximum_ns=2_000_000_000)
    found = subject.measure(tmp_path, ["slow", "fast"], **IDENTITY, budget=brief, rounds=2)
    assert all(result.golden_exact and len(result.extra["rounds"]) == 2 for result in found.values())
    slow, fast = found["slow"].timing, found["fast"].timing
    assert slow is not None
    assert fast is not None
    assert slow.p50_ns >= 3_000_000 > fast.p50_ns
