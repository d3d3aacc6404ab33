# SPDX-License-Identifier: Apache-2.0
"""Two files of one runtime, run in turn in this process: how long one takes against the other.

Why in turn and in one process: on a machine that others use, two measurements a minute apart differ by more than what
a search looks for.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt_agent.runtimes import Session, find
from edgeopt_wire.manifest import Variant
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

ROUNDS, RUNS, WARMUP = 8, 5, 5


@contextmanager
def loaded(
    file: bytes,
    runtime: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    threads: int = 1,
) -> Iterator[Session]:
    """Load a file as the agent would, on the CPU.

    Raises:
        RuntimeFailure: The runtime refuses the file.
        UnsupportedError: The runtime is not installed.
    """
    variant = Variant("trial", runtime, "mixed", "model", inputs, outputs, "golden", 0.0, threads)
    with tempfile.TemporaryDirectory(prefix="edgeopt-") as folder:
        path = Path(folder) / "model"
        path.write_bytes(file)
        session = find(runtime).load(path, variant)
        try:
            yield session
        finally:
            session.close()


def relative_time(first: Session, second: Session, sample: Mapping[str, np.ndarray]) -> float:
    """The best run of `second` over that of `first`, run in turn.

    Not the medians: with other work on both cores they gave 0.26 to 0.68 for files that differ in one operator.
    """
    sessions = (first, second)
    times: tuple[list[int], list[int]] = ([], [])
    for session in sessions:
        for _ in range(WARMUP):
            session.run(sample)
    for _ in range(ROUNDS):
        for session, taken in zip(sessions, times, strict=True):
            for _ in range(RUNS):
                start = time.perf_counter_ns()
                session.run(sample)
                taken.append(time.perf_counter_ns() - start)
    return min(times[1]) / min(times[0])
