# SPDX-License-Identifier: Apache-2.0
"""`edgeopt inspect`: what is in a package, how good each variant is, and what was measured when it was built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeopt.cli._output import emit, json_option
from edgeopt.cli._provenance import describe, say

if TYPE_CHECKING:
    from rich.console import Console

    from edgeopt.report.document import BuildReport
    from edgeopt_wire.manifest import Manifest, Variant


@click.command("inspect")
@click.argument("package", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def command(package: Path, as_json: bool) -> None:
    """Show manifest, variants, baseline and measured gains of PACKAGE.

    Latencies come from the report beside the package, because a signed package holds nothing that a second build
    would not give again. Without that report they are left out, and it is said.
    """
    from edgeopt.provenance import read_provenance
    from edgeopt_wire.archive import PackageReader

    with PackageReader(package) as reader:
        digest = reader.verify()
        manifest = reader.manifest
        provenance = read_provenance(reader)
    report, why_not = _report(package, digest)
    document = _document(package, digest, manifest, report, why_not)
    document["provenance"] = describe(provenance)

    def show(console: Console) -> None:
        _print(console, document)
        console.print(say(provenance), soft_wrap=True, highlight=False)

    emit(document, as_json, show)


def _report(package: Path, digest: str) -> tuple[BuildReport | None, str]:
    """The report beside the package, if it is that package's."""
    from edgeopt.package import report_path
    from edgeopt.report.document import BuildReport
    from edgeopt_wire.document import from_bytes
    from edgeopt_wire.errors import DocumentError

    path = report_path(package)
    if not path.is_file():
        return (
            None,
            f"no {path.name} lies beside the package: latencies are not known here; try `edgeopt bench`",
        )
    try:
        report = from_bytes(BuildReport, path.read_bytes())
    except DocumentError as error:
        return None, f"{path.name} cannot be read: {error}"
    if report.package_sha256 != digest:
        return (
            None,
            f"{path.name} is the report of another build (its package has sha256 {report.package_sha256[:12]})",
        )
    return report, ""


def _document(
    package: Path, digest: str, manifest: Manifest, report: BuildReport | None, why_not: str
) -> dict[str, Any]:
    from edgeopt_wire.document import to_json

    baseline: dict[str, Any] = dict(manifest.baseline)
    if report is not None:
        found = report.candidate(report.baseline)
        timing = found.measurement.timing if found.measurement else None
        baseline["p50_ms"] = timing.p50_ns / 1e6 if timing else None
    return {
        "schema": "edgeopt.inspect/1",
        "package": str(package),
        "sha256": digest,
        "package_bytes": package.stat().st_size,
        "name": manifest.name,
        "version": manifest.version,
        "device": manifest.device,
        "baseline": baseline,
        "variants": [_variant(manifest, variant, report) for variant in manifest.variants],
        "measurements_missing": why_not,
        "manifest": to_json(manifest),
    }


def _variant(manifest: Manifest, variant: Variant, report: BuildReport | None) -> dict[str, Any]:
    quality = variant.quality
    size = manifest.file(variant.file).size_bytes
    baseline_bytes = manifest.baseline.get("file_bytes")
    row: dict[str, Any] = {
        "id": variant.id,
        "runtime": variant.runtime,
        "precision": variant.precision,
        "threads": variant.threads,
        "accelerator": variant.accelerator,
        "calibration": variant.extra.get("calibration", ""),
        "file_bytes": size,
        "times_smaller": round(baseline_bytes / size, 3) if baseline_bytes and size else None,
        "samples": quality.samples if quality else 0,
        "metric": quality.metric if quality else "",
        "metric_value": quality.value if quality else None,
        "metric_baseline": quality.baseline_value if quality else None,
        "agreement": quality.agreement if quality else None,
        "sqnr_db": quality.sqnr_db if quality else None,
        "p50_ms": None,
        "p90_ms": None,
        "times_faster": None,
        "measured_on": None,
    }
    if report is not None:
        candidate = report.candidate(variant.id)
        if candidate.measurement is not None and candidate.measurement.timing is not None:
            row["p50_ms"] = candidate.measurement.timing.p50_ns / 1e6
            row["p90_ms"] = candidate.measurement.timing.p90_ns / 1e6
            row["times_faster"] = candidate.times_faster
            row["measured_on"] = candidate.measurement.conditions.cpu
    return row


def _print(console: Console, document: dict[str, Any]) -> None:
    from rich.table import Table

    from edgeopt.report.table import number
    from edgeopt.uncalibrated import SAID

    console.print(
        f"[bold]{document['name']} {document['version']}[/] for {document['device']}, "
        f"{document['package_bytes'] / 1e6:.2f} MB, sha256 {document['sha256'][:12]}",
        highlight=False,
    )
    table = Table(box=None, padding=(0, 1), header_style="underline")
    for heading in ("variant", "MB", "x smaller", "metric", "agree", "SQNR dB", "p50 ms", "x faster"):
        table.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=True)
    for row in document["variants"]:
        table.add_row(
            f"{row['id']}\n  ({row['calibration']})" if row["calibration"] else row["id"],
            f"{row['file_bytes'] / 1e6:.2f}",
            number(row["times_smaller"], "{:.2f}"),
            number(row["metric_value"], "{:.3f}"),
            number(row["agreement"], "{:.3f}"),
            number(row["sqnr_db"], "{:.1f}"),
            number(row["p50_ms"], "{:.2f}"),
            number(row["times_faster"], "{:.2f}"),
        )
    console.print(table)
    measured_on = next((row["measured_on"] for row in document["variants"] if row["measured_on"]), "")
    if measured_on:
        console.print(
            f"[dim]p50 on {measured_on}; x faster: against float in the same runtime[/]", highlight=False
        )
    if any(row["calibration"] for row in document["variants"]):
        console.print(f"[yellow]note:[/] {SAID}", highlight=False)
    if document["measurements_missing"]:
        console.print(f"[yellow]note:[/] {document['measurements_missing']}", highlight=False)
