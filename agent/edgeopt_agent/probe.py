# SPDX-License-Identifier: Apache-2.0
"""Measure one variant on this machine, in a child process: a vendor's library may crash, hang or eat the memory.

Rules:
- The parent writes a `ProbeRequest` to the child's stdin and reads exactly one `Measurement` from its stdout.
  Whatever libraries print goes to stderr, of which the parent keeps the end for its error messages.
- Whatever the child does, the parent returns a `Measurement`; `error` says what happened and `extra["failure"]`
  which `Failure` it was. Only a folder that holds no readable package is an exception.
- The parent loads no inference library and no numpy.

`python -m edgeopt_agent.probe` is the child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from edgeopt_agent.conditions import read_board
from edgeopt_wire import __version__
from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import DocumentError, StoreError
from edgeopt_wire.manifest import MANIFEST_PATH, Manifest, Variant
from edgeopt_wire.measurement import Conditions, Measurement

_log = logging.getLogger(__name__)

TIMEOUT_S = 120.0
MAX_ANSWER_BYTES = 1024 * 1024
_KEPT_CHATTER_BYTES = 4096
_DRAIN_S = 5.0  # a process that left the group may keep the pipes open
_QUOTED_CHARACTERS = 300


class Failure(enum.Enum):
    """Why a variant could not be measured; the word in `Measurement.extra["failure"]`."""

    UNSUPPORTED = "unsupported"  # this machine cannot run the variant as asked
    RUNTIME = "runtime"  # the library said that it failed
    MEMORY = "memory"  # there was not enough memory
    CRASH = "crash"  # the process died
    TIMEOUT = "timeout"  # the process did not answer in time
    PACKAGE = "package"  # the package lacks what is needed, or it is damaged
    ANSWER = "answer"  # the process answered something that is no measurement


@dataclass(frozen=True)
class ProbeRequest:
    """Which variant of which extracted package to measure, and for how long."""

    SCHEMA = "edgeopt.probe/1"

    folder: str
    variant: str
    package_sha256: str
    device_id: str
    device_class: str
    stand_in_for: str = ""
    warmup_ns: int = 500_000_000
    minimum_runs: int = 100
    minimum_ns: int = 1_000_000_000
    maximum_ns: int = 30_000_000_000
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.minimum_runs < 1 or self.warmup_ns < 0 or not 0 <= self.minimum_ns <= self.maximum_ns:
            raise ValueError("expected minimum_runs >= 1, warmup_ns >= 0 and 0 <= minimum_ns <= maximum_ns")


def utc_now() -> datetime:
    """Return the present moment."""
    return datetime.now(timezone.utc)


def run_probe(
    request: ProbeRequest,
    *,
    timeout_s: float = TIMEOUT_S,
    memory_limit_bytes: int | None = None,
    clock: Callable[[], datetime] = utc_now,
    command: Sequence[str] = (),
) -> Measurement:
    """Measure `request.variant` in a child process and return what came of it, good or bad.

    `memory_limit_bytes` bounds the child's address space (RLIMIT_AS), which is larger than what it really uses.
    `command` replaces the child (default: this Python, `-m edgeopt_agent.probe`).

    Raises:
        StoreError: The folder holds no readable package.
    """
    folder = Path(request.folder).resolve()
    manifest = read_manifest(folder)
    moment = clock()
    request = dataclasses.replace(request, folder=str(folder))
    answer: Measurement | tuple[Failure, str]
    try:
        child = _Child(command or (sys.executable, "-m", "edgeopt_agent.probe"), memory_limit_bytes)
        status = child.talk(to_bytes(request), timeout_s)
        answer = _read_answer(child, status, timeout_s, memory_limit_bytes)
    except OSError as error:
        answer = Failure.MEMORY, f"the process could not be started: {error.strerror}"
    if not isinstance(answer, Measurement):
        failure, text = answer
        _log.warning("probe of %s %s: %s", manifest.title, request.variant, text)
        answer = failed(request, manifest, failure, text)
    return dataclasses.replace(answer, measured_at=moment)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an extracted package.

    Raises:
        StoreError: There is none, or it is damaged.
    """
    try:
        return from_bytes(Manifest, (folder / MANIFEST_PATH).read_bytes())
    except OSError as error:
        raise StoreError(f"{folder} holds no package: {error.strerror}; install it again") from error
    except DocumentError as error:
        raise StoreError(f"{folder} holds a damaged package: {error}; install it again") from error


