# SPDX-License-Identifier: Apache-2.0
"""What a published index says that a device must have: measured, or said to be unknown."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from edgeopt.needs import MIB, needs
from edgeopt.package import opened, report_path
from edgeopt.publish import publish
from edgeopt.report.document import BuildReport, Candidate
from edgeopt_wire.document import to_bytes
from edgeopt_wire.manifest import Manifest, Provenance

MakePackage = Callable[..., Path]


def write_report(package: Path, manifest: Manifest, sha256: str, peak_bytes: int | None) -> None:
    """A build's report with one candidate, whose measurement is another test's matter."""
    from edgeopt_wire.measurement import Conditions, Measurement, Timing

    measured = Measurement(
        package_sha256=sha256, model="tiny", version="1", variant="a", precision="fp32", device_id="", device_class="host",
        agent_version="0", measured_at=datetime.fromisoformat("2026-11-25T00:00:00+00:00"),
        conditions=Conditions("null", "1", 1, 1, "cpu", "x86_64", "a CPU", "linux"),
        timing=Timing.of([1000], warmup=0, load_ns=1, first_inference_ns=1), peak_memory_bytes=peak_bytes, golden_ok=True,
    )  # fmt: skip
    candidate = Candidate(
        "a", "null", "null", "fp32", 1, "cpu", 1, shipped=True, reason="", measurement=measured
    )
    report = BuildReport(
        "tiny", "1", "x", "host", "host", {}, (), "a", (candidate,), (), Provenance("0" * 64, "0" * 64),
        package_sha256=sha256,
    )  # fmt: skip
    report_path(package).write_bytes(to_bytes(report))


def test_index_names_the_memory_that_was_measured_and_where(
    make_package: MakePackage, keys: Path, noon: datetime, tmp_path: Path
) -> None:
    package = make_package()
    with opened(package) as (_, manifest, sha256):
        pass
    write_report(package, manifest, sha256, 61 * MIB + 1)
    before = package.read_bytes()
    found = publish(package, tmp_path / "repo", keys, now=noon).index.compatible
    assert (found.memory_mib, found.extra["memory_measured_on"]) == (62, "a CPU (x86_64)")
    assert found.runtimes == {"null": ""}
    assert package.read_bytes() == before, "the package's bytes repeat; a measurement would not"


def test_without_the_packages_own_report_the_memory_is_not_known(make_package: MakePackage) -> None:
    package = make_package()
    with opened(package) as (_, manifest, sha256):
        pass
    assert needs(manifest, package, sha256).memory_mib == 0
    write_report(package, manifest, "1" * 64, 61 * MIB)
    assert needs(manifest, package, sha256).memory_mib == 0, "another build's report"
    write_report(package, manifest, sha256, None)
    assert needs(manifest, package, sha256).memory_mib == 0


def test_runtimes_carry_the_oldest_version_that_any_of_their_variants_needs(
    make_package: MakePackage,
) -> None:
    with opened(make_package()) as (_, manifest, sha256):
        pass
    (one,) = manifest.variants
    several = (
        replace(one, id="a", runtime="litert", minimum_runtime="2.10"),
        replace(one, id="b", runtime="litert", minimum_runtime="2.9"),
        replace(one, id="c", runtime="onnxruntime", minimum_runtime="1.20"),
        replace(one, id="d", runtime="onnxruntime"),
    )
    changed = replace(manifest, variants=several)
    assert needs(changed, Path("x.edgeopt"), sha256).runtimes == {"litert": "2.9", "onnxruntime": ""}
