# SPDX-License-Identifier: Apache-2.0
"""The result as a JSON document and as Markdown: one table a model, one line a file, a dash where there is no figure.

A file that could not be made, or that its runtime refuses, is a line with what was said; the whole message is in the
JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from figures import AGREEMENTS
from glance import glance
from judging import Row
from never_slower import summary, verdicts
from work import NOT_APPLICABLE

MIB = 2**20
LEGEND = (
    "Times are medians of interleaved runs over the same runtime's float file (below 1 is faster), and milliseconds. MB "
    "are of the file, with its share of the same runtime's float file. Built: seconds of the quantization itself, of the "
    "whole process with its imports, and of the processors in that process; measured alike for all, one after another, "
    "each with the whole machine. Files that an earlier run made here (`--fresh` makes them anew) show processor time "
    "alone: what else ran on the machine then is not known."
)
MESSAGE = 200
"""Characters of an error that a line shows."""


def document(machine: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everything, for a program: model name -> description, notes and rows."""
    shown = {
        name: {**entry, "rows": [asdict(row) for row in entry["rows"]]} if "rows" in entry else entry
        for name, entry in found.items()
    }
    speed = [{**asdict(verdict), "shipped": verdict.shipped} for verdict in verdicts(found)]
    return {"schema": "edgeopt.benchmark/4", "machine": machine, "models": shown, "never_slower": speed}


def markdown(machine: str, found: dict[str, dict[str, Any]]) -> str:
    """Everything, for a person."""
    parts = [f"Machine: {machine}."]
    first = glance(found)
    if first:
        parts += ["### At a glance", "\n".join(first)]
    speed = summary(found)
    if speed:
        parts += ["### Never slower", "\n".join(speed)]
    parts += ["### Every file", LEGEND]
    for name, entry in found.items():
        parts.append(f"#### {name}")
        if "skipped" in entry:
            parts.append(f"Skipped: {entry['skipped']}")
            continue
        parts.append(f"{entry['description']}. Agreement: {AGREEMENTS.get(entry['task'], 'none')}.")
        parts += [f"- {note}" for note in entry["notes"]]
        parts.append(_table(entry["rows"]))
    return "\n\n".join(parts) + "\n"


def write_between(page: Path, text: str, name: str = "tables") -> None:
    """Write into a page between `<!-- NAME: begin -->` and `<!-- NAME: end -->`; all of a page that has neither.

    Raises:
        SystemExit: It has one mark, or them in another order.
    """
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in before and end not in before:
        page.write_text(text, encoding="utf-8")
        return
    head, found, rest = before.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} needs both {begin} and {end}, in this order")
    page.write_text(f"{head}{begin}\n\n{text}\n{end}{tail}", encoding="utf-8")


def _table(rows: Sequence[Row]) -> str:
    heads = [head for head, _ in COLUMNS]
    lines = [_line(heads), _line(["---"] + ["---:"] * (len(heads) - 1))]
    lines += [_line([cell(row) for _, cell in COLUMNS]) for row in rows]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _metric(row: Row) -> str:
    if row.error:
        said = " ".join(row.error.split()).replace("|", "/")
        shown = said if len(said) <= MESSAGE else f"{said[:MESSAGE]}..."
        return shown if said.startswith(NOT_APPLICABLE) else f"**fails**: {shown}"
    if row.value is None:
        return "-"
    around = f" ({row.low:.3f} to {row.high:.3f})" if row.low is not None else ""
    return f"{row.metric} {row.value:.3f}{around}"


def _size(row: Row) -> str:
    if not row.size_bytes:
        return "-"
    share = f" ({row.of_float:.2f})" if row.of_float is not None else ""
    return f"{row.size_bytes / 1e6:.3f}{share}"


def _time(row: Row, threads: str) -> str:
    if threads not in row.p50_ns:
        return "-"
    return f"{_number(row.against_float.get(threads), 2)} ({row.p50_ns[threads] / 1e6:.3g})"


def _built(row: Row) -> str:
    return f"{(row.peak_bytes - row.base_bytes) / MIB:.0f}" if row.peak_bytes else "-"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("file", lambda row: row.name),
    ("metric", _metric),
    ("agreement", lambda row: _number(row.agreement, 3)),
    ("SQNR dB", lambda row: _number(row.sqnr_db, 1)),
    ("KL", lambda row: _number(row.kl, 4)),
    ("clipped", lambda row: _share(row.clipped_share)),
    ("MB", _size),
    ("in integers", lambda row: _share(row.integer_share)),
    ("time / float (ms), 1 thread", lambda row: _time(row, "1")),
    ("2 threads", lambda row: _time(row, "2")),
    ("built in s", lambda row: "-" if row.kept else _number(row.build_s, 1)),
    ("with imports", lambda row: "-" if row.kept else _number(row.process_s, 1)),
    ("processor s", lambda row: _number(row.cpu_s or None, 1)),
    ("peak MiB", lambda row: _number(row.peak_bytes / MIB, 0) if row.peak_bytes else "-"),
    ("of it the build", _built),
)
