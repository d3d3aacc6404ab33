# SPDX-License-Identifier: Apache-2.0
"""The report in a terminal: one line a candidate, then what fell back to floats and what a reader must know."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from edgeopt.plan import OWN_FILES
from edgeopt.report.document import BuildReport, Candidate

FLOATS_SHOWN = 5
HEADING, FIGURE = 6, 5
"""Letters of a heading, and of the figures below it, that fit 80 columns beside the others."""
FOR_COMPARISON = "for comparison only"
"""How the reason of a float reference ends; a terminal does not repeat it."""


def print_table(console: Console, report: BuildReport) -> None:
    """Print candidates, fall-backs and warnings."""
    samples = next((c.quality.samples for c in report.candidates if c.quality), 0)
    measured = f"measured on {samples} samples" if samples else "quality not measured"
    title = f"{report.model} {report.version} for {report.device}: {measured}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), header_style="underline")
    for heading in (
        "candidate",
        "MB",
        metric_of(report),
        "agree",
        "SQNR",
        "p50 ms",
        "p90 ms",
        "x float",
        "ship",
    ):
        is_name = heading == "candidate"
        table.add_column(
            heading if is_name else heading[:HEADING],
            justify="left" if is_name else "right",
            no_wrap=not is_name,
            overflow="fold",
            min_width=None if is_name else FIGURE,
        )
    for candidate in report.candidates:
        mark = "yes" if candidate.shipped else ""
        table.add_row(*cells(candidate), mark, style="" if candidate.shipped else "dim")
    console.print(table)
    for candidate in report.candidates:
        if not candidate.shipped and not candidate.reason.endswith(FOR_COMPARISON):
            console.print(f"[yellow]not shipped[/] {candidate.id}: {candidate.reason}", highlight=False)
    _print_estimates(console, report)
    _print_floats(console, report)
    for warning in report.warnings:
        console.print(f"[yellow]note:[/] {warning}", highlight=False)


def cells(candidate: Candidate) -> list[str]:
    """One candidate's figures as text; a dash where there is none."""
    quality = candidate.quality
    timing = candidate.measurement.timing if candidate.measurement else None
    called = f" ({candidate.calibration})" if candidate.calibration else ""
    return [
        f"{candidate.id}{called}",
        f"{candidate.file_bytes / 1e6:.2f}",
        number(quality.value if quality else None, "{:.3f}"),
        number(quality.agreement if quality else None, "{:.3f}"),
        number(quality.sqnr_db if quality else None, "{:.1f}"),
        number(timing.p50_ns / 1e6 if timing else None, "{:.2f}"),
        number(timing.p90_ns / 1e6 if timing else None, "{:.2f}"),
        number(candidate.times_faster, "{:.2f}"),
    ]


def metric_of(report: BuildReport) -> str:
    """What the column of the judged figure is called."""
    name = next((c.quality.metric for c in report.candidates if c.quality and c.quality.metric), "top1")
    return "top-1" if name == "top1" else name


def file_of(candidate: Candidate) -> str:
    """What a reader calls a candidate's file: by its format, or by the runtime that takes another's format."""
    kind = candidate.runtime if candidate.runtime in OWN_FILES else candidate.format
    return f"{kind} {candidate.precision}"


def number(value: float | None, form: str) -> str:
    """Format a figure, or a dash where there is none."""
    return "-" if value is None else form.format(value)


def _print_estimates(console: Console, report: BuildReport) -> None:
    """What the device itself would take, clearly no measurement; reasons once each."""
    for candidate in report.candidates:
        if candidate.estimate is not None:
            console.print(
                f"[cyan]{candidate.estimate.short()}[/] {candidate.id} on {report.device}, not measured",
                highlight=False,
            )
    for reason in dict.fromkeys(c.no_estimate for c in report.candidates if c.no_estimate):
        console.print(f"[cyan]no estimate[/] for {report.device}: {reason}", highlight=False)


def _print_floats(console: Console, report: BuildReport) -> None:
    seen: set[str] = set()
    for candidate in report.candidates:
        key = file_of(candidate)
        if not candidate.float_operators or key in seen:
            continue
        seen.add(key)
        shown = ", ".join(f"{op.type} {op.name}" for op in candidate.float_operators[:FLOATS_SHOWN])
        rest = len(candidate.float_operators) - FLOATS_SHOWN
        more = f" and {rest} more" if rest > 0 else ""
        console.print(
            f"[yellow]in floats[/] ({key}): {len(candidate.float_operators)} of "
            f"{candidate.operators} operators: {shown}{more}",
            highlight=False,
        )
