# SPDX-License-Identifier: Apache-2.0
"""`edgeopt analyze`: where a model's int8 error comes from, and what would help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeopt.cli._output import console_err, emit, json_option

if TYPE_CHECKING:
    from rich.console import Console

    from edgeopt.analyze import Analysis

BAR = 24


@click.command("analyze")
@click.argument("model")
@click.option(
    "--device", default="host", show_default=True, help="Device class whose int8 scheme is analysed."
)
@click.option("--calibration", required=True, metavar="DATA", help="Data that sets int8 ranges.")
@click.option("--evaluation", default="", metavar="DATA", help="Other data that the error is measured on.")
@click.option("--recipe", type=click.Path(path_type=Path), help="TOML file, see docs/build.md.")
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Folder of finished stages.")
@click.option("--no-cache", is_flag=True, help="Make every stage again and keep none.")
@json_option
def command(
    model: str,
    device: str,
    calibration: str,
    evaluation: str,
    *,
    recipe: Path | None,
    cache: Path | None,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Tell where MODEL's int8 error comes from: weights, activations, clipping, and which tensors most.

    Nothing is packed. What it makes is kept in the cache, so that a build afterwards starts there.
    """
    from edgeopt.analyze import analyze
    from edgeopt.cache import Cache, default_folder
    from edgeopt.cli._progress import TerminalWatcher
    from edgeopt.progress import Progress
    from edgeopt.recipe import Recipe, load_recipe
    from edgeopt.request import BuildRequest
    from edgeopt_wire.document import to_json

    request = BuildRequest(
        model=model,
        device=device,
        calibration=calibration,
        evaluation=evaluation,
        recipe=load_recipe(recipe) if recipe else Recipe(),
    )
    store = Cache(None if no_cache else cache or default_folder())
    with TerminalWatcher(console_err()) as watcher:
        found = analyze(request, store, Progress(watcher))
    emit(to_json(found), as_json, lambda console: _print(console, found))


def _print(console: Console, found: Analysis) -> None:
    from rich.table import Table

    parts = found.attribution
    console.print(f"{found.model} in {found.scheme} for {found.device}, {parts.samples} samples")
    rows = (
        ("weights alone", parts.weights_db),
        ("activations alone", parts.activations_db),
        ("of these, clipping", parts.clipping_db),
        ("everything", parts.whole_db),
    )
    table = Table(box=None, padding=(0, 1), header_style="underline")
    table.add_column("part")
    table.add_column("SQNR dB", justify="right")
    for name, value in rows:
        table.add_row(name, f"{value:.1f}")
    console.print(table)
    console.print(
        f"most of it comes from [bold]{parts.dominant}[/]; what helps: {parts.cure()}", highlight=False
    )
    worst = Table(
        title="the tensors that cost most, each alone", title_justify="left", box=None, padding=(0, 1)
    )
    for heading in ("tensor", "kind", "made or read by", "SQNR dB", "share of the error"):
        worst.add_column(heading, justify="right" if heading == "SQNR dB" else "left")
    for entry in parts.tensors:
        bar = "#" * round(BAR * entry.share / max(parts.tensors[0].share, 1e-9))
        worst.add_row(
            entry.name,
            entry.kind,
            f"{entry.operator} {entry.node}",
            f"{entry.sqnr_db:.1f}",
            f"{100 * entry.share:4.1f} % {bar}",
        )
    console.print(worst)
    console.print(found.coverage.sentence(), highlight=False)
    for text in (*found.problems, *found.notes):
        console.print(f"[yellow]note:[/] {text}", highlight=False)
    if found.exclude:
        names = ", ".join(f'"{name}"' for name in found.exclude)
        console.print(
            f"to leave the worst in floats, put into the recipe:\n\\[quantize]\nexclude = [{names}]",
            highlight=False,
        )
