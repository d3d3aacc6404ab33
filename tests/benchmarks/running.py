# SPDX-License-Identifier: Apache-2.0
"""Running a file of any of the formats by the bare call of its runtime, and timing many files fairly.

Rules:
- Inputs are matched by position, NCHW turned to NHWC where a file wants that.
- Files are timed in turns (A, B, C, A, B, C, ...), a few runs each, so that a machine that changes speed changes it for
  all; a file's time is told as a ratio of medians to its own runtime's float file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from work import layout_for

if TYPE_CHECKING:
    import numpy as np

Run = Callable[[Mapping[str, "np.ndarray"]], "list[np.ndarray]"]
"""One inference of one sample (arrays in the order of the float file's inputs), giving all outputs as float32."""

ROUNDS = 30
RUNS_A_ROUND = 5
WARMUP = 10
BUDGET_S = 40.0
"""Slow models do fewer rounds; at least `LEAST_ROUNDS`."""
LEAST_ROUNDS = 5


def runtime_of(path: Path) -> str:
    """The runtime that runs a file."""
    return "onnxruntime" if path.suffix == ".onnx" else "litert"


def open_file(path: Path, threads: int) -> Run:
    """Load a file into its runtime."""
    return _open_onnx(path, threads) if path.suffix == ".onnx" else _open_litert(path, threads)


def _open_onnx(path: Path, threads: int) -> Run:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    shapes = [tuple(given.shape) for given in session.get_inputs()]

    def run(sample: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        arrays = zip(names, sample.values(), shapes, strict=True)
        feed = {name: layout_for(array, shape) for name, array, shape in arrays}
        return [np.asarray(found) for found in session.run(None, feed)]

    return run


def _open_litert(path: Path, threads: int) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    entries, leaves = interpreter.get_input_details(), interpreter.get_output_details()

    def run(sample: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        for entry, array in zip(entries, sample.values(), strict=True):
            interpreter.set_tensor(
                entry["index"], _quantized(layout_for(array, tuple(entry["shape"])), entry)
            )
        interpreter.invoke()
        return [_floats(interpreter.get_tensor(leaf["index"]), leaf) for leaf in leaves]

    return run


def _quantized(array: np.ndarray, tensor: Mapping[str, Any]) -> np.ndarray:
    import numpy as np

    kind = np.dtype(tensor["dtype"])
    scale, zero = tensor["quantization"]
    if kind.kind == "f" or not scale:
        return array.astype(kind)
    limits = np.iinfo(kind)
    return np.asarray(np.clip(np.round(array / scale + zero), limits.min, limits.max), kind)


def _floats(array: np.ndarray, tensor: Mapping[str, Any]) -> np.ndarray:
    import numpy as np

    scale, zero = tensor["quantization"]
    if array.dtype.kind == "f" or not scale:
        return np.asarray(array)
    return np.asarray((array.astype(np.float32) - zero) * scale, np.float32)


def time_in_turns(runs: Mapping[str, Run], sample: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Median nanoseconds of each file's inference."""
    times: dict[str, list[int]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for run in runs.values():
        for _ in range(WARMUP):
            run(sample)
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - begin > BUDGET_S:
            break
        for name, run in runs.items():
            for _ in range(RUNS_A_ROUND):
                start = time.perf_counter_ns()
                run(sample)
                times[name].append(time.perf_counter_ns() - start)
    return {name: median(found) for name, found in times.items()}
