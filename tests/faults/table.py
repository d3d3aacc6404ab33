# SPDX-License-Identifier: Apache-2.0
"""`python table.py NOTES [PAGE]`: what the fault tests counted, as Markdown; into a page between its marks `faults`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

HEADS = {
    "power cuts": "what is left",
    "system calls": "fault at a call that writes",
    "states": "fault in a state",
}
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"

Counts = Mapping[tuple[str, str, bool], int]
"""Cases by table, fault, and whether all was well."""


def read(notes: Path) -> Counts:
    """Add up what `notes.note` wrote."""
    counts: Counter[tuple[str, str, bool]] = Counter()
    for line in notes.read_text().splitlines():
        entry = json.loads(line)
        counts[entry["table"], entry["fault"], entry["well"]] += entry["cases"]
    return counts


def markdown(counts: Counts) -> str:
    """One table, a row a fault."""
    lines = ["| | cases | all well | failed |", "|---|---:|---:|---:|"]
    for table, head in HEADS.items():
        faults = list(dict.fromkeys(fault for at, fault, _ in counts if at == table))
        if faults:
            lines.append(f"| **{head}** | | | |")
        lines += [
            _row(fault, *(counts.get((table, fault, well), 0) for well in (True, False))) for fault in faults
        ]
    well, failed = (
        sum(n for (_, _, is_well), n in counts.items() if is_well is wanted) for wanted in (True, False)
    )
    return "\n".join([*lines, _row("**all**", well, failed)])


def _row(name: str, well: int, failed: int) -> str:
    return f"| {name} | {well + failed} | {well} | {failed} |"


def main() -> None:
    """Print the table, or write it into the page."""
    text = markdown(read(Path(sys.argv[1])))
    if len(sys.argv) == 2:
        print(text)
        return
    page = Path(sys.argv[2])
    head, begun, rest = page.read_text().partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not begun or not ended:
        raise SystemExit(f"{page} needs {BEGIN} and {END}, in this order")
    page.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")


if __name__ == "__main__":
    main()
