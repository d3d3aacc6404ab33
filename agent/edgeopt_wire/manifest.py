# SPDX-License-Identifier: Apache-2.0
"""The manifest: what a package holds and which device may run it.

Rules:
- It is deterministic: the same model, recipe, data and tools give the same bytes. No moment, no host name and no
  latency stands in it; measurements live beside the package.
- `signature` is the model as its user sees it; a variant's own tensors may differ in dtype and layout, and the
  device converts between the two (`edgeopt_agent.tensors`).
- Digests are lower-case hexadecimal SHA-256.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeopt_wire.tensor import TensorSpec

MANIFEST_PATH = "manifest.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_name(text: str, what: str) -> str:
    """Return `text` if it is a safe name: lower-case letters, digits, `.`, `_`, `-`, at most 100 characters."""
    if not _NAME.fullmatch(text) or ".." in text:
        raise ValueError(f"{what} {text!r} must match {_NAME.pattern} and hold no '..'")
    return text


def check_digest(text: str, what: str = "sha256") -> str:
    """Return `text` if it is a SHA-256 in lower-case hexadecimal."""
    if not _DIGEST.fullmatch(text):
        raise ValueError(f"{what} must be 64 lower-case hexadecimal digits, found {text!r}")
    return text


@dataclass(frozen=True)
class FileEntry:
    """One file of the package."""

    path: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_digest(self.sha256)
        if self.size_bytes < 0:
            raise ValueError(f"{self.path}: size_bytes {self.size_bytes} is negative")


@dataclass(frozen=True)
class Quality:
    """How a variant's outputs compare with the unmodified model's, on the same evaluation samples.

    `metric` is the labelled metric's name ("top1") or empty; `agreement` is the share of samples whose arg-max is
    the baseline's; `sqnr_db` is 10 log10(sum baseline^2 / sum (baseline - variant)^2) over all outputs.
    """

    samples: int
    agreement: float | None = None
    sqnr_db: float | None = None
    metric: str = ""
    baseline_value: float | None = None
    value: float | None = None


@dataclass(frozen=True)
class Variant:
    """One way to run the model: runtime x precision x threads x accelerator.

    `golden` is the folder of this variant's golden outputs. A device that runs it must reach `min_sqnr_db` against
    them, or the variant is refused there. `minimum_runtime` is the oldest version known to run it.
    """

    id: str
    runtime: str
    precision: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    golden: str
    min_sqnr_db: float
    threads: int = 1
    accelerator: str = "cpu"
    minimum_runtime: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    quality: Quality | None = None
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.id, "variant")
        if self.threads < 1:
            raise ValueError(f"variant {self.id}: threads must be at least 1, found {self.threads}")


@dataclass(frozen=True)
class Compatible:
    """Which device may install the package; checked before a byte of it is fetched.

    `memory_mib` is the memory of a process that runs the smallest variant, measured where the package was built, 0 if
    nobody measured. The index that `edgeopt publish` signs adds it, and the runtimes, under `extra`: measured figures do
    not stand in the package, whose bytes repeat.
    """

    device_classes: tuple[str, ...]
    architectures: tuple[str, ...] = ()
    memory_mib: int = 0
    disk_bytes: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = self.extra.get("runtimes", {})
        if not isinstance(found, Mapping) or not all(isinstance(text, str) for text in found.values()):
            raise ValueError("compatible.runtimes must be an object of runtime -> oldest version")

    @property
    def runtimes(self) -> Mapping[str, str]:
        """Runtimes of which the device needs one, with the oldest version that is known to run it, or empty."""
        return dict(self.extra.get("runtimes", {}))


@dataclass(frozen=True)
class Provenance:
    """Digests of everything that went in, and the versions of the tools."""

    source_sha256: str
    recipe_sha256: str
    calibration_sha256: str = ""
    evaluation_sha256: str = ""
    tools: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The description of one package."""

    SCHEMA = "edgeopt.manifest/1"

    name: str
    version: str
    device: str
    compatible: Compatible
    signature_inputs: tuple[TensorSpec, ...]
    signature_outputs: tuple[TensorSpec, ...]
    variants: tuple[Variant, ...]
    files: tuple[FileEntry, ...]
    golden_inputs: str
    baseline: Mapping[str, Any]
    provenance: Provenance
    labels: str = ""
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    postprocess: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name, "model")
        check_name(self.version, "version")
        check_name(self.device, "device")
        if not self.variants:
            raise ValueError("a package holds at least one variant")
        ids = [variant.id for variant in self.variants]
        if len(set(ids)) != len(ids):
            raise ValueError(f"variant ids must differ, found {ids}")
        paths = {entry.path for entry in self.files}
        missing = [variant.file for variant in self.variants if variant.file not in paths]
        if missing:
            raise ValueError(f"the file {missing[0]!r} of a variant is not listed under files")

    @property
    def title(self) -> str:
        """Name, version and device for a person: `efficientnet-lite0 1 for host`."""
        return f"{self.name} {self.version} for {self.device}"

    def file(self, path: str) -> FileEntry:
        """Return the entry of `path`, which the manifest is known to list."""
        return next(entry for entry in self.files if entry.path == path)

    def variant(self, variant_id: str) -> Variant:
        """Return the variant called `variant_id`, or raise KeyError."""
        for variant in self.variants:
            if variant.id == variant_id:
                return variant
        raise KeyError(variant_id)
