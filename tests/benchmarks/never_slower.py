# SPDX-License-Identifier: Apache-2.0
"""Which of our files are slower than their float file, and what a build ships instead.

The rule is that of `edgeopt build`: slower is what is so by the median and by the best run, beyond the noise of two runs
of one file. A file that could not be made is not shipped either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from judging import Row
from work import NOT_APPLICABLE

OURS = "ours"
THREADS = ("1", "2")


@dataclass(frozen=True)
class Verdict:
    """One of our files on so many threads. `ratio` is None where nothing was timed; `why` says then why."""

    model: str
    file: str
    runtime: str
    threads: str
    ratio: float | None
    best: float | None = None
    why: str = ""

    @property
    def is_slower(self) -> bool:
        """Whether it is not shipped for its speed."""
        from edgeopt.report.choices import SLOWER

        return self.ratio is not None and self.best is not None and min(self.ratio, self.best) > SLOWER

    @property
    def shipped(self) -> str:
        """What a build does with it."""
        if self.ratio is None:
            return f"not shipped: {self.why}"
        return "not shipped: the float file is" if self.is_slower else "shipped"


def verdicts(found: Mapping[str, Mapping[str, Any]]) -> Iterator[Verdict]:
    """One verdict for each of our files and number of threads."""
    for model, entry in found.items():
        rows: Sequence[Row] = entry.get("rows", ())
        for row in rows:
            if row.peer != OURS or row.error.startswith(NOT_APPLICABLE):
                continue
            for threads in THREADS:
                ratio, best = row.against_float.get(threads), row.best_against_float.get(threads)
                why = (
                    ""
                    if ratio is not None
                    else row.error or f"no float file of {row.runtime} to compare with"
                )
                yield Verdict(model, row.name, row.runtime, threads, ratio, best, why)


def summary(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table, and a sentence; nothing where nothing of ours was timed."""
    listed = list(verdicts(found))
    if not listed:
        return []
    timed = [verdict for verdict in listed if verdict.ratio is not None]
    lines = [
        "| model | file | threads | time / float | best run / float | |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {v.model} | {v.file} | {v.threads} | {_ratio(v.ratio)} | {_ratio(v.best)} | {v.shipped} |"
        for v in listed
    ]
    runtimes = dict.fromkeys(verdict.runtime for verdict in timed)
    return [*lines, "", *(f"- {_counted(name, timed)}" for name in runtimes), f"- {_counted('', timed)}"]


def _counted(runtime: str, timed: Sequence[Verdict]) -> str:
    """How many were timed and are slower, of a runtime or (empty) of all."""
    own = [verdict for verdict in timed if verdict.runtime == runtime or not runtime]
    slower = sum(verdict.is_slower for verdict in own)
    return f"{runtime or 'all'}: {len(own)} timed, {len(own) - slower} shipped, {slower} slower than float and not shipped"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
