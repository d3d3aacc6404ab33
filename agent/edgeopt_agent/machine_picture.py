# SPDX-License-Identifier: Apache-2.0
"""The table of transitions for people: `python -m edgeopt_agent.machine_picture PAGE` writes it into a page of the docs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from edgeopt_agent.machine import WORK
from edgeopt_agent.transitions import TRANSITIONS, Transition
from edgeopt_wire.messages import Phase

BEGIN = "<!-- written by `python -m edgeopt_agent.machine_picture`: begin -->"
END = "<!-- end -->"


def table() -> str:
    """Every row in order, as Markdown."""
    lines = ["| in | on | if | to | then |", "|---|---|---|---|---|", *map(_line, TRANSITIONS)]
    return "\n".join(lines)


def picture() -> str:
    """The phases and what leads from one to another, as Mermaid."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for row in TRANSITIONS:
        if row.to is None or len(row.phases) == len(Phase):
            continue
        for phase in Phase:
            words = arrows.setdefault((phase.value, row.to.value), [])
            if phase in row.phases and row.kind.value not in words:
                words.append(row.kind.value)
    lines = [f"    {a} --> {b}: {', '.join(words)}" for (a, b), words in sorted(arrows.items()) if words]
    return "\n".join(["```mermaid", "stateDiagram-v2", "    [*] --> resolving: desired", *lines, "```"])


def write_into(page: str) -> str:
    """The page with the picture and the table as they are now.

    Raises:
        ValueError: The page has no place for them.
    """
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{picture()}\n\n{table()}\n\n{END}{after}"


def _line(row: Transition) -> str:
    effects = [effect.value for effect in row.effects]
    if row.to is not None or row.is_counted:
        effects += [WORK[row.to].value] if row.to in WORK else []
    if row.to is None and row.is_counted and row.phases <= WORK.keys():
        effects.append("the phase's work")
    then = [text for text in (_said(row.change), ", ".join(effects)) if text]
    return f"| {_phases(row)} | {row.kind.value} | {_said(row.when)} | {row.to.value if row.to else '(stays)'} | {'; '.join(then)} |"


def _phases(row: Transition) -> str:
    if len(row.phases) == len(Phase):
        return "any"
    if row.phases == frozenset(Phase) - WORK.keys():
        return "at rest"
    if row.phases == frozenset(WORK):
        return "at work"
    return ", ".join(phase.value for phase in Phase if phase in row.phases)


def _said(function: Callable[..., object] | None) -> str:
    text = (function.__doc__ or "").partition("\n")[0].rstrip(".") if function is not None else ""
    return "" if text == "Nothing else" else text[:1].lower() + text[1:]


def main() -> None:
    """Write the page that the command line names, or to the terminal."""
    if len(sys.argv) == 2:
        path = Path(sys.argv[1])
        path.write_text(write_into(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.stdout.write(f"{picture()}\n\n{table()}\n")


if __name__ == "__main__":
    main()
