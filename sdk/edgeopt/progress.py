# SPDX-License-Identifier: Apache-2.0
"""How long work tells what it is doing, without knowing who watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


class Watcher(Protocol):
    """Somebody who shows progress: a terminal, a notebook, nobody."""

    def begin(self, stage: str, total: int | None) -> None:
        """A stage begins; `total` is its number of steps, None where nobody knows."""

    def advance(self) -> None:
        """One step of the stage is done."""

    def end(self, detail: str, seconds: float, *, cached: bool) -> None:
        """The stage is done."""


class Silent:
    """A watcher that shows nothing."""

    def begin(self, stage: str, total: int | None) -> None:
        """Show nothing."""

    def advance(self) -> None:
        """Show nothing."""

    def end(self, detail: str, seconds: float, *, cached: bool) -> None:
        """Show nothing."""


@dataclass
class Step:
    """The stage in hand: call `advance` after each step, set `cached` and `detail` before it ends."""

    advance: Callable[[], None]
    cached: bool = False
    detail: str = ""


@dataclass(frozen=True)
class Finished:
    """A stage that is done."""

    name: str
    seconds: float
    cached: bool
    detail: str


class Progress:
    """Names and times the stages of one piece of work, and passes them on to a watcher."""

    def __init__(
        self, watcher: Watcher | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._watcher = watcher or Silent()
        self._clock = clock
        self.finished: list[Finished] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Step]:
        """Time one stage; an exception passes through and leaves the stage unfinished."""
        self._watcher.begin(name, total)
        step = Step(self._watcher.advance)
        start = self._clock()
        yield step
        seconds = self._clock() - start
        self.finished.append(Finished(name, seconds, step.cached, step.detail))
        self._watcher.end(step.detail, seconds, cached=step.cached)
