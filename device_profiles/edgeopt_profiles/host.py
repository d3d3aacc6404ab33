# SPDX-License-Identifier: Apache-2.0
"""The profile `host`: this machine as it is now, so that a build needs no board to begin with.

Rules:
- Only runtimes that are installed become targets: what is not here cannot be measured here.
- What the system does not tell is None. Files are read below `root`, so that another machine can be read in a test.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import struct
from collections.abc import Callable
from pathlib import Path

from edgeopt_profiles.profile import HOST, Cpu, DeviceProfile, Source, Target
from edgeopt_profiles.reader import shared_schemes

MAXIMUM_THREADS = 4
_ISA = (
    "sse4_1", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
"""CPU flags, as Linux spells them, that decide how fast float and integer kernels are."""

_EXACT_U8S8 = ("avx512_vnni", "avx_vnni", "amx_int8")
"""With any of these, products of uint8 and int8 are added in 32 bits."""

_MODULES = {
    "onnxruntime": ("onnxruntime",),
    "litert": ("ai_edge_litert", "tflite_runtime"),
    "executorch": ("executorch",),
    "openvino": ("openvino",),
}


def detect(root: Path = Path("/"), *, is_installed: Callable[[str], bool] | None = None) -> DeviceProfile:
    """Describe this machine.

    On x86-64, activations are uint8 (ONNX Runtime's fast kernels there are u8s8), and weights are chosen so that nothing
    saturates where the CPU has no VNNI; elsewhere activations are int8.
    """
    architecture = _architecture()
    cores = _cores()
    threads = tuple(sorted({1, min(cores, 2), min(cores, MAXIMUM_THREADS)}))
    cpu = _cpu(root, cores)
    exact = "u8s8" if any(name in cpu.isa for name in _EXACT_U8S8) else "u8s8-safe"
    scheme = exact if architecture == "x86_64" else "s8s8"
    offered = (
        Target("onnxruntime", "onnx", "int8", threads, scheme=scheme),
        Target("onnxruntime", "onnx", "fp32", threads),
        Target("litert", "litert", "int8", threads, scheme="int8"),
        Target("executorch", "executorch", "int8", threads, scheme="int8", optional=True),
        *(_openvino(threads, is_exact=exact == "u8s8") if architecture == "x86_64" else ()),
    )
    installed = is_installed or _is_installed
    targets = tuple(target for target in offered if any(map(installed, _MODULES[target.runtime])))
    used = {target.scheme for target in targets}
    return DeviceProfile(
        id=HOST,
        title="this machine",
        family=HOST,
        architectures=(architecture,),
        cpu=cpu,
        memory_mib=_memory_mib(root),
        memory_bandwidth_gbps=None,
        accelerators=(),
        targets=targets,
        schemes={name: value for name, value in shared_schemes().items() if name in used},
        device_classes=(HOST,),
        sources=(Source("cpu, cores, memory, runtimes", "detected on this machine", "measured"),),
    )


def _openvino(threads: tuple[int, ...], *, is_exact: bool) -> tuple[Target, ...]:
    """OpenVINO on x86-64, whose integer kernels were examined; half floats are computed in float32 there."""
    scheme = "u8s8-zero" if is_exact else "u8s8-safe"
    return (
        Target("openvino", "onnx", "int8", threads, scheme=scheme, optional=True),
        Target("openvino", "onnx", "fp16", threads, optional=True, by_recipe=True),
    )


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _architecture() -> str:
    machine = platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    is_narrow = struct.calcsize("P") == 4  # a 32-bit Python on a 64-bit kernel
    return {"aarch64": "armv7l", "x86_64": "i686"}.get(machine, machine) if is_narrow else machine


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu(root: Path, cores: int) -> Cpu:
    text = _text(root / "proc/cpuinfo")
    name = (
        _field(text, "model name")
        or _text(root / "proc/device-tree/model").strip("\0 \n")
        or platform.processor()
    )
    flags = set((_field(text, "flags") or _field(text, "Features")).split())
    khz = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    return Cpu(
        name=name or platform.machine(),
        cores=cores,
        isa=tuple(flag for flag in _ISA if flag in flags),
        max_mhz=int(khz) // 1000 if khz.isdigit() else None,
    )


def _memory_mib(root: Path) -> int | None:
    found = re.search(r"^MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(found.group(1)) // 1024 if found else None


def _field(text: str, key: str) -> str:
    found = re.search(rf"^{key}\s*:[ \t]*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
