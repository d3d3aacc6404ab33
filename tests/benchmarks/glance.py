# SPDX-License-Identifier: Apache-2.0
"""Our files beside the best of all others, a line a model and runtime: what a reader looks for first.

Two peers stand in a line: the one with the highest SQNR, and the one with the lowest p50 on one thread; they are rarely
the same, and the share of multiply-accumulates that each computes in integers stands beside it. A float file is no peer,
and neither is an int8 file that computes in floats among the most faithful: it is as good as floats are (`runs`). Files
of 4-bit weights are compared with such only, and of ours the one with the highest SQNR is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from judging import Row
from never_slower import OURS

HEADS = (
    "model", "runtime", "weights", "SQNR dB", "best other's", "metric (float's)", "of float's size",
    "times faster than float, 1 thread", "p50 / fastest other's", "peak of the build MiB (fastest other's)",
)  # fmt: skip
MOSTLY = 0.5
"""From this share of multiply-accumulates in integers on a file runs in integers, or from ours on where that is less."""

PLAIN = "nearest"
"""Rows of ours that show what rounding gains are left out."""


def glance(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table; nothing where nothing of ours was judged."""
    lines = [_line(cells) for model, entry in found.items() for cells in _cells(model, entry.get("rows", ()))]
    return [_line(HEADS), _line(["---"] * 3 + ["---:"] * (len(HEADS) - 3)), *lines] if lines else []


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(model: str, rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    good = [row for row in rows if not row.error and row.sqnr_db is not None]
    floats = {row.runtime: row for row in good if not row.peer and row.name == f"float, {row.runtime}"}
    made = [row for row in good if row.peer]
    for runtime, bits in dict.fromkeys((row.runtime, row.bits) for row in made):
        alike = [row for row in made if (row.runtime, row.bits) == (runtime, bits)]
        ours = [row for row in alike if row.peer == OURS and (bits == 4 or PLAIN not in row.name)]
        if ours:
            others = [row for row in alike if row.peer != OURS]
            yield (model, runtime, f"int{bits}", *_compare(max(ours, key=_sqnr), others, floats.get(runtime)))


def _sqnr(row: Row) -> float:
    return row.sqnr_db or 0.0


def _compare(ours: Row, others: Sequence[Row], base: Row | None) -> tuple[str, ...]:
    best = max((row for row in others if runs(row, ours)), key=_sqnr, default=None)
    timed = [row for row in others if "1" in row.p50_ns]
    fastest = min(timed, key=lambda row: row.p50_ns["1"], default=None)
    own = ours.p50_ns.get("1")
    faster = 1 / ours.against_float["1"] if "1" in ours.against_float else None
    behind = own / fastest.p50_ns["1"] if own and fastest else None
    return (
        f"{_sqnr(ours):.1f}",
        f"{_sqnr(best):.1f} ({best.name}; {_share(best)})" if best else "-",
        f"{ours.metric} {_number(ours.value, 3)} ({_number(base.value if base else None, 3)})",
        _number(ours.of_float, 2),
        _number(faster, 2),
        f"{_number(behind, 2)} ({fastest.name}; {_share(fastest)})" if fastest else "-",
        f"{_peak(ours)} ({_peak(fastest) if fastest else '-'})",
    )


def runs(row: Row, ours: Row) -> bool:
    """Whether a file computes in integers; one that cannot be read counts, and the line says that it was not read."""
    if row.bits != 8 or row.integer_share is None:
        return True
    return row.integer_share >= min(MOSTLY, ours.integer_share or MOSTLY)


def _share(row: Row) -> str:
    return "integers not read" if row.integer_share is None else f"{100 * row.integer_share:.0f} % integers"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _peak(row: Row) -> str:
    return f"{(row.peak_bytes - row.base_bytes) / 2**20:.0f}" if row.peak_bytes else "-"
