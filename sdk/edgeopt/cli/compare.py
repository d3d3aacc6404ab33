# SPDX-License-Identifier: Apache-2.0
"""`edgeopt compare`: how far two models' outputs are apart, output by output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgeopt.cli._output import emit, json_option

if TYPE_CHECKING:
    from rich.console import Console

    from edgeopt.evaluate.parity import Parity


@click.command("compare")
@click.argument("first")
@click.argument("second")
@click.option("--data", default="", metavar="DATA", help="Samples to run. [default: random ones]")
@click.option("--limit", type=click.IntRange(1), help="Use only this many of them.")
@json_option
def command(first: str, second: str, data: str, *, limit: int | None, as_json: bool) -> None:
    """Run FIRST and SECOND on the same samples and tell how far their outputs are apart.

    A model is a package (PACKAGE.edgeopt or PACKAGE.edgeopt:VARIANT), an .onnx or a .tflite file. SQNR takes the
    first as the signal; steps are of the second's output where it is quantized, else of the first's.
    """
    from edgeopt.compare import compare
    from edgeopt_wire.document import to_json

    found = compare(first, second, data, limit=limit)
    document: dict[str, Any] = {
        "schema": "edgeopt.comparison/1",
        "first": first,
        "second": second,
        "data": data or "random",
        "equal": found.is_equal,
        **to_json(found),
    }
    emit(document, as_json, lambda console: _print(console, found, data))


def _print(console: Console, found: Parity, data: str) -> None:
    from rich.table import Table

    title = (
        f"{found.samples} {'samples' if data else 'random samples'}, outputs matched by {found.matched_by}"
    )
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), header_style="underline")
    for heading in ("output", "largest", "p99.9", "mean", "in steps", "within 1", "equal", "SQNR", "agree"):
        table.add_column(heading, justify="left" if heading == "output" else "right")
    for row in found.differences:
        table.add_row(
            row.name if row.name == row.other_name else f"{row.name} / {row.other_name}",
            f"{row.max_abs:.3g}",
            f"{row.p999_abs:.3g}",
            f"{row.mean_abs:.3g}",
            _dash(row.max_steps, "{:.0f}"),
            _dash(row.within_one_step, "{:.4f}"),
            f"{row.equal:.4f}",
            f"{row.sqnr_db:.1f}",
            _dash(row.agreement, "{:.3f}"),
        )
    console.print(table)
    if found.is_equal:
        console.print("every value of every output is exactly the same")


def _dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