def failed(
    request: ProbeRequest, manifest: Manifest, failure: Failure, error: str, runtime_version: str = ""
) -> Measurement:
    """Say that the variant could not be measured, and why."""
    variant = next((entry for entry in manifest.variants if entry.id == request.variant), None)
    return Measurement(
        package_sha256=request.package_sha256,
        model=manifest.name,
        version=manifest.version,
        variant=request.variant,
        precision=variant.precision if variant else "",
        device_id=request.device_id,
        device_class=request.device_class,
        agent_version=__version__,
        measured_at=utc_now(),
        conditions=conditions_of(request, variant, runtime_version),
        timing=None,
        golden_ok=False,
        error=error,
        extra={"failure": failure.value},
    )


def conditions_of(request: ProbeRequest, variant: Variant | None, runtime_version: str) -> Conditions:
    """Return the conditions that hold before anything has run."""
    board = read_board()
    batch = variant.inputs[0].shape[0] if variant and variant.inputs and variant.inputs[0].shape else 1
    return Conditions(
        runtime=variant.runtime if variant else "",
        runtime_version=runtime_version,
        threads=variant.threads if variant else 1,
        batch=batch,
        accelerator=variant.accelerator if variant else "",
        architecture=board.architecture,
        cpu=board.cpu,
        os=board.os,
        power_mode=board.power_mode,
        governor=board.governor,
        stand_in_for=request.stand_in_for,
    )


class _Child:
    """The probe's process, in a process group of its own; `answer` and `chatter` are what it wrote."""

    def __init__(self, command: Sequence[str], memory_limit_bytes: int | None) -> None:
        self.answer = b""
        self.chatter = b""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",  # `-m` would put the present folder, with whatever lies there, on the module path
            start_new_session=True,
        )
        if memory_limit_bytes is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended already: its status says why
                limits = (memory_limit_bytes, memory_limit_bytes)
                resource.prlimit(self._process.pid, resource.RLIMIT_AS, limits)

    def talk(self, request: bytes, timeout_s: float) -> int | None:
        """Send the request and return the exit status, or None if the time was over and the child was killed."""
        readers = [
            threading.Thread(target=self._read_answer, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_chatter, args=(self._process.stderr,), daemon=True),
            threading.Thread(target=self._write, args=(self._process.stdin, request), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            status: int | None = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            self._kill_group()
        for reader in readers:
            reader.join(_DRAIN_S)
        return status

    def _kill_group(self) -> None:
        """End the child and whatever it started; a group that is gone is fine."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _write(self, pipe: IO[bytes], request: bytes) -> None:
        try:
            with pipe:
                pipe.write(request)
        except BrokenPipeError:
            _log.debug("the probe's process ended before it read its request")

    def _read_answer(self, pipe: IO[bytes]) -> None:
        with pipe:
            while piece := os.read(pipe.fileno(), 65536):
                self.answer = (self.answer + piece)[: MAX_ANSWER_BYTES + 1]

    def _read_chatter(self, pipe: IO[bytes]) -> None:
        with pipe:
            while piece := os.read(pipe.fileno(), 65536):
                self.chatter = (self.chatter + piece)[-_KEPT_CHATTER_BYTES:]


def _read_answer(
    child: _Child, status: int | None, timeout_s: float, memory_limit_bytes: int | None
) -> Measurement | tuple[Failure, str]:
    limit = f" (its memory was limited to {memory_limit_bytes} bytes)" if memory_limit_bytes else ""
    said = _quote(child.chatter)
    if status is None:
        return Failure.TIMEOUT, f"no answer within {timeout_s:g} s, the process was killed{said}"
    if status < 0:
        name = _signal_name(-status)
        cause = "; often the kernel's out-of-memory killer" if -status == signal.SIGKILL else ""
        return Failure.CRASH, f"the process died by {name}{cause}{limit}{said}"
    if status > 0:
        return Failure.CRASH, f"the process ended with status {status}{limit}{said}"
    if len(child.answer) > MAX_ANSWER_BYTES:
        return (
            Failure.ANSWER,
            f"the process wrote more than {MAX_ANSWER_BYTES} bytes instead of a measurement",
        )
    try:
        return from_bytes(Measurement, child.answer)
    except DocumentError as error:
        return Failure.ANSWER, f"the process wrote no measurement: {error}{_quote(child.answer)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _quote(raw: bytes) -> str:
    text = " ".join(raw.decode("utf-8", errors="replace").split())[-_QUOTED_CHARACTERS:]
    return f"; it wrote: {text}" if text else ""


if __name__ == "__main__":
    from edgeopt_agent.probe_child import main

    main()
