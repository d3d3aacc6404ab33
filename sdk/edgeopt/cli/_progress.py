# SPDX-License-Identifier: Apache-2.0
"""Progress bars on stderr: one line a stage with its time, a bar where the number of steps is known."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


class TerminalWatcher:
    """Shows stages while they run and leaves one line behind for each. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._stage = ""

    def __enter__(self) -> TerminalWatcher:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, stage: str, total: int | None) -> None:
        """Show a new bar."""
        self._stage = stage
        self._task = self._bars.add_task(stage, total=total)

    def advance(self) -> None:
        """Move the bar by one."""
        if self._task is not None:
            self._bars.advance(self._task)

    def end(self, detail: str, seconds: float, *, cached: bool) -> None:
        """Replace the bar by a line."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        how = "cached" if cached else f"{seconds:.1f} s"
        self._console.print(f"  [green]done[/] {self._stage:<44} {how:>9}  [dim]{detail}[/]", highlight=False)
