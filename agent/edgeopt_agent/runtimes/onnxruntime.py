# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime: .onnx on the CPU, or on a GPU through its TensorRT or CUDA execution provider.

Rules:
- One provider per variant. ONNX Runtime by itself goes on with the CPU where a provider is missing or leaves an
  operator out; here both are errors, unless the variant says `cpu_operators: allow`.
- Int8 for TensorRT is explicit (QDQ nodes in the file), never a calibration table.
- All models of a process take their working memory from one arena: the most that one needs at a time, not the sum.
- A TensorRT engine is built on the device on first load and cached under everything that invalidates it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt_agent.runtimes import check_variant
from edgeopt_wire.errors import RuntimeFailure, StoreError, UnsupportedError
from edgeopt_wire.manifest import Variant

if TYPE_CHECKING:
    import numpy as np

    from edgeopt_agent.runtimes import Session

ENGINE_CACHE_VARIABLE = "EDGEOPT_ENGINE_CACHE"
"""Environment variable that names the folder of built engines; default `~/.cache/edgeopt/engines`."""

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}
_ON_OFF = ("on", "off")
_ALLOW = ("allow", "refuse")
_OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"optimization": ("all", "extended", "basic", "none")},
    "tensorrt": {"fp16": _ON_OFF, "cpu_operators": _ALLOW, "workspace_mib": (), "dla_core": ("0", "1")},
    "cuda": {"tf32": _ON_OFF, "cpu_operators": _ALLOW},
}
_ERROR_SEVERITY = 3  # ONNX Runtime: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal
_UNSUPPORTED_CLASSES = ("NotImplemented", "InvalidGraph", "EPFail")
_UNSUPPORTED_PHRASES = (
    "is not a registered function/op",
    "Unsupported model IR version",
    "official released onnx opset",
    "fallback to CPU EP has been explicitly disabled",
)
_guard = threading.Lock()
_L4T_RELEASE = Path("/etc/nv_tegra_release")


def version() -> str:
    """Return ONNX Runtime's version.

    Raises:
        UnsupportedError: It is not installed, or cannot be loaded here.
    """
    return str(_library().__version__)


def accelerators() -> tuple[str, ...]:
    """Return the accelerators whose execution provider this build of ONNX Runtime holds."""
    available = _library().get_available_providers()
    return tuple(name for name, provider in _PROVIDERS.items() if provider in available)


def load(file: Path, variant: Variant) -> Session:
    """Load an ONNX file with `variant.threads` threads on `variant.accelerator`.

    Options: `optimization` (cpu: all, extended, basic, none; default all); `fp16`, `workspace_mib`, `dla_core`
    (tensorrt); `tf32` (cuda, default off); `cpu_operators` (tensorrt and cuda: allow or refuse, the default).

    Raises:
        UnsupportedError: Provider, operator, option or version cannot be had here.
        RuntimeFailure: The file is damaged, or ONNX Runtime failed.
    """
    library = _library()
    check_variant(
        variant,
        version=version(),
        accelerators=accelerators(),
        options=_OPTIONS.get(variant.accelerator, {}),
    )
    errors = _errors(library)
    provider = _PROVIDERS[variant.accelerator]
    try:
        session = library.InferenceSession(
            str(file),
            sess_options=_session_options(library, variant),
            providers=[(provider, _provider_options(file, variant))],
        )
        session.disable_fallback()
    except errors as error:
        family = UnsupportedError if _is_unsupported(error) else RuntimeFailure
        raise family(f"onnxruntime cannot load {file.name} on {variant.accelerator}: {error}") from error
    if provider not in session.get_providers():
        raise UnsupportedError(
            f"onnxruntime did not take {provider} for {file.name}, it offered {session.get_providers()}; "
            "check the driver and the libraries that this provider loads"
        )
    _check_edges(session, variant)
    return _Session(session, variant, errors)


class _Session:
    is_reentrant = True
    """ONNX Runtime's `Run` may be called by several threads at once."""

    def __init__(self, session: Any, variant: Variant, errors: tuple[type[Exception], ...]) -> None:
        self._session = session
        self._outputs = [spec.name for spec in variant.outputs]
        self._errors = errors
        self._variant = variant.id

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._session is None:
            raise RuntimeFailure(f"variant {self._variant} is closed")
        try:
            found = self._session.run(self._outputs, inputs)
        except self._errors as error:
            raise RuntimeFailure(f"onnxruntime failed on variant {self._variant}: {error}") from error
        return dict(zip(self._outputs, found, strict=True))

    def close(self) -> None:
        self._session = None


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError(
            f"onnxruntime cannot be imported ({error}); install edgeopt-agent[onnxruntime]"
        ) from error
    return onnxruntime


