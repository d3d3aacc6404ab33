# SPDX-License-Identifier: Apache-2.0
"""What a device must have to run a package, as the signed index says it before a byte is fetched.

Rules:
- Memory is measured, never guessed: the peak of a fresh process that loaded and ran the variant while the package was
  built (kernel's VmHWM, interpreter and runtime included), of the smallest variant that is shipped. It comes from the
  report beside the package, and only if that report is this very package's. Without it the index says 0, not known.
- It stands in the index and not in the package: two builds of the same inputs are the same bytes, two measurements not.
- A device needs one of the runtimes that the variants name.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeopt.package import report_path
from edgeopt.report.document import BuildReport
from edgeopt_wire.document import from_bytes
from edgeopt_wire.errors import DocumentError
from edgeopt_wire.manifest import Compatible, Manifest
from edgeopt_wire.measurement import Measurement

MIB = 2**20


def needs(manifest: Manifest, package: Path, sha256: str) -> Compatible:
    """The manifest's own `compatible`, with the runtimes of its variants and the memory that was measured."""
    extra: dict[str, Any] = dict(manifest.compatible.extra)
    extra["runtimes"] = _runtimes(manifest)
    measured = _smallest(manifest, package, sha256)
    if measured is None or measured.peak_memory_bytes is None:
        return replace(manifest.compatible, extra=extra)
    extra["memory_measured_on"] = f"{measured.conditions.cpu} ({measured.conditions.architecture})"
    memory_mib = math.ceil(measured.peak_memory_bytes / MIB)
    return replace(manifest.compatible, memory_mib=memory_mib, extra=extra)


def _runtimes(manifest: Manifest) -> dict[str, str]:
    """Each runtime with the oldest version that some variant of it needs; empty where one names none."""
    found: dict[str, list[str]] = {}
    for variant in manifest.variants:
        found.setdefault(variant.runtime, []).append(variant.minimum_runtime)
    return {name: min(needed, key=_numbers) if all(needed) else "" for name, needed in sorted(found.items())}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _smallest(manifest: Manifest, package: Path, sha256: str) -> Measurement | None:
    try:
        report = from_bytes(BuildReport, report_path(package).read_bytes())
    except (OSError, DocumentError):
        return None
    if report.package_sha256 != sha256:
        return None
    shipped = {variant.id for variant in manifest.variants}
    found = [
        candidate.measurement
        for candidate in report.candidates
        if candidate.id in shipped and candidate.measurement and candidate.measurement.peak_memory_bytes
    ]
    return min(found, key=lambda measurement: measurement.peak_memory_bytes or 0, default=None)
