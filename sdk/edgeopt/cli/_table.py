# SPDX-License-Identifier: Apache-2.0
"""A table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A plain table; columns of milliseconds and megabytes stand to the right."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 1), header_style="underline")
    for heading in heads:
        made.add_column(heading, justify="right" if heading.endswith(("ms", "MB")) else "left")
    for row in rows:
        made.add_row(*row)
    return made
