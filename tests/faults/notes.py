# SPDX-License-Identifier: Apache-2.0
"""What the fault tests counted, for the table in the docs: one JSON line each in the file that EDGEOPT_FAULTS names."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

FILE = "EDGEOPT_FAULTS"


def note(table: str, cells: Iterable[tuple[str, str, bool]]) -> None:
    """Count cases of a table: the fault, where it struck, whether all was well. Nothing where nobody collects."""
    file = os.environ.get(FILE)
    if not file:
        return
    counts = Counter(cells)
    with Path(file).open("a") as out:
        for (fault, where, is_well), number in counts.items():
            line = {"table": table, "fault": fault, "where": where, "well": is_well, "cases": number}
            out.write(json.dumps(line) + "\n")
