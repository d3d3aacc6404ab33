# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch: .pte on the CPU, where its XNNPACK delegate takes nearly every operator.

Rules:
- The wheel needs PyTorch: its library is linked against libtorch and takes torch tensors. So the library itself is
  loaded and not `executorch.runtime`, which brings the exporter along (130 MiB and 4 s more, executorch 1.5.1).
- ExecuTorch has one pool of threads a process, and loaded programs hold on to it. A session always runs with the threads
  that its variant asks for: where the pool has others, all programs are put away, the pool is made anew, and each
  program is loaded again before it runs next. Sessions of one number of threads never meet this.
- So that a pool is never taken from under a running program, one inference runs at a time in a process.
- The library would read a file that was cut off beyond its end; the header says how long it must be.

Tensors are matched by their place: a .pte file gives them no names.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent.runtimes import check_variant
from edgeopt_wire.errors import RuntimeFailure, StoreError, UnsupportedError
from edgeopt_wire.manifest import Variant
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgeopt_agent.runtimes import Session

METHOD = "forward"

_LIBRARY = "executorch.extension.pybindings._C"
_HEADER_MAGIC = b"eh00"
_HEADER_BYTES = 40
_SCALAR_TYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    11: "bool",
}
"""PyTorch's numbers for element types (c10/core/ScalarType.h), those that cross our edges."""


def version() -> str:
    """Return the version of the ExecuTorch wheel.

    Raises:
        UnsupportedError: It or PyTorch is not installed, or they do not fit each other.
    """
    _library()
    return importlib.metadata.version("executorch")


def accelerators() -> tuple[str, ...]:
    """Return ("cpu",): a .pte file names its delegates itself, and what we lower names XNNPACK."""
    return ("cpu",)


def load(file: Path, variant: Variant) -> Session:
    """Load a .pte file; it will run with `variant.threads` threads.

    Raises:
        UnsupportedError: The accelerator, an option, the version, an operator or the number of threads cannot be had.
        RuntimeFailure: The file is damaged.
        StoreError: The file cannot be read.
    """
    check_variant(variant, version=version(), accelerators=accelerators(), options={})
    _check_whole(file)
    return _Session(file, variant)


class _Pool:
    """The process's threads, and the sessions whose programs hold on to them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.sessions: weakref.WeakSet[_Session] = weakref.WeakSet()

    def have(self, threads: int) -> None:
        """Make the pool have so many threads; the caller holds the lock."""
        library = _library()
        if library._threadpool_get_thread_count() == threads:  # noqa: SLF001 - the only way to ask
            return
        for session in self.sessions:
            session.put_away()
        with _silent():
            library._unsafe_reset_threadpool(threads)  # noqa: SLF001 - the only way to set it; unsafe while programs live
        found = library._threadpool_get_thread_count()  # noqa: SLF001
        if found != threads:
            raise UnsupportedError(f"ExecuTorch has {found} threads here after {threads} were asked for")


_pool = _Pool()


class _Session:
    def __init__(self, file: Path, variant: Variant) -> None:
        self._file = file
        self._variant = variant
        self._method: Any = None
        self._is_closed = False
        with _pool.lock:
            self._ready()
            _pool.sessions.add(self)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np
        import torch

        with _pool.lock:
            if self._is_closed:
                raise RuntimeFailure(f"variant {self._variant.id} is closed")
            method = self._ready()
            arrays = (inputs[spec.name] for spec in self._variant.inputs)
            tensors = tuple(torch.from_numpy(np.require(array, requirements=("C", "W"))) for array in arrays)
            try:
                found = method(tensors)
                return {
                    spec.name: tensor.numpy()
                    for spec, tensor in zip(self._variant.outputs, found, strict=True)
                }
            except RuntimeError as error:
                raise RuntimeFailure(f"ExecuTorch failed on variant {self._variant.id}: {error}") from error

    def close(self) -> None:
        with _pool.lock:
            self._is_closed = True
            self.put_away()

    def put_away(self) -> None:
        self._method = None

    def _ready(self) -> Any:
        _pool.have(self._variant.threads)
        if self._method is None:
            try:
                # the file is mapped: kernels pack the weights that they want, the rest is never read
                library = _library()
                checked = library.Verification.InternalConsistency
                program = library._load_program(str(self._file), program_verification=checked)  # noqa: SLF001
                method = program.load_method(METHOD)
            except RuntimeError as error:
                family = UnsupportedError if f"{error}".endswith("0x14") else RuntimeFailure
                raise family(f"ExecuTorch cannot load {self._file.name}: {error}") from error
            _check_edges(method.method_meta(), self._variant)
            self._method = method
        return self._method


@functools.cache
def _library() -> Any:
    try:
        importlib.import_module("torch")  # its libraries must be there first
        with _silent():
            library = importlib.import_module(_LIBRARY)
            library._threadpool_get_thread_count()  # noqa: SLF001 - it makes the pool, which is when it looks at the CPU
            return library
    except ImportError as error:
        raise UnsupportedError(
            f"ExecuTorch cannot be imported ({error}); install edgeopt-agent[executorch], which brings PyTorch"
        ) from error


def _check_whole(file: Path) -> None:
    """Refuse what is no .pte file or is shorter than its own header says."""
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEADER_BYTES)
        size = file.stat().st_size
    except OSError as error:
        raise StoreError(f"cannot read {file}: {error.strerror}") from error
    if len(head) < _HEADER_BYTES or head[4:6] != b"ET" or head[8:12] != _HEADER_MAGIC:
        raise RuntimeFailure(f"ExecuTorch cannot load {file.name}: it is no .pte program")
    program, base, segments = (int.from_bytes(head[at : at + 8], "little") for at in (16, 24, 32))
    wanted = max(program, base + segments)
    if size < wanted:
        raise RuntimeFailure(f"ExecuTorch cannot load {file.name}: it is cut off, {size} of {wanted} bytes")


def _check_edges(meta: Any, variant: Variant) -> None:
    pairs: tuple[tuple[str, Sequence[TensorSpec], int, Any], ...] = (
        ("inputs", variant.inputs, meta.num_inputs(), meta.input_tensor_meta),
        ("outputs", variant.outputs, meta.num_outputs(), meta.output_tensor_meta),
    )
    for what, specs, count, describe in pairs:
        if len(specs) != count:
            raise UnsupportedError(
                f"variant {variant.id}: the manifest says {len(specs)} {what}, the file has {count}; build the package "
                "again"
            )
        for place, spec in enumerate(specs):
            found = describe(place)
            shape, dtype = tuple(found.sizes()), _SCALAR_TYPES.get(found.dtype(), f"type {found.dtype()}")
            if (shape, dtype) != (spec.shape, spec.dtype):
                raise UnsupportedError(
                    f"variant {variant.id}, tensor {spec.name!r}: the manifest says {spec.dtype} {spec.shape}, "
                    f"the file has {dtype} {shape}; build the package again"
                )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the library's remarks (which CPU files it opened, that it resets its threads) off stderr.

    They are written past Python and no option turns them off; only loading and resetting are covered, not inference.
    """
    try:
        kept = os.dup(2)
    except OSError:  # a daemon without stderr
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
