# SPDX-License-Identifier: Apache-2.0
"""A runtime without a vendor library: for simulators, tests and the first hour with a new board.

Its model file is a JSON document (`NullModel`). Every output is computed from the first input: the input's values are
flattened and cut into as many consecutive groups as the output has values (as `numpy.array_split` cuts), and

    output[i] = gain * mean(group[i]) + bias

in float64, then cast. That is deterministic, depends on every input value, and can be checked by hand. A declared
latency sleeps; a declared failure crashes, hangs, leaks or lies on purpose, so that what guards a device against
real libraries can be exercised without one.
"""

from __future__ import annotations

import enum
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent.runtimes import check_variant
from edgeopt_wire.document import from_bytes
from edgeopt_wire.errors import DocumentError, RuntimeFailure, StoreError, UnsupportedError
from edgeopt_wire.manifest import Variant

if TYPE_CHECKING:
    import numpy as np

    from edgeopt_agent.runtimes import Session

VERSION = "1.0"
_LEAK_BYTES = 16 * 1024 * 1024
_EXIT_STATUS = 7
_WRONG_BY = 1000.0


class Failure(enum.Enum):
    """What goes wrong, from the run numbered `fail_after` on, or while loading where that is -1."""

    NONE = "none"
    ABORT = "abort"  # the process dies by SIGABRT, as after a failed C++ assertion
    SEGFAULT = "segfault"  # the process dies by SIGSEGV
    EXIT = "exit"  # the process ends with status 7 and no word
    HANG = "hang"  # the call never comes back
    LEAK = "leak"  # memory is taken until there is none
    RAISE = "raise"  # the call fails with RuntimeFailure
    WRONG = "wrong"  # outputs are far off
    NAN = "nan"  # outputs are not numbers
    CHATTER = "chatter"  # text is written to the process's standard output


@dataclass(frozen=True)
class NullModel:
    """The content of a null model's file."""

    SCHEMA = "edgeopt.null-model/1"

    gain: float = 1.0
    bias: float = 0.0
    latency_ns: int = 0
    load_ns: int = 0
    failure: Failure = Failure.NONE
    fail_after: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.latency_ns < 0 or self.load_ns < 0 or self.fail_after < -1:
            raise ValueError("latency_ns and load_ns must not be negative, fail_after at least -1")
        if self.extra:
            raise ValueError(f"unknown fields {sorted(self.extra)}")


def version() -> str:
    """Return the version of this module's file format."""
    if not _has_numpy():
        raise UnsupportedError(
            "the null runtime needs numpy; install edgeopt-agent[onnxruntime] or numpy itself"
        )
    return VERSION


def accelerators() -> tuple[str, ...]:
    """Return ("cpu",)."""
    return ("cpu",)


def load(file: Path, variant: Variant) -> Session:
    """Read a null model; there are no options.

    Raises:
        UnsupportedError: The variant asks for what this runtime does not have.
        RuntimeFailure: The file is no null model, or declares a failure at loading.
    """
    check_variant(variant, version=version(), accelerators=accelerators(), options={})
    try:
        model = from_bytes(NullModel, file.read_bytes())
    except OSError as error:
        raise StoreError(f"cannot read {file}: {error.strerror}") from error
    except DocumentError as error:
        raise RuntimeFailure(f"the null runtime cannot load {file.name}: {error}") from error
    if model.fail_after == -1:
        _fail(model.failure)
    time.sleep(model.load_ns / 1e9)
    return _Session(model, variant)


class _Session:
    def __init__(self, model: NullModel, variant: Variant) -> None:
        self._model = model
        self._variant = variant
        self._runs = 0
        self._is_closed = False

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._is_closed:
            raise RuntimeFailure(f"variant {self._variant.id} is closed")
        failure = self._model.failure if self._runs >= max(0, self._model.fail_after) else Failure.NONE
        self._runs += 1
        _fail(failure)
        if self._model.latency_ns:
            time.sleep(self._model.latency_ns / 1e9)
        return self._compute(inputs[self._variant.inputs[0].name], failure)

    def close(self) -> None:
        self._is_closed = True

    def _compute(self, values: np.ndarray, failure: Failure) -> dict[str, np.ndarray]:
        import numpy as np

        flat = values.reshape(-1).astype(np.float64)
        found = {}
        for spec in self._variant.outputs:
            size = int(np.prod(spec.shape))
            groups = np.array_split(flat, size)
            means = np.array([group.mean() if group.size else 0.0 for group in groups])
            outputs = self._model.gain * means + self._model.bias
            if failure is Failure.WRONG:
                outputs = outputs[::-1] + _WRONG_BY
            if failure is Failure.NAN:
                outputs = np.full_like(outputs, np.nan)
            if spec.dtype not in ("float32", "float16"):
                limits = np.iinfo(spec.dtype)
                outputs = np.clip(np.rint(np.nan_to_num(outputs)), limits.min, limits.max)
            found[spec.name] = outputs.reshape(spec.shape).astype(spec.dtype)
        return found


def _fail(failure: Failure) -> None:
    if failure is Failure.ABORT:
        os.abort()
    if failure is Failure.SEGFAULT:
        os.kill(os.getpid(), signal.SIGSEGV)
    if failure is Failure.EXIT:
        os._exit(_EXIT_STATUS)
    if failure is Failure.RAISE:
        raise RuntimeFailure("this null model fails on purpose")
    if failure is Failure.CHATTER:
        os.write(1, b"this null model talks on standard output\n")
        sys.stdout.flush()
    while failure is Failure.HANG:
        time.sleep(3600)
    leaked = []
    while failure is Failure.LEAK:
        leaked.append(b"\xff" * _LEAK_BYTES)


def _has_numpy() -> bool:
    import importlib.util

    return importlib.util.find_spec("numpy") is not None
