# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: which operators get which number format, so that a goal is kept at the least cost in time.

How it goes:
- Every operator's own error is measured once; that is the order. All operators begin in int8.
- The worst k operators are raised to their most accurate level, k doubled until the goal is kept, then halved between
  what failed and what kept it (at most log2 of the operators, twice).
- Then, the largest operator first, each is put back into int8 or into a level between, as long as the goal is kept and
  nothing gets slower. Last, levels below int8 are tried, the largest weights first: they must make the file smaller.
- Every try is a real file: quantized, and run over the evaluation samples in the runtime. It is timed interleaved with
  the float file, or estimated where this machine cannot speak for the device; the journal says which.

Rules:
- Anytime: after each try the journal is replaced whole, and the best file so far lies beside it, loadable. Killed at
  any moment, the next search with the same inputs goes on behind the last try.
- The best is the fastest that keeps the goal (of those alike, the smallest file); while none does, the nearest to it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeopt_wire import seam
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import EdgeoptError, RecipeError, RuntimeFailure

JOURNAL, BEST = "search.json", "best.bin"
MAX_TRIES = 25
ALIKE = 1.03
"""Times nearer than this are taken as equal, and the smaller file is better."""

BASE = "int8"
EXTRA_LEVELS = ("int4", "int16")
"""What is tried only where a recipe names it: four bits cost accuracy everywhere, 16-bit activations time."""

LOWERED = 8
"""How many operators are tried below int8, the largest first: they hold most of the bytes."""

REFUSED = 2
"""A level that was no better so many times is not tried again: 16-bit activations on a CPU are an example."""


@dataclass(frozen=True)
class Change:
    """An operator and the level that it has instead of int8."""

    operator: str
    level: str


Changes = tuple[Change, ...]


@dataclass(frozen=True)
class Judged:
    """How near a file is to the float model: the drop as a budget counts it, SQNR in dB, KL in nats where there is one."""

    drop: float
    sqnr_db: float
    kl: float | None = None


@dataclass(frozen=True)
class Goal:
    """What is to be kept: `metric` is drop or kl (at most `limit`) or sqnr_db (at least `limit`)."""

    metric: str
    limit: float

    def loss(self, judged: Judged) -> float:
        """What is above 0 where the goal is missed, in the metric's unit."""
        if self.metric == "sqnr_db":
            return self.limit - judged.sqnr_db
        value = judged.drop if self.metric == "drop" else judged.kl
        return (float("inf") if value is None else value) - self.limit

    def sentence(self) -> str:
        """Such as "drop at most 0.01"."""
        names = {"drop": "drop at most", "sqnr_db": "SQNR in dB at least", "kl": "KL at most"}
        return f"{names[self.metric]} {self.limit:g}"


@dataclass(frozen=True)
class Aim:
    """A recipe's `[search]`: what is to be kept, and levels that are tried beside those that every search tries.

    `min_sqnr_db` and `max_kl` are goals in place of `--max-drop`; at most one of them. `levels` are "int4" (weights of 4
    bits) and "int16" (activations of 16 bits, LiteRT).
    """

    min_sqnr_db: float | None = None
    max_kl: float | None = None
    levels: tuple[str, ...] = ()
    max_tries: int = MAX_TRIES

    def __post_init__(self) -> None:
        if self.min_sqnr_db is not None and self.max_kl is not None:
            raise RecipeError("[search]: give min_sqnr_db or max_kl, not both")
        for level in self.levels:
            if level not in EXTRA_LEVELS:
                raise RecipeError(f"[search] levels: {seam.unknown('level', level, EXTRA_LEVELS)}")
        if self.max_tries < 1:
            raise RecipeError(f"[search]: max_tries must be at least 1, found {self.max_tries}")

    def goal(self) -> Goal | None:
        """The goal, or None where `--max-drop` is it."""
        if self.min_sqnr_db is not None:
            return Goal("sqnr_db", self.min_sqnr_db)
        return None if self.max_kl is None else Goal("kl", self.max_kl)

    @property
    def goes_below(self) -> bool:
        """Whether something is to be tried where int8 keeps the goal as it is."""
        return "int4" in self.levels


