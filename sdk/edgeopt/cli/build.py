# SPDX-License-Identifier: Apache-2.0
"""`edgeopt build`: compress a model for a device class, measure it, and pack it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeopt.cli._output import console_err, emit, json_option

if TYPE_CHECKING:
    from rich.console import Console

    from edgeopt.build import BuildOutcome
    from edgeopt.plan import Plan
    from edgeopt.predict import Prediction
    from edgeopt.request import BuildRequest


def _devices(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 - click's
    from edgeopt_profiles.profile import profile_ids

    return [name for name in profile_ids() if name.startswith(incomplete)]


@click.command("build")
@click.argument("model")
@click.option("--device", required=True, shell_complete=_devices, help="Device class, see `edgeopt devices`.")
@click.option("--calibration", default="", metavar="DATA", help="Data that sets int8 ranges.")
@click.option(
    "--evaluation",
    default="",
    metavar="DATA",
    help="Other data, labelled or not, that quality is measured on.",
)
@click.option(
    "--evaluation-limit",
    type=click.IntRange(1),
    help="Use only this many samples of it, drawn with a fixed seed.",
)
@click.option("--max-drop", metavar="SHARE", help="Largest loss of the metric, e.g. 1% (points) or 1%rel.")
@click.option(
    "--max-latency", metavar="TIME", help="Largest p90 on the device, measured there or estimated, e.g. 10ms."
)
@click.option("--max-size", metavar="SIZE", help="Largest model file, e.g. 5MB.")
@click.option(
    "--mem", metavar="SIZE", help="Largest peak memory of a process that runs the model, e.g. 200MB."
)
@click.option(
    "--min-coverage", metavar="SHARE", help="Least share of multiply-accumulates in integers, e.g. 95%."
)
@click.option(
    "--effort",
    type=click.Choice(["quick", "default", "extensive"]),
    help="How much work goes into accuracy. [default: the recipe's, else default]",
)
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="TOML file with everything else, see docs/build.md."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder for the package.",
)
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Folder of finished stages.")
@click.option("--no-cache", is_flag=True, help="Make every stage again and keep none.")
@click.option("--quick", is_flag=True, help="Measure shorter and once, for a first look.")
@click.option(
    "--sign-with",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder with builder.pem, see `edgeopt keys create`: signs how the package came to be.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be made, and stop.")
@json_option
def command(
    model: str, cache: Path | None, no_cache: bool, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Compress MODEL for a device class, measure every candidate, and pack what is right.

    MODEL is package.module:factory, file.py:factory, a .pt2 or an .onnx file. DATA is a folder of images (class
    folders or labels.csv), an .npz file, or module:factory.

    Exit codes: 0 done, 1 failed, 2 usage, 3 the budget was not met (the report shows the nearest candidates).
    """
    from edgeopt.build import build
    from edgeopt.cache import Cache, default_folder
    from edgeopt.cli._progress import TerminalWatcher
    from edgeopt.progress import Progress
    from edgeopt.suiting import foresee_build, plan_build

    request = _request(model, **options)
    if dry_run:
        plan = plan_build(request)
        foreseen = foresee_build(request, plan)
        emit(_plan_document(plan, foreseen), as_json, lambda console: _print_plan(console, plan, foreseen))
        return
    store = Cache(None if no_cache else cache or default_folder())
    with TerminalWatcher(console_err()) as watcher:
        outcome = build(request, store, Progress(watcher))
    emit(_document(outcome), as_json, lambda console: _print_outcome(console, outcome))
    if outcome.package is None:
        sys.exit(3)


