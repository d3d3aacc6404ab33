# SPDX-License-Identifier: Apache-2.0
"""The report of a build as a document: everything that was decided and measured, with its conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeopt.attribute import Attribution
from edgeopt.coverage import Coverage
from edgeopt.evaluate.parity_runtimes import RuntimePair
from edgeopt.predict import Estimate
from edgeopt.search import Journal
from edgeopt_wire.manifest import Provenance, Quality
from edgeopt_wire.measurement import Measurement


@dataclass(frozen=True)
class Stage:
    """One step of the build and the time it took; `cached` ones were done by an earlier build."""

    name: str
    seconds: float
    cached: bool = False
    detail: str = ""


@dataclass(frozen=True)
class FloatOperator:
    """An operator of an integer variant that computes in floats, or not on the accelerator, and why."""

    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """Something that the build chose, and why."""

    subject: str
    choice: str
    reason: str


@dataclass(frozen=True)
class Figure:
    """One figure of the task, with the candidate's 95 % interval and what the samples tell of the difference."""

    name: str
    baseline: float
    value: float
    low: float | None
    high: float | None
    verdict: str
    sentence: str


@dataclass(frozen=True)
class Fidelity:
    """How near the outputs are to the unmodified model's. KL in nats, of the first output; shares of samples."""

    cosine: float | None = None
    kl: float | None = None
    clipped_share: float = 0.0
    largest_error: float | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to run the model. `times_faster` is against float in the same runtime with as many threads.

    `estimate` is of the device and not measured; `no_estimate` says why there is none. `calibration` is "uncalibrated"
    where no data chose the ranges, else empty.
    """

    id: str
    runtime: str
    format: str
    precision: str
    threads: int
    accelerator: str
    file_bytes: int
    shipped: bool
    reason: str
    quality: Quality | None = None
    measurement: Measurement | None = None
    times_faster: float | None = None
    times_smaller: float | None = None
    operators: int = 0
    integer_operators: int = 0
    float_operators: tuple[FloatOperator, ...] = ()
    notes: tuple[str, ...] = ()
    fidelity: Fidelity | None = None
    figures: tuple[Figure, ...] = ()
    coverage: Coverage | None = None
    estimate: Estimate | None = None
    no_estimate: str = ""
    calibration: str = ""


@dataclass(frozen=True)
class BuildReport:
    """Baseline, optimization, validation and measured gains of one build; `searches` are by int8 artifact.

    `runtime_pairs` says of every two shipped int8 files how far the runtimes are apart.
    """

    SCHEMA = "edgeopt.build-report/1"

    model: str
    version: str
    source: str
    device: str
    device_title: str
    budget: Mapping[str, Any]
    stages: tuple[Stage, ...]
    baseline: str
    candidates: tuple[Candidate, ...]
    decisions: tuple[Decision, ...]
    provenance: Provenance
    warnings: tuple[str, ...] = ()
    package: str = ""
    package_sha256: str = ""
    package_bytes: int = 0
    attributions: Mapping[str, Attribution] = field(default_factory=dict)
    searches: Mapping[str, Journal] = field(default_factory=dict)
    runtime_pairs: tuple[RuntimePair, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def candidate(self, candidate_id: str) -> Candidate:
        """Return the candidate called `candidate_id`, or raise KeyError."""
        for candidate in self.candidates:
            if candidate.id == candidate_id:
                return candidate
        raise KeyError(candidate_id)

    @property
    def was_built(self) -> bool:
        """Whether anything kept the budget and was packed."""
        return any(candidate.shipped for candidate in self.candidates)
