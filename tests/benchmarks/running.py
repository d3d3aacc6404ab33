# SPDX-License-Identifier: Apache-2.0
"""Running a file of any of the formats by the bare call of its runtime, and timing many files fairly.

Rules:
- Inputs are matched by name where a file knows all names, else by position; inputs that a file lost (constants) come
  last. NCHW is turned to NHWC where a file wants that.
- Files are timed in turns (A, B, C, A, B, C, ...), a few runs each, so that a machine that changes speed changes it for
  all; a file's time is told as a ratio of medians to its own runtime's float file.
- `python running.py FILE SAMPLE.npz` runs a file once, so that one that ends its process ends no other.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
TRY_LIMIT_S = 120
"""Loading and one run; more is a fault."""


@dataclass(frozen=True)
class Times:
    """Nanoseconds of one inference: the median and the best of all runs."""

    p50_ns: float
    min_ns: float


def runtime_of(path: Path) -> str:
    """The runtime that runs a file."""
    return "onnxruntime" if path.suffix == ".onnx" else "litert"


def open_file(path: Path, threads: int) -> Run:
    """Load a file into its runtime."""
    return _open_onnx(path, threads) if path.suffix == ".onnx" else _open_litert(path, threads)


def why_not(path: Path, sample: Mapping[str, np.ndarray], folder: Path) -> str:
    """Run a file once in a process of its own: nothing where that works, else what it said last."""
    import numpy as np

    kept = folder / "sample.npz"
    np.savez(kept, **dict(sample))
    command = [sys.executable, str(Path(__file__).resolve()), str(path), str(kept)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRY_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"{runtime_of(path)} did not load and run it once within {TRY_LIMIT_S} s"
    if done.returncode == 0:
        return ""
    said = (done.stderr.strip().splitlines() or [""])[-1]
    return f"{runtime_of(path)} does not run it (exit {done.returncode}): {said}"[:300]


def feed(
    names: Sequence[str], shapes: Sequence[tuple[Any, ...]], sample: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Match a sample to a file's inputs."""
    if len(names) > len(sample):
        raise ValueError(
            f"the file wants {len(names)} inputs ({', '.join(names)}), a sample has {len(sample)}"
        )
    arrays = [sample[name] for name in names] if set(names) <= set(sample) else list(sample.values())
    matched = zip(names, arrays, shapes, strict=False)
    return {name: layout_for(array, shape) for name, array, shape in matched}


def onnx_feed(path: Path, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A sample by the names of an ONNX file's own inputs."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [given for given in graph.input if given.name not in weights]
    shapes = [tuple(axis.dim_value for axis in given.type.tensor_type.shape.dim) for given in inputs]
    return feed([given.name for given in inputs], shapes, sample)


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
        return [np.asarray(found) for found in session.run(None, feed(names, shapes, sample))]

    return run


def _open_litert(path: Path, threads: int) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    entries, leaves = _in_order(interpreter.get_input_details()), _in_order(interpreter.get_output_details())
    names, shapes = [entry["name"] for entry in entries], [tuple(entry["shape"]) for entry in entries]

    def run(sample: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        arrays = feed(names, shapes, sample).values()
        for entry, array in zip(entries, arrays, strict=True):
            interpreter.set_tensor(entry["index"], _quantized(array, entry))
        interpreter.invoke()
        return [_floats(interpreter.get_tensor(leaf["index"]), leaf) for leaf in leaves]

    return run


def _in_order(tensors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By the number that PyTorch's converter puts into names (args_0, output_1); else as the file has them."""
    numbers = [re.search(r"(?:args|output)_(\d+)", tensor["name"]) for tensor in tensors]
    if not all(numbers):
        return list(tensors)
    keys = [int(number[1]) for number in numbers if number]
    return [tensor for _, tensor in sorted(zip(keys, tensors, strict=True), key=lambda pair: pair[0])]


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


def time_in_turns(runs: Mapping[str, Run], sample: Mapping[str, np.ndarray]) -> dict[str, Times]:
    """Time each file's inference."""
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
    return {name: Times(median(found), min(found)) for name, found in times.items()}


def main() -> None:
    """Run a file once."""
    import numpy as np

    with np.load(sys.argv[2], allow_pickle=False) as archive:
        sample = {name: archive[name] for name in archive.files}
    open_file(Path(sys.argv[1]), 1)(sample)


if __name__ == "__main__":
    main()
