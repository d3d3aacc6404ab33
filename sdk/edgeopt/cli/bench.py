# SPDX-License-Identifier: Apache-2.0
"""`edgeopt bench`: measure a package's variants on this machine, by the probe that devices run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeopt.cli._output import console_err, emit, json_option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from edgeopt_wire.manifest import Manifest
    from edgeopt_wire.measurement import Measurement


@click.command("bench")
@click.argument("package", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--variant", "chosen", multiple=True, help="Only this variant; may be repeated.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option("--quick", is_flag=True, help="A first look: shorter rounds.")
@json_option
def command(package: Path, chosen: tuple[str, ...], rounds: int, quick: bool, as_json: bool) -> None:
    """Measure the variants of PACKAGE on this machine; golden outputs are compared first.

    Exit code 1 if a variant that can run here gives wrong outputs.
    """
    from edgeopt.cli._progress import TerminalWatcher
    from edgeopt.measure import QUICK, ProbeBudget, measure
    from edgeopt.package import opened
    from edgeopt.progress import Progress
    from edgeopt_wire.document import to_json

    with opened(package) as (folder, manifest, digest), TerminalWatcher(console_err()) as watcher:
        variants = list(chosen) or [variant.id for variant in manifest.variants]
        with Progress(watcher).stage("measure", len(variants) * rounds) as step:
            found = measure(
                folder,
                variants,
                package_sha256=digest,
                device_id="this-host",
                device_class="host",
                stand_in_for="" if manifest.device == "host" else manifest.device,
                budget=QUICK if quick else ProbeBudget(),
                rounds=rounds,
                progress=lambda *_: step.advance(),
            )
    document = {
        "schema": "edgeopt.bench/1",
        "package": str(package),
        "sha256": digest,
        "name": manifest.name,
        "version": manifest.version,
        "device": manifest.device,
        "measurements": [to_json(measurement) for measurement in found.values()],
    }
    emit(document, as_json, lambda console: _print(console, manifest, found))
    if any(measurement.timing is not None and not measurement.golden_ok for measurement in found.values()):
        sys.exit(1)


def _print(console: Console, manifest: Manifest, found: Mapping[str, Measurement]) -> None:
    from rich.table import Table

    first = next(iter(found.values())).conditions
    table = Table(
        title=f"{manifest.title}, measured on {first.cpu} ({first.architecture})", title_justify="left"
    )
    for heading in (
        "variant",
        "threads",
        "load ms",
        "first ms",
        "min ms",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "n",
        "golden",
        "note",
    ):
        table.add_column(heading, justify="left" if heading in ("variant", "golden", "note") else "right")
    for name, measurement in found.items():
        table.add_row(name, str(measurement.conditions.threads), *_cells(measurement))
    console.print(table)
    for warning in sorted({warning for measurement in found.values() for warning in measurement.warnings}):
        console.print(f"[yellow]note:[/] {warning}", highlight=False)


def _cells(measurement: Measurement) -> list[str]:
    timing = measurement.timing
    if timing is None:
        return ["-"] * 8 + [measurement.error]
    golden = "exact" if measurement.golden_exact else "ok" if measurement.golden_ok else "WRONG"
    figures: list[Any] = [
        timing.load_ns, timing.first_inference_ns, timing.min_ns, timing.p50_ns, timing.p90_ns, timing.p99_ns,
    ]  # fmt: skip
    cells = ["-" if value is None else f"{value / 1e6:.2f}" for value in figures]
    return [*cells, str(timing.n), golden, "" if measurement.stable else "not stable"]
