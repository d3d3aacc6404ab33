# SPDX-License-Identifier: Apache-2.0
"""The result as a JSON document and as Markdown: one table a model, one line a file, a dash where there is no figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from judging import Row

MIB = 2**20


def document(machine: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everything, for a program: model name -> description, notes and rows."""
    shown = {
        name: {**entry, "rows": [asdict(row) for row in entry["rows"]]} if "rows" in entry else entry
        for name, entry in found.items()
    }
    return {"schema": "edgeopt.benchmark/2", "machine": machine, "models": shown}


def markdown(machine: str, found: dict[str, dict[str, Any]]) -> str:
    """Everything, for a person."""
    parts = [
        f"Machine: {machine}. Times are medians of interleaved runs over the same runtime's float file: below 1 is faster."
    ]
    for name, entry in found.items():
        parts.append(f"## {name}")
        if "skipped" in entry:
            parts.append(f"Skipped: {entry['skipped']}")
            continue
        parts.append(f"{entry['description']}.")
        parts += [f"- {note}" for note in entry["notes"]]
        rows: Sequence[Row] = entry["rows"]
        parts.append(_table([row for row in rows if not row.error]))
        parts += [f"- {row.name}: {row.error}" for row in rows if row.error]
    return "\n\n".join(parts) + "\n"


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
    if row.value is None:
        return "-"
    around = f" ({row.low:.3f} to {row.high:.3f})" if row.low is not None else ""
    return f"{row.metric} {row.value:.3f}{around}"


def _built(row: Row) -> str:
    return f"{(row.peak_bytes - row.base_bytes) / MIB:.0f}" if row.peak_bytes else "-"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("file", lambda row: row.name),
    ("metric", _metric),
    ("agreement", lambda row: _number(row.agreement, 3)),
    ("SQNR dB", lambda row: _number(row.sqnr_db, 1)),
    ("KL", lambda row: _number(row.kl, 4)),
    ("clipped", lambda row: _share(row.clipped_share)),
    ("MB", lambda row: _number(row.size_bytes / 1e6, 3)),
    ("in integers", lambda row: _share(row.integer_share)),
    ("time / float, 1 thread", lambda row: _number(row.against_float.get("1"), 2)),
    ("2 threads", lambda row: _number(row.against_float.get("2"), 2)),
    ("built in s", lambda row: _number(row.build_s, 1)),
    ("peak MiB", lambda row: _number(row.peak_bytes / MIB, 0) if row.peak_bytes else "-"),
    ("of it the build", _built),
)
