# SPDX-License-Identifier: Apache-2.0
"""Timing many files of one runtime fairly, on one number of threads, in a process of their own.

Rules:
- Files are timed in turns (A, B, C, A, B, C, ...), a few runs each, so that a machine that changes speed changes it for
  all; a file's time is told as a ratio of medians to its own runtime's float file, which takes turns with it.
- The first run of a turn is not counted: caches are another file's then, and so are threads that still spin (ONNX
  Runtime is told to stop that when an inference ends, for all its files alike).
- A file gets `BUDGET_S` at most; slow ones do fewer rounds, and at least `LEAST_ROUNDS`.

`python timing.py REQUEST.json` is that process; it writes what it measured beside the request.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from running import Run, open_file

if TYPE_CHECKING:
    import numpy as np

ROUNDS = 30
RUNS_A_ROUND = 5
WARMUP = 3
BUDGET_S = 1.5
LEAST_ROUNDS = 4
LIMIT_S = 900
"""All files of a runtime; more is a fault."""


@dataclass(frozen=True)
class Times:
    """Nanoseconds of one inference: the median and the best of all runs."""

    p50_ns: float
    min_ns: float


def time_files(
    files: Mapping[str, Path], runtime: str, threads: int, sample: Mapping[str, np.ndarray], folder: Path
) -> dict[str, Times]:
    """Time files (label -> file) in a process of their own; `folder` takes what is said between the two.

    Raises:
        RuntimeError: That process ended without an answer, with what it said last.
    """
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "sample.npz", **dict(sample))
    request, answer = folder / "request.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    asked = {
        "files": {label: str(file) for label, file in files.items()},
        "runtime": runtime,
        "threads": threads,
    }
    request.write_text(json.dumps(asked), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).resolve()), str(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{runtime} was not timed within {LIMIT_S} s") from error
    if not answer.is_file():
        said = (done.stderr.strip().splitlines() or [""])[-1]
        raise RuntimeError(f"{runtime} was not timed (exit {done.returncode}): {said[:300]}")
    return {label: Times(**found) for label, found in json.loads(answer.read_text(encoding="utf-8")).items()}


def time_in_turns(runs: Mapping[str, Run], sample: Mapping[str, np.ndarray]) -> dict[str, Times]:
    """Time each file's inference."""
    times: dict[str, list[int]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for run in runs.values():
        for _ in range(WARMUP):
            run(sample)
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - begin > BUDGET_S * len(runs):
            break
        for name, run in runs.items():
            run(sample)
            for _ in range(RUNS_A_ROUND):
                start = time.perf_counter_ns()
                run(sample)
                times[name].append(time.perf_counter_ns() - start)
    return {name: Times(median(found), min(found)) for name, found in times.items()}


def main() -> None:
    """Time what the request lists."""
    import numpy as np

    request = Path(sys.argv[1])
    asked = json.loads(request.read_text(encoding="utf-8"))
    with np.load(request.parent / "sample.npz", allow_pickle=False) as archive:
        sample = {name: archive[name] for name in archive.files}
    runs = {
        label: open_file(Path(file), asked["threads"], asked["runtime"])
        for label, file in asked["files"].items()
    }
    found = {label: asdict(times) for label, times in time_in_turns(runs, sample).items()}
    (request.parent / "answer.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
