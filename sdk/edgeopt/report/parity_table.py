# SPDX-License-Identifier: Apache-2.0
"""The same integers in several runtimes, as rows for a page: one for each pair of files and each output."""

from __future__ import annotations

from collections.abc import Iterable

from edgeopt.evaluate.parity_runtimes import RuntimePair
from edgeopt.report.table import number

HEADS = (
    "files", "same weights", "output", "largest difference", "mean", "in steps", "SQNR dB", "agreement", "samples",
)  # fmt: skip


def rows(pairs: Iterable[RuntimePair]) -> list[tuple[str, ...]]:
    """One row an output of two files that carry the same integers; differences are in the output's own unit."""
    return [
        (
            f"{pair.first} / {pair.second}",
            f"{100 * pair.same_weights:.2f} %",
            difference.name,
            f"{difference.max_abs:.3g}",
            f"{difference.mean_abs:.3g}",
            number(difference.max_steps, "{:.0f}"),
            f"{difference.sqnr_db:.1f}",
            number(difference.agreement, "{:.3f}"),
            str(pair.samples),
        )
        for pair in pairs
        if pair.is_same
        for difference in pair.differences
    ]


def others(pairs: Iterable[RuntimePair]) -> list[str]:
    """A sentence for each two files that carry other integers."""
    return [
        f"{pair.first} and {pair.second} are not compared: {100 * pair.same_weights:.0f} % of their int8 weights are "
        "the same integers, because their runtimes need other ones or their formats were rounded apart."
        for pair in pairs
        if not pair.is_same
    ]