def _request(
    model: str,
    *,
    device: str,
    calibration: str,
    evaluation: str,
    evaluation_limit: int | None,
    max_drop: str | None,
    max_latency: str | None,
    max_size: str | None,
    mem: str | None,
    min_coverage: str | None,
    effort: str | None,
    recipe: Path | None,
    output: Path,
    quick: bool,
    sign_with: Path | None,
) -> BuildRequest:
    from dataclasses import replace

    from edgeopt.budget import Budget, parse_drop, parse_duration_ns, parse_share, parse_size_bytes
    from edgeopt.cli.keys import ask_passphrase
    from edgeopt.keys import BUILDER, load_signer
    from edgeopt.recipe import Recipe, load_recipe
    from edgeopt.request import BuildRequest

    allowed, relative = parse_drop(max_drop) if max_drop else (None, False)
    wanted = load_recipe(recipe) if recipe else Recipe()
    budget = Budget(
        max_drop=allowed,
        relative=relative,
        max_memory_bytes=parse_size_bytes(mem) if mem else None,
        min_coverage=parse_share(min_coverage) if min_coverage else None,
        max_latency_ns=parse_duration_ns(max_latency) if max_latency else None,
        max_size_bytes=parse_size_bytes(max_size) if max_size else None,
    )
    return BuildRequest(
        model=model,
        device=device,
        calibration=calibration,
        evaluation=evaluation,
        evaluation_limit=evaluation_limit,
        budget=budget,
        recipe=replace(wanted, effort=effort) if effort else wanted,
        output=output,
        quick=quick,
        builder=load_signer(sign_with, BUILDER, ask_passphrase) if sign_with else None,
    )


def _plan_document(plan: Plan, foreseen: dict[str, Prediction]) -> dict[str, Any]:
    from edgeopt_wire.document import to_json

    return {
        "schema": "edgeopt.plan/1",
        "device": plan.device.id,
        "artifacts": [
            {"id": a.id, "format": a.format, "precision": a.precision, "pass": a.pass_name, "file": a.file}
            for a in plan.artifacts
        ],
        "candidates": [
            {
                "id": c.id,
                "artifact": c.artifact,
                "runtime": c.runtime,
                "threads": c.threads,
                "accelerator": c.accelerator,
                "reference": c.reference,
                **({"prediction": to_json(foreseen[c.id])} if c.id in foreseen else {}),
            }
            for c in plan.candidates
        ],
    }


def _print_plan(console: Console, plan: Plan, foreseen: dict[str, Prediction]) -> None:
    from rich.table import Table

    table = Table(title=f"What a build for {plan.device.id} makes", title_justify="left")
    for heading in ("candidate", "file", "made by", "threads", "runs on", "shipped"):
        table.add_column(heading)
    for candidate in plan.candidates:
        artifact = plan.artifact(candidate.artifact)
        shipped = "no, for comparison" if candidate.reference else "if it keeps the budget"
        made_by = artifact.pass_name or "lowering"
        table.add_row(
            candidate.id, artifact.file, made_by, str(candidate.threads), candidate.accelerator, shipped
        )
    console.print(table)
    for name, prediction in foreseen.items():
        if prediction.estimate is not None:
            console.print(f"{name}: {prediction.estimate.sentence()}", highlight=False)
    for reason in dict.fromkeys(found.reason for found in foreseen.values() if found.reason):
        console.print(f"no estimate: {reason}", highlight=False)


def _document(outcome: BuildOutcome) -> dict[str, Any]:
    from edgeopt_wire.document import to_json

    document: dict[str, Any] = to_json(outcome.report)
    document["files"] = {
        "package": str(outcome.package) if outcome.package else None,
        "report": str(outcome.report_json),
        "page": str(outcome.report_html),
    }
    return document


def _print_outcome(console: Console, outcome: BuildOutcome) -> None:
    from edgeopt.report.table import print_table

    print_table(console, outcome.report)
    if outcome.package is None:
        console.print(
            "[bold red]The budget was not met; no package was written.[/] The table shows why, nearest first."
        )
    else:
        size = outcome.package.stat().st_size / 1e6
        console.print(f"package  {outcome.package} ({size:.2f} MB)", soft_wrap=True)
    console.print(f"report   {outcome.report_html}", soft_wrap=True)