@dataclass(frozen=True)
class Point:
    """One try. `relative_time` is against the float file, `is_estimated` where it was not measured here."""

    changes: Changes
    judged: Judged
    relative_time: float
    size_bytes: int
    kept: bool
    loss: float
    is_estimated: bool = False


@dataclass(frozen=True)
class Journal:
    """All tries of a search, in order."""

    SCHEMA = "edgeopt.search/2"

    key: str
    goal: Goal
    order: tuple[str, ...]
    points: tuple[Point, ...] = ()
    finished: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Point | None:
        """The fastest that keeps the goal, the smallest of those alike; else the one nearest to it."""
        kept = [point for point in self.points if point.kept]
        if kept:
            fastest = min(point.relative_time for point in kept)
            alike = [point for point in kept if point.relative_time <= fastest * ALIKE]
            return min(alike, key=lambda point: (point.size_bytes, point.relative_time))
        return min(self.points, key=lambda point: point.loss, default=None)


@dataclass(frozen=True)
class Knob:
    """An operator that a search may change: its levels beside int8 and its share of the work.

    `above` are more accurate than int8, the cheapest first; `below` have fewer bits. `bytes` are its weights in int8.
    """

    name: str
    above: tuple[str, ...] = ("fp32",)
    below: tuple[str, ...] = ()
    macs: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Trial:
    """How one try is made and judged. `knobs` are in order, the most harmful operator first."""

    knobs: tuple[Knob, ...]
    goal: Goal
    make: Callable[[Changes], bytes]
    judge: Callable[[bytes], Judged]
    relative_time: Callable[[bytes], tuple[float, bool]]
    """File -> time over the float file's, and whether that is estimated."""

    @property
    def order(self) -> tuple[str, ...]:
        """The operators' names."""
        return tuple(knob.name for knob in self.knobs)


