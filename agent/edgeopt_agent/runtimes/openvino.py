# SPDX-License-Identifier: Apache-2.0
"""OpenVINO: the .onnx file of a package as it is, on the CPU of an x86-64 or ARM machine.

Rules:
- Numbers are those of the file. OpenVINO by itself computes float models in bfloat16 where the CPU has it, and quantizes
  the activations of layers whose weights are stored as integers: both are switched off.
- One stream with as many threads as the variant says, tuned for latency, and not pinned to cores: two models of one
  device would be pinned to the same ones.
- `import openvino` sends an event to its vendor. The module that does so is kept from being imported; OpenVINO has a
  stand-in for where it is not installed.
- A free axis of the file is fixed to the variant's shape, so that kernels are chosen for it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent.runtimes import check_variant
from edgeopt_wire.errors import RuntimeFailure, UnsupportedError
from edgeopt_wire.manifest import Variant
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgeopt_agent.runtimes import Session

DEVICE = "CPU"

_TELEMETRY = "openvino_telemetry"
_ERRORS = (RuntimeError, ValueError, TypeError)
"""OpenVINO's own exceptions reach Python as RuntimeError."""
_UNSUPPORTED_PHRASES = ("No conversion rule found", "does not support", "is not supported")


def library() -> Any:
    """Import OpenVINO, without what reports its use.

    Raises:
        UnsupportedError: It is not installed, or cannot be loaded here.
    """
    if "openvino" not in sys.modules:
        # None makes `import` fail, as if it were not installed (docs.python.org, sys.modules)
        sys.modules.setdefault(_TELEMETRY, None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise UnsupportedError(
            f"openvino cannot be imported ({error}); install edgeopt-agent[openvino]"
        ) from error
    return openvino


def settings(threads: int) -> dict[str, Any]:
    """The properties that a model is compiled with."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "ENABLE_CPU_PINNING": False,
    }


def version() -> str:
    """Return OpenVINO's version.

    Raises:
        UnsupportedError: It is not installed, or cannot be loaded here.
    """
    return str(library().__version__).split("-", maxsplit=1)[0]


def accelerators() -> tuple[str, ...]:
    """Return ("cpu",), the only device that is taken."""
    library()
    return ("cpu",)


def load(file: Path, variant: Variant) -> Session:
    """Load an ONNX file with `variant.threads` threads; there are no options.

    Raises:
        UnsupportedError: An operator, an option or the version cannot be had here, or the file has other edges.
        RuntimeFailure: The file is damaged, or OpenVINO failed.
    """
    openvino = library()
    check_variant(variant, version=version(), accelerators=accelerators(), options={})
    try:
        core = openvino.Core()
        model = core.read_model(str(file))
        _fix_shapes(model, variant)
        compiled = core.compile_model(model, DEVICE, settings(variant.threads))
        request = compiled.create_infer_request()
    except _ERRORS as error:
        is_unsupported = any(phrase in str(error) for phrase in _UNSUPPORTED_PHRASES)
        family = UnsupportedError if is_unsupported else RuntimeFailure
        raise family(f"openvino cannot load {file.name}: {_sentence(error)}") from error
    return _Session(request, compiled, variant)


class _Session:
    def __init__(self, request: Any, compiled: Any, variant: Variant) -> None:
        self._request = request
        self._variant = variant.id
        self._inputs = _edges(variant, "inputs", compiled.inputs, variant.inputs)
        self._outputs = _edges(variant, "outputs", compiled.outputs, variant.outputs)
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._lock:
            if self._request is None:
                raise RuntimeFailure(f"variant {self._variant} is closed")
            try:
                given = {index: inputs[name] for name, index in self._inputs}
                self._request.infer(given, share_inputs=True)
                return {
                    name: self._request.get_output_tensor(index).data.copy() for name, index in self._outputs
                }
            except (*_ERRORS, KeyError) as error:
                raise RuntimeFailure(
                    f"openvino failed on variant {self._variant}: {_sentence(error)}"
                ) from error

    def close(self) -> None:
        with self._lock:
            self._request = None


def _fix_shapes(model: Any, variant: Variant) -> None:
    """Give the free axes of the inputs the lengths that the variant has."""
    if not any(port.get_partial_shape().is_dynamic for port in model.inputs):
        return
    known = {spec.name: list(spec.shape) for spec in variant.inputs}
    shapes = {index: known[name] for index, port in enumerate(model.inputs) if (name := _name(port, known))}
    model.reshape(shapes)


def _edges(
    variant: Variant, what: str, ports: Sequence[Any], expected: Sequence[TensorSpec]
) -> tuple[tuple[str, int], ...]:
    """The place of each tensor of the variant; a tensor can have several names in the file."""
    by_name = {spec.name: spec for spec in expected}
    found = {name: index for index, port in enumerate(ports) if (name := _name(port, by_name))}
    if len(found) != len(expected) or (what == "inputs" and len(ports) != len(expected)):
        known = sorted(name for port in ports for name in port.get_names())
        raise UnsupportedError(
            f"variant {variant.id}: the manifest says {what} {list(by_name)}, the file has {known}; "
            "build the package again"
        )
    for name, index in found.items():
        spec, port = by_name[name], ports[index]
        shape, dtype = port.get_partial_shape(), port.get_element_type().to_dtype().name
        if dtype != spec.dtype or (shape.is_static and tuple(shape.to_shape()) != spec.shape):
            raise UnsupportedError(
                f"variant {variant.id}, tensor {name!r}: the manifest says {spec.dtype} {spec.shape}, "
                f"the file has {dtype} {shape}; build the package again"
            )
    return tuple(found.items())


def _name(port: Any, known: Mapping[str, object]) -> str:
    return next((str(name) for name in port.get_names() if name in known), "")


def _sentence(error: Exception) -> str:
    """What OpenVINO says without the places in its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return " ".join(kept) or type(error).__name__
