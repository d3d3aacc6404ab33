# SPDX-License-Identifier: Apache-2.0
"""LiteRT (formerly TensorFlow Lite): .tflite on the CPU through XNNPACK, or on a Coral Edge TPU.

Rules:
- `ai_edge_litert` is used where it is installed, else the older `tflite_runtime`; `version` names the one in use.
- A file that holds no Edge TPU operator would run on the CPU without a word; asked for "edgetpu", it is refused.
- Inputs are copied once into the interpreter and outputs once out of it: an interpreter cannot borrow arrays, and a
  view into it must not outlive the next call. A lock keeps two threads from sharing one interpreter.

Tensors are found by the names in the variant: those of the file's tensors, or those of its one signature.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgeopt_agent.runtimes import check_variant
from edgeopt_wire.errors import RuntimeFailure, StoreError, UnsupportedError
from edgeopt_wire.manifest import Variant
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgeopt_agent.runtimes import Session

EDGETPU_LIBRARY = "libedgetpu.so.1"
EDGETPU_OPERATOR = b"edgetpu-custom-op"
"""The operator into which Google's compiler folds what the Edge TPU runs."""

_LIBRARIES = (
    ("ai_edge_litert.interpreter", "ai-edge-litert"),
    ("tflite_runtime.interpreter", "tflite-runtime"),
)
_OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"xnnpack": ("on", "off")},
    "edgetpu": {"device": ()},
}


def version() -> str:
    """Return the version of the LiteRT (or TensorFlow Lite) library.

    Raises:
        UnsupportedError: Neither library is installed, or none can be loaded here.
    """
    _, distribution = _library()
    return importlib.metadata.version(distribution)


def accelerators() -> tuple[str, ...]:
    """Return ("cpu",), and "edgetpu" where Coral's library can be loaded."""
    try:
        ctypes.CDLL(EDGETPU_LIBRARY)
    except OSError:
        return ("cpu",)
    return ("cpu", "edgetpu")


def load(file: Path, variant: Variant) -> Session:
    """Load a .tflite file with `variant.threads` threads on `variant.accelerator`.

    Options: `xnnpack` (cpu: on, the default, or off: reference-like kernels), `device` (edgetpu: e.g. `usb:0`).

    Raises:
        UnsupportedError: The accelerator, an operator, an option or the version cannot be had here.
        RuntimeFailure: The file is damaged, or the library failed.
    """
    library, _ = _library()
    check_variant(
        variant,
        version=version(),
        accelerators=accelerators(),
        options=_OPTIONS.get(variant.accelerator, {}),
    )
    options: dict[str, Any] = {"model_path": str(file), "num_threads": variant.threads}
    try:
        if variant.accelerator == "edgetpu":
            _check_compiled(file)
            device = {"device": variant.options["device"]} if "device" in variant.options else {}
            options["experimental_delegates"] = [library.load_delegate(EDGETPU_LIBRARY, device)]
        if variant.options.get("xnnpack") == "off":
            options["experimental_op_resolver_type"] = (
                library.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            )
        interpreter = library.Interpreter(**options)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        family = (
            UnsupportedError if "op" in str(error).lower() and "unresolved" in str(error) else RuntimeFailure
        )
        raise family(f"LiteRT cannot load {file.name} on {variant.accelerator}: {error}") from error
    return _Session(interpreter, variant)


class _Session:
    def __init__(self, interpreter: Any, variant: Variant) -> None:
        self._interpreter = interpreter
        self._variant = variant.id
        self._inputs = _indices(interpreter, variant, "inputs", variant.inputs)
        self._outputs = _indices(interpreter, variant, "outputs", variant.outputs)
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._lock:
            if self._interpreter is None:
                raise RuntimeFailure(f"variant {self._variant} is closed")
            try:
                for name, index in self._inputs:
                    self._interpreter.set_tensor(index, inputs[name])
                self._interpreter.invoke()
                return {name: self._interpreter.get_tensor(index) for name, index in self._outputs}
            except (ValueError, RuntimeError) as error:
                raise RuntimeFailure(f"LiteRT failed on variant {self._variant}: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._interpreter = None


def _library() -> tuple[ModuleType, str]:
    reasons = []
    for module, distribution in _LIBRARIES:
        try:
            return importlib.import_module(module), distribution
        except ImportError as error:
            reasons.append(f"{distribution}: {error}")
    raise UnsupportedError(f"LiteRT cannot be imported ({'; '.join(reasons)}); install edgeopt-agent[litert]")


def _check_compiled(file: Path) -> None:
    try:
        is_compiled = EDGETPU_OPERATOR in file.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {file}: {error.strerror}") from error
    if not is_compiled:
        raise UnsupportedError(
            f"{file.name} holds no Edge TPU operator and would run on the CPU; compile it with edgetpu_compiler"
        )


def _indices(
    interpreter: Any, variant: Variant, what: str, expected: Sequence[TensorSpec]
) -> tuple[tuple[str, int], ...]:
    details = interpreter.get_input_details() if what == "inputs" else interpreter.get_output_details()
    known = _signature_indices(interpreter, what) | {
        str(edge["name"]): int(edge["index"]) for edge in details
    }
    shapes = {int(edge["index"]): (tuple(int(n) for n in edge["shape"]), edge["dtype"]) for edge in details}
    found = tuple((spec.name, known.get(spec.name, -1)) for spec in expected)
    if len({index for _, index in found} - {-1}) != len(expected) or (
        what == "inputs" and len(expected) != len(details)
    ):
        raise UnsupportedError(
            f"variant {variant.id}: the manifest says {what} {[spec.name for spec in expected]}, "
            f"the file has {sorted(known)}; build the package again"
        )
    for spec, (_, index) in zip(expected, found, strict=True):
        shape, dtype = shapes[index]
        if shape != spec.shape or dtype.__name__.rstrip("_") != spec.dtype:
            raise UnsupportedError(
                f"variant {variant.id}, tensor {spec.name!r}: the manifest says {spec.dtype} {spec.shape}, "
                f"the file has {dtype.__name__} {shape}; build the package again"
            )
    return found


def _signature_indices(interpreter: Any, what: str) -> dict[str, int]:
    signatures = interpreter._get_full_signature_list()  # noqa: SLF001  the public list has names but no indices
    if len(signatures) != 1:
        return {}
    (signature,) = signatures.values()
    return {str(name): int(index) for name, index in signature[what].items()}