def search(
    trial: Trial,
    folder: Path,
    key: str,
    *,
    max_tries: int = MAX_TRIES,
    on_try: Callable[[Point], None] = lambda _: None,
) -> Journal:
    """Search, or go on with the search that `folder` holds under the same `key`.

    `folder` holds the journal and the best file so far at every moment after the first try. A combination that the
    runtime's quantizer refuses counts as one that keeps nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    journal = _resume(folder, key, trial)
    known = {point.changes: point for point in journal.points}
    walk = _walk(trial)
    changes = next(walk)
    answer: Point | None = None
    while not journal.finished:
        try:
            changes = changes if answer is None else walk.send(answer)
        except StopIteration:
            journal = replace(journal, finished=True)
            _replace(folder / JOURNAL, to_bytes(journal))
            break
        if changes not in known:
            if len(journal.points) >= max_tries:
                break
            try:
                point, file = measure_point(trial, changes)
            except RuntimeFailure:
                if not changes:
                    raise
                point, file = Point(changes, Judged(1.0, 0.0), 1.0, 0, kept=False, loss=1e9), b""
            known[changes] = point
            journal = replace(journal, points=(*journal.points, point))
            if journal.best == point:
                _replace(folder / BEST, file)
            _replace(folder / JOURNAL, to_bytes(journal))
            on_try(point)
        answer = known[changes]
    return journal


def measure_point(trial: Trial, changes: Changes) -> tuple[Point, bytes]:
    """Make one try, judge it and take its time against the float file."""
    file = trial.make(changes)
    judged = trial.judge(file)
    relative, is_estimated = trial.relative_time(file)
    loss = trial.goal.loss(judged)
    found = Judged(
        round(judged.drop, 6), round(judged.sqnr_db, 2), None if judged.kl is None else round(judged.kl, 6)
    )
    kept = loss <= 1e-9
    return Point(changes, found, round(relative, 4), len(file), kept, round(loss, 6), is_estimated), file


def _resume(folder: Path, key: str, trial: Trial) -> Journal:
    fresh = Journal(key, trial.goal, trial.order)
    try:
        found = from_bytes(Journal, (folder / JOURNAL).read_bytes())
    except (OSError, EdgeoptError):
        return fresh
    is_same = (found.key, found.goal, found.order) == (key, trial.goal, trial.order)
    return found if is_same and (not found.points or (folder / BEST).is_file()) else fresh


Walk = Generator[Changes, Point, Point]
"""Yields what to try; sent back is what it gave; returns the best of its own tries."""


def _walk(trial: Trial) -> Generator[Changes, Point, None]:
    first = yield ()
    best = first if first.kept else (yield from _raise(trial))
    if best.kept:
        best = yield from _relax(trial, best)
        yield from _lower(trial, best)


def _raise(trial: Trial) -> Walk:
    """Find how many of the worst operators must leave int8."""
    total = len(trial.knobs)
    low, high = 0, min(1, total)
    found = yield _raised(trial.knobs[:high])
    while not found.kept and high < total:
        low, high = high, min(2 * high, total)
        found = yield _raised(trial.knobs[:high])
    if not found.kept:
        return found
    while high - low > 1:
        middle = (low + high) // 2
        point = yield _raised(trial.knobs[:middle])
        if point.kept:
            found, high = point, middle
        else:
            low = middle
    return found


def _raised(knobs: Sequence[Knob]) -> Changes:
    return tuple(Change(knob.name, knob.above[-1]) for knob in knobs)


def _relax(trial: Trial, best: Point) -> Walk:
    """Bring operators back, the largest first: into int8, else into a level between."""
    knobs = {knob.name: knob for knob in trial.knobs}
    refused: dict[str, int] = {}
    for change in sorted(best.changes, key=lambda change: -knobs[change.operator].macs):
        for level in (BASE, *knobs[change.operator].above):
            if level == change.level or refused.get(level, 0) >= REFUSED:
                continue
            changes = _with(best.changes, change.operator, level)
            if not changes:
                continue
            point = yield changes
            if point.kept and (level == BASE or _is_better(point, best)):
                best = point
                break
            if level != BASE and point.kept:
                refused[level] = refused.get(level, 0) + 1
    return best


def _lower(trial: Trial, best: Point) -> Walk:
    """Try levels below int8 on the largest operators that are still in int8."""
    changed = {change.operator for change in best.changes}
    free = [knob for knob in trial.knobs if knob.below and knob.name not in changed]
    for knob in sorted(free, key=lambda knob: -knob.bytes)[:LOWERED]:
        for level in knob.below:
            point = yield (*best.changes, Change(knob.name, level))
            if point.kept and _is_better(point, best):
                best = point
                break
    return best


def _with(changes: Changes, name: str, level: str) -> Changes:
    """The same changes with another level for one operator."""
    return tuple(
        Change(name, level) if change.operator == name else change
        for change in changes
        if change.operator != name or level != BASE
    )


def _is_better(point: Point, than: Point) -> bool:
    """Smaller and no slower, or clearly faster."""
    if point.relative_time * ALIKE < than.relative_time:
        return True
    return point.relative_time <= than.relative_time * ALIKE and point.size_bytes < than.size_bytes


def _replace(path: Path, data: bytes) -> None:
    """Write beside, flush, and put in place: a reader sees the old or the new, never half."""
    temporary = path.with_suffix(path.suffix + ".half")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def rank_operators(names: Sequence[str], errors: Sequence[tuple[str, float]]) -> tuple[str, ...]:
    """Operators by the error of the tensors that are theirs, the most harmful first.

    `errors` are (operator name, error); what shares no quantized tensor is not listed.
    """
    known = set(names)
    total: dict[str, float] = {}
    for name, error in errors:
        if name in known:
            total[name] = total.get(name, 0.0) + error
    return tuple(sorted(total, key=lambda name: (-total[name], name)))
