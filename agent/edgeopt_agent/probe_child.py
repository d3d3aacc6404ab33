# SPDX-License-Identifier: Apache-2.0
"""The child of `edgeopt_agent.probe`: load, first run, compare with the golden outputs, warm up, measure.

Rules:
- The clock runs around `session.run` alone, on a golden sample: zeros and noise take other paths in some kernels.
- Samples are taken in windows. The figure stands when the p50 of three consecutive windows agree within 10 %;
  until then further windows are taken, up to `MAXIMUM_WINDOWS` or the request's time, and earlier ones are dropped
  and counted. What never settles is reported with `stable` false and a warning.
- Standard output belongs to the one Measurement; file descriptor 1 is pointed at stderr before any library loads.

Sources: LiteRT's benchmark_model (warm-up), Triton's perf_analyzer (three windows within 10 %), MLPerf (percentiles).
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt_agent import conditions, golden, runtimes
from edgeopt_agent.model import LoadedModel, find_variant, open_model
from edgeopt_agent.probe import Failure, ProbeRequest, conditions_of, failed, read_manifest, utc_now
from edgeopt_wire import __version__
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import (
    EdgeoptError,
    RecipeError,
    RuntimeFailure,
    StoreError,
    TrustError,
    UnsupportedError,
)
from edgeopt_wire.manifest import Manifest, Variant
from edgeopt_wire.measurement import (
    MINIMUM_FOR_P90,
    MINIMUM_FOR_P99,
    Measurement,
    Thermal,
    Timing,
    nearest_rank,
)

if TYPE_CHECKING:
    import numpy as np

_log = logging.getLogger(__name__)

WINDOWS = 3
WINDOW_TOLERANCE = 0.10
MAXIMUM_WINDOWS = 9
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_FAILURES: tuple[tuple[type[BaseException], Failure], ...] = (
    (UnsupportedError, Failure.UNSUPPORTED),
    (RuntimeFailure, Failure.RUNTIME),
    (StoreError, Failure.PACKAGE),
    (TrustError, Failure.PACKAGE),
    (RecipeError, Failure.PACKAGE),
    (MemoryError, Failure.MEMORY),
)


@dataclass(frozen=True)
class Samples:
    """Latencies of the last windows in nanoseconds, and how they came about."""

    latencies_ns: tuple[int, ...]
    warmup: int
    is_stable: bool
    window_p50_ns: tuple[int, ...]
    dropped: int


def main() -> None:
    """Read a request from stdin, measure, write one Measurement to what was stdout, and end the process."""
    _end_with_parent()
    answer = os.dup(1)
    os.dup2(2, 1)
    request = from_bytes(ProbeRequest, sys.stdin.buffer.read())
    raw = to_bytes(probe(request))
    sys.stdout.flush()
    while raw:
        raw = raw[os.write(answer, raw) :]
    os.close(answer)
    sys.stderr.flush()
    os._exit(0)  # what was measured stands, whatever a library does in its destructors


def probe(request: ProbeRequest) -> Measurement:
    """Measure in this process.

    A variant that fails gives a Measurement with an error; a library that takes the process down does not return.
    """
    folder = Path(request.folder)
    manifest = read_manifest(folder)
    version = ""
    try:
        variant = find_variant(manifest, request.variant)
        version = runtimes.find(variant.runtime).version()
        return _measure(request, folder, manifest, variant, version)
    except (EdgeoptError, MemoryError) as error:
        failure = next((word for family, word in _FAILURES if isinstance(error, family)), Failure.RUNTIME)
        return failed(request, manifest, failure, _say(error), version)
    except Exception as error:  # noqa: BLE001  the outermost frame: a library may raise anything
        _log.exception("probe of %s %s", manifest.title, request.variant)
        return failed(request, manifest, Failure.RUNTIME, f"{type(error).__name__}: {error}", version)


def take_samples(
    run: Callable[[], object],
    *,
    warmup_ns: int,
    minimum_runs: int,
    minimum_ns: int,
    maximum_ns: int,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> Samples:
    """Time `run` in windows until they agree, as the module says."""
    warmup = 0
    started = clock_ns()
    while warmup == 0 or clock_ns() - started < warmup_ns:
        run()
        warmup += 1
    ends_at = clock_ns() + maximum_ns
    windows: list[tuple[int, ...]] = []
    while len(windows) < MAXIMUM_WINDOWS:
        window = _take_window(
            run,
            runs=-(-minimum_runs // WINDOWS),
            window_ns=minimum_ns // WINDOWS,
            ends_at=ends_at,
            clock_ns=clock_ns,
        )
        windows.append(window)
        if _agree(windows[-WINDOWS:]) or clock_ns() >= ends_at:
            break
    kept = windows[-WINDOWS:]
    return Samples(
        latencies_ns=tuple(sample for window in kept for sample in window),
        warmup=warmup,
        is_stable=_agree(kept),
        window_p50_ns=tuple(nearest_rank(sorted(window), 50) for window in windows),
        dropped=sum(len(window) for window in windows[:-WINDOWS]),
    )


def _take_window(
    run: Callable[[], object], *, runs: int, window_ns: int, ends_at: int, clock_ns: Callable[[], int]
) -> tuple[int, ...]:
    samples: list[int] = []
    now = clock_ns()
    full_at = now + window_ns
    while not samples or (now < ends_at and (len(samples) < runs or now < full_at)):
        before = clock_ns()
        run()
        now = clock_ns()
        samples.append(now - before)
    return tuple(samples)


def _agree(windows: list[tuple[int, ...]]) -> bool:
    if len(windows) < WINDOWS:
        return False
    middles = [nearest_rank(sorted(window), 50) for window in windows]
    return max(middles) <= min(middles) * (1 + WINDOW_TOLERANCE)


def _measure(
    request: ProbeRequest, folder: Path, manifest: Manifest, variant: Variant, version: str
) -> Measurement:
    inputs = golden.load_inputs(folder, manifest)
    expected = golden.load_outputs(folder, manifest, variant) if variant.golden else None
    if expected is not None and len(inputs) != len(expected):
        raise StoreError(
            f"{folder}: {len(inputs)} golden inputs and {len(expected)} golden outputs; build it again"
        )
    idle_bytes = _peak_memory_bytes()
    started = time.perf_counter_ns()
    with open_model(folder, manifest, variant.id) as model:
        load_ns = time.perf_counter_ns() - started
        first_ns, outputs = _first_run(model, inputs[0])
        found = [outputs, *(model.infer(sample) for sample in inputs[1:])]
        comparison = golden.Comparison(False, False, None, "the variant has none")
        if expected is not None:
            comparison = golden.compare(expected, found, min_sqnr_db=variant.min_sqnr_db)
        count = conditions.throttle_count()
        before = conditions.read_thermal()
        samples = _time(model, model.to_variant(inputs[0]), request)
        after = conditions.read_thermal(throttle_count_before=count)
        peak_bytes = _peak_memory_bytes()
    timing = Timing.of(
        samples.latencies_ns, warmup=samples.warmup, load_ns=load_ns, first_inference_ns=first_ns
    )
    return Measurement(
        package_sha256=request.package_sha256,
        model=manifest.name,
        version=manifest.version,
        variant=variant.id,
        precision=variant.precision,
        device_id=request.device_id,
        device_class=request.device_class,
        agent_version=__version__,
        measured_at=utc_now(),
        conditions=dataclasses.replace(conditions_of(request, variant, version), before=before, after=after),
        timing=timing,
        golden_ok=comparison.is_ok,
        golden_exact=comparison.is_exact,
        golden_sqnr_db=comparison.sqnr_db,
        peak_memory_bytes=peak_bytes,
        stable=samples.is_stable,
        warnings=_warnings(request, samples, comparison, before, after),
        extra={
            "golden_samples": len(inputs),
            "idle_memory_bytes": idle_bytes,
            "window_p50_ns": list(samples.window_p50_ns),
            "dropped_samples": samples.dropped,
        },
    )


def _end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies: a library that hangs must not outlive the agent."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _first_run(model: LoadedModel, sample: Mapping[str, np.ndarray]) -> tuple[int, dict[str, np.ndarray]]:
    own = model.to_variant(sample)
    started = time.perf_counter_ns()
    outputs = model.session.run(own)
    return time.perf_counter_ns() - started, model.from_variant(outputs)


def _time(model: LoadedModel, inputs: Mapping[str, np.ndarray], request: ProbeRequest) -> Samples:
    run = model.session.run
    gc.collect()
    gc.disable()
    try:
        return take_samples(
            lambda: run(inputs),
            warmup_ns=request.warmup_ns,
            minimum_runs=request.minimum_runs,
            minimum_ns=request.minimum_ns,
            maximum_ns=request.maximum_ns,
        )
    finally:
        gc.enable()


def _warnings(
    request: ProbeRequest,
    samples: Samples,
    comparison: golden.Comparison,
    before: Thermal,
    after: Thermal,
) -> tuple[str, ...]:
    found = list(conditions.warnings(conditions.read_board(), before, after))
    if not comparison.is_ok:
        found.insert(0, f"the outputs are not the golden ones: {comparison.reason}")
    if not samples.is_stable:
        found.append(
            f"the latency did not settle: the p50 of {WINDOWS} windows differ by more than {WINDOW_TOLERANCE:.0%}"
        )
    n = len(samples.latencies_ns)
    if n < MINIMUM_FOR_P90:
        found.append(f"{n} samples: a p90 needs {MINIMUM_FOR_P90} and a p99 {MINIMUM_FOR_P99}")
    elif n < MINIMUM_FOR_P99:
        found.append(f"{n} samples: a p99 needs {MINIMUM_FOR_P99}")
    if request.stand_in_for:
        found.append(f"measured on a machine that only stands in for {request.stand_in_for}; not its latency")
    return tuple(found)


def _peak_memory_bytes() -> int | None:
    """Return the most memory that this process has held so far (VmHWM), or None where the kernel does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _say(error: BaseException) -> str:
    return f"not enough memory {error}".strip() if isinstance(error, MemoryError) else str(error)
