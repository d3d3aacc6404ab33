# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: which operators to leave in floats so that the allowed drop is kept at the least cost in time.

How it goes:
- Every operator's own error is measured once (`edgeopt.attribute`): the error with its weights and its output on their
  grids and all else float.
- The worst k operators are left in floats, k doubled until the drop is kept, then halved between what failed and what
  kept it (at most log2 of the operators, twice). Then operators are put back into integers, the largest first, as long
  as the drop is still kept.
- Every try is a real file: quantized, run over the evaluation samples in the runtime, and timed interleaved with the
  float file. Nothing is estimated.

Rules:
- Anytime: after each try the journal is replaced whole, and the best file so far lies beside it, loadable. Killed at
  any moment, the next search with the same inputs goes on behind the last try.
- The best is the fastest that keeps the drop (of those alike, the one with the fewest operators in floats); while none does, the one with the least drop.
- Levels are those that the runtime runs fast: int8 and float32. ONNX Runtime's kernels take neither int16 activations
  nor, on a CPU, float16 without converting it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import EdgeoptError

if TYPE_CHECKING:
    import numpy as np

JOURNAL, BEST = "search.json", "best.onnx"
MAX_TRIES = 25
ROUNDS, RUNS, WARMUP = 8, 5, 5
"""Timing of one try: rounds of runs, A and B in turn."""

ALIKE = 1.03
"""Times nearer than this are taken as equal, and the file with fewer operators in floats is better."""


@dataclass(frozen=True)
class Point:
    """One try. `relative_time` is p50 against the float file in the same process; `drop` as the budget counts it."""

    floats: tuple[str, ...]
    drop: float
    sqnr_db: float
    relative_time: float
    size_bytes: int
    kept: bool


@dataclass(frozen=True)
class Journal:
    """All tries of a search, in order; `best` is the index of the best so far."""

    SCHEMA = "edgeopt.search/1"

    key: str
    allowed: float
    order: tuple[str, ...]
    points: tuple[Point, ...] = ()
    finished: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Point | None:
        """The fastest that keeps the drop, or the one with the least drop."""
        kept = [point for point in self.points if point.kept]
        if kept:
            fastest = min(point.relative_time for point in kept)
            alike = [point for point in kept if point.relative_time <= fastest * ALIKE]
            return min(alike, key=lambda point: (len(point.floats), point.relative_time))
        return min(self.points, key=lambda point: point.drop, default=None)


@dataclass(frozen=True)
class Trial:
    """How one try is made and judged. `order` names operators, the most harmful first; `weight` their MACs."""

    order: tuple[str, ...]
    macs: Mapping[str, int]
    allowed: float
    make: Callable[[tuple[str, ...]], bytes]
    judge: Callable[[bytes], tuple[float, float]]
    """File -> (drop, SQNR in dB)."""
    relative_time: Callable[[bytes], float]
    """File -> p50 over the float file's, taken in turn."""


def search(
    trial: Trial,
    folder: Path,
    key: str,
    *,
    max_tries: int = MAX_TRIES,
    on_try: Callable[[Point], None] = lambda _: None,
) -> Journal:
    """Search, or go on with the search that `folder` holds under the same `key`.

    `folder` holds the journal and the best file so far at every moment after the first try.
    """
    folder.mkdir(parents=True, exist_ok=True)
    journal = _resume(folder, key, trial)
    known = {point.floats: point for point in journal.points}
    walk = _walk(trial)
    floats = next(walk)
    answer: bool | None = None
    while not journal.finished:
        try:
            floats = floats if answer is None else walk.send(answer)
        except StopIteration:
            journal = replace(journal, finished=True)
            _replace(folder / JOURNAL, to_bytes(journal))
            break
        if floats not in known:
            if len(journal.points) >= max_tries:
                break
            point, file = measure_point(trial, floats)
            known[floats] = point
            journal = replace(journal, points=(*journal.points, point))
            if journal.best == point:
                _replace(folder / BEST, file)
            _replace(folder / JOURNAL, to_bytes(journal))
            on_try(point)
        answer = known[floats].kept
    return journal


def _resume(folder: Path, key: str, trial: Trial) -> Journal:
    fresh = Journal(key, trial.allowed, trial.order)
    try:
        found = from_bytes(Journal, (folder / JOURNAL).read_bytes())
    except (OSError, EdgeoptError):
        return fresh
    is_same = (found.key, found.allowed, found.order) == (key, trial.allowed, trial.order)
    return found if is_same and (not found.points or (folder / BEST).is_file()) else fresh


def _walk(trial: Trial) -> Generator[tuple[str, ...], bool, None]:
    """Yield sets of operators to leave in floats; sent back is whether the drop was kept."""
    total = len(trial.order)
    if (yield ()):
        return
    low, high = 0, 1
    while not (yield trial.order[:high]):
        if high == total:
            return
        low, high = high, min(2 * high, total)
    while high - low > 1:
        middle = (low + high) // 2
        if (yield trial.order[:middle]):
            high = middle
        else:
            low = middle
    kept = list(trial.order[:high])
    for name in sorted(kept, key=lambda name: -trial.macs.get(name, 0)):
        fewer = tuple(entry for entry in kept if entry != name)
        if fewer and (yield fewer):
            kept = list(fewer)


def measure_point(trial: Trial, floats: tuple[str, ...]) -> tuple[Point, bytes]:
    """Make one try, judge it and time it against the float file."""
    file = trial.make(floats)
    drop, sqnr_db = trial.judge(file)
    relative = trial.relative_time(file)
    kept = drop <= trial.allowed + 1e-9
    return Point(floats, round(drop, 6), round(sqnr_db, 2), round(relative, 4), len(file), kept), file


def relative_time(first: bytes, second: bytes, sample: Mapping[str, np.ndarray]) -> float:
    """The median time of `second` over that of `first`, run in turn with one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    sessions = [
        ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for file in (first, second)
    ]
    times: tuple[list[int], list[int]] = ([], [])
    feeds = dict(sample)
    for session in sessions:
        for _ in range(WARMUP):
            session.run(None, feeds)
    for _ in range(ROUNDS):
        for session, taken in zip(sessions, times, strict=True):
            for _ in range(RUNS):
                start = time.perf_counter_ns()
                session.run(None, feeds)
                taken.append(time.perf_counter_ns() - start)
    return sorted(times[1])[len(times[1]) // 2] / sorted(times[0])[len(times[0]) // 2]


def _replace(path: Path, data: bytes) -> None:
    """Write beside, flush, and put in place: a reader sees the old or the new, never half."""
    import os

    temporary = path.with_suffix(path.suffix + ".half")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def rank_operators(program: Any, errors: Sequence[tuple[str, float]]) -> tuple[str, ...]:
    """Operators by the error of the tensors that are theirs, the most harmful first.

    `errors` are (operator name, error); what shares no quantized tensor is not listed.
    """
    known = {node.name for node in program.graph.node}
    total: dict[str, float] = {}
    for name, error in errors:
        if name in known:
            total[name] = total.get(name, 0.0) + error
    return tuple(sorted(total, key=lambda name: (-total[name], name)))