def _errors(library: Any) -> tuple[type[Exception], ...]:
    """Collect what ONNX Runtime raises: its own classes have no common base below Exception."""
    state = library.capi.onnxruntime_pybind11_state
    own = [
        entry for entry in vars(state).values() if isinstance(entry, type) and issubclass(entry, Exception)
    ]
    return (*own, RuntimeError, ValueError, TypeError)


def _is_unsupported(error: Exception) -> bool:
    """Tell "this build cannot run such a model" from "something broke": ONNX Runtime says both as `Fail`."""
    return type(error).__name__ in _UNSUPPORTED_CLASSES or any(
        phrase in str(error) for phrase in _UNSUPPORTED_PHRASES
    )


def _session_options(library: Any, variant: Variant) -> Any:
    level = library.GraphOptimizationLevel
    levels = {
        "all": level.ORT_ENABLE_ALL,
        "extended": level.ORT_ENABLE_EXTENDED,
        "basic": level.ORT_ENABLE_BASIC,
        "none": level.ORT_DISABLE_ALL,
    }
    options = library.SessionOptions()
    options.intra_op_num_threads = variant.threads
    options.inter_op_num_threads = 1
    options.execution_mode = library.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = levels[variant.options.get("optimization", "all")]
    options.log_severity_level = _ERROR_SEVERITY
    if variant.accelerator == "cpu":
        with _guard:
            _share_arena(library)
        options.add_session_config_entry("session.use_env_allocators", "1")
    if variant.accelerator != "cpu" and variant.options.get("cpu_operators", "refuse") == "refuse":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


@functools.cache
def _share_arena(library: Any) -> None:
    """Register this process's one arena on the CPU: as ONNX Runtime's default one, which every session would have."""
    place = library.OrtMemoryInfo(
        "Cpu", library.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, library.OrtMemType.DEFAULT
    )
    default = -1
    library.create_and_register_allocator(place, library.OrtArenaCfg(0, default, default, default))


def _provider_options(file: Path, variant: Variant) -> dict[str, str]:
    if variant.accelerator == "cuda":
        return {"use_tf32": "1" if variant.options.get("tf32") == "on" else "0"}
    if variant.accelerator != "tensorrt":
        return {}
    cache = _engine_cache(file, variant)
    found = {
        "trt_fp16_enable": "1" if variant.options.get("fp16", _fp16_default(variant)) == "on" else "0",
        "trt_int8_enable": "1" if variant.precision == "int8" else "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
    }
    if variant.precision == "bf16":
        found["trt_bf16_enable"] = (
            "1"  # said to nobody else: older providers refuse options that they do not know
        )
    if "workspace_mib" in variant.options:
        if not variant.options["workspace_mib"].isdigit():
            raise UnsupportedError(
                f"variant {variant.id}: workspace_mib must be a whole number of MiB, "
                f"found {variant.options['workspace_mib']!r}"
            )
        found["trt_max_workspace_size"] = str(int(variant.options["workspace_mib"]) * 2**20)
    if "dla_core" in variant.options:
        found |= {"trt_dla_enable": "1", "trt_dla_core": variant.options["dla_core"]}
    return found


def _fp16_default(variant: Variant) -> str:
    return "on" if variant.precision == "fp16" else "off"


def _engine_cache(file: Path, variant: Variant) -> Path:
    """Return the folder of this file's engines.

    The provider itself names an engine after the graph, TensorRT's version and the compute capability; the model's
    bytes, ONNX Runtime's version, the options and the L4T release are added here.
    """
    key = hashlib.sha256(file.read_bytes())
    release = _L4T_RELEASE.read_bytes() if _L4T_RELEASE.exists() else b""
    for part in (version().encode(), repr(sorted(variant.options.items())).encode(), release):
        key.update(hashlib.sha256(part).digest())
    given = os.environ.get(ENGINE_CACHE_VARIABLE)
    folder = (Path(given) if given else Path.home() / ".cache/edgeopt/engines") / key.hexdigest()[:32]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot make the engine cache {folder}: {error.strerror}; set {ENGINE_CACHE_VARIABLE}"
        ) from error
    return folder


def _check_edges(session: Any, variant: Variant) -> None:
    edges = (
        ("input", session.get_inputs(), variant.inputs),
        ("output", session.get_outputs(), variant.outputs),
    )
    for what, found, expected in edges:
        known = {edge.name for edge in found}
        missing = [spec.name for spec in expected if spec.name not in known]
        if missing or (what == "input" and len(known) != len(expected)):
            raise UnsupportedError(
                f"variant {variant.id}: the manifest says {what}s {[spec.name for spec in expected]}, "
                f"the file has {sorted(known)}; build the package again"
            )
