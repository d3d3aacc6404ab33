# SPDX-License-Identifier: Apache-2.0
"""From what a build made and measured to what it ships, why, and the report that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeopt.artifacts import Made
from edgeopt.evaluate.metrics import SQNR_CEILING_DB
from edgeopt.plan import BASELINE, Candidate, Plan
from edgeopt.report import document
from edgeopt.validate import Validation
from edgeopt_converters import graph
from edgeopt_profiles import support
from edgeopt_profiles.operators import Operator
from edgeopt_wire.document import to_json
from edgeopt_wire.manifest import Manifest
from edgeopt_wire.measurement import Measurement

if TYPE_CHECKING:
    from edgeopt.build import BuildRequest
    from edgeopt.progress import Progress
    from edgeopt.sources import Source


EDGES = ("QuantizeLinear", "DequantizeLinear", "QUANTIZE", "DEQUANTIZE")
"""What only changes between floats and integers; it computes nothing of the model."""


@dataclass(frozen=True)
class Work:
    """What a build asked for, made and measured; everything that a report is written from."""

    request: BuildRequest
    plan: Plan
    made: Mapping[str, Made]
    source: Source
    manifest: Manifest
    validation: Validation
    measured: Mapping[str, Measurement]


@dataclass(frozen=True)
class Choice:
    """Whether a candidate is shipped, and why."""

    shipped: bool
    reason: str


def choose(work: Work) -> dict[str, Choice]:
    """Decide which candidates are shipped: those that run right here, or cannot run here, and keep the budget."""
    return {candidate.id: _choose(work, candidate) for candidate in work.plan.candidates}


def _choose(work: Work, candidate: Candidate) -> Choice:
    measurement = work.measured.get(candidate.id)
    budget = work.request.budget
    if candidate.reference:
        return Choice(False, "measured for comparison only")
    if candidate.accelerator == "edgetpu":
        return Choice(
            False,
            "the Edge TPU runs compiled files only, and its compiler is a program of its own for x86-64 Linux; run "
            f"`edgetpu_compiler {candidate.artifact}.tflite` on the file of the package",
        )
    if measurement is not None and measurement.error:
        return Choice(False, f"does not run here: {measurement.error}")
    if measurement is not None and not measurement.golden_ok:
        return Choice(False, "gives other outputs in a process of its own than when it was validated")
    quality = work.manifest.variant(candidate.id).quality
    if quality is not None and quality.sqnr_db is not None and quality.sqnr_db <= -SQNR_CEILING_DB:
        return Choice(False, "gives NaN or infinity where the unmodified model gives numbers")
    broken = budget.broken_by(
        size_bytes=work.made[candidate.artifact].size_bytes,
        quality=quality,
        measurement=measurement,
        on_device=work.plan.device.id == "host",
    )
    if broken:
        return Choice(False, "; ".join(broken))
    if measurement is None:
        return Choice(
            True, f"not measured here: needs {candidate.accelerator}; the device measures it on installation"
        )
    return Choice(True, "keeps the budget" if budget else "no budget was set")


def build_report(work: Work, choices: Mapping[str, Choice], progress: Progress) -> document.BuildReport:
    """Put everything into one document."""
    plan, manifest, validation, measured = work.plan, work.manifest, work.validation, work.measured
    operators = {name: graph.of(entry.model()).operators for name, entry in work.made.items()}
    candidates = tuple(
        _candidate(work, candidate, choices[candidate.id], operators[candidate.artifact])
        for candidate in plan.candidates
    )
    warnings = list(validation.warnings)
    if plan.device.id != "host":
        warnings.append(
            f"latencies were taken on this machine, not on a {plan.device.title}; a rollout measures on the device"
        )
    warnings.extend(sorted({text for found in measured.values() for text in found.warnings}))
    stages = tuple(document.Stage(s.name, round(s.seconds, 3), s.cached, s.detail) for s in progress.finished)
    return document.BuildReport(
        model=manifest.name,
        version=manifest.version,
        source=work.source.description,
        device=plan.device.id,
        device_title=plan.device.title,
        budget=to_json(work.request.budget),
        stages=stages,
        baseline="onnxruntime-fp32-1t",
        candidates=candidates,
        decisions=_decisions(work, choices),
        provenance=manifest.provenance,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def repeatable(report: document.BuildReport) -> document.BuildReport:
    """The part of a report that the same inputs give again: no times, no latencies; this part is signed."""
    candidates = tuple(
        replace(entry, measurement=None, times_faster=None) for entry in report.candidates if entry.shipped
    )
    return replace(report, stages=(), candidates=candidates, decisions=(), warnings=())


def _candidate(
    work: Work, candidate: Candidate, choice: Choice, operators: Sequence[Operator]
) -> document.Candidate:
    plan, made, manifest, measured = work.plan, work.made, work.manifest, work.measured
    artifact = plan.artifact(candidate.artifact)
    left_out = _left_out(candidate, operators) if artifact.precision == "int8" else ()
    counted = sum(1 for operator in operators if operator.type not in EDGES)
    return document.Candidate(
        id=candidate.id,
        runtime=candidate.runtime,
        format=artifact.format,
        precision=artifact.precision,
        threads=candidate.threads,
        accelerator=candidate.accelerator,
        file_bytes=made[candidate.artifact].size_bytes,
        shipped=choice.shipped,
        reason=choice.reason,
        quality=manifest.variant(candidate.id).quality,
        measurement=measured.get(candidate.id),
        times_faster=_times_faster(candidate, measured),
        times_smaller=round(made[BASELINE].size_bytes / made[candidate.artifact].size_bytes, 3),
        operators=counted,
        integer_operators=counted - len(left_out) if artifact.precision == "int8" else 0,
        float_operators=left_out,
        notes=made[candidate.artifact].description.notes,
    )


def _times_faster(candidate: Candidate, measured: Mapping[str, Measurement]) -> float | None:
    own = measured.get(candidate.id)
    reference = measured.get(f"{candidate.runtime}-fp32-{candidate.threads}t")
    if own is None or reference is None or own.timing is None or reference.timing is None:
        return None
    return round(reference.timing.p50_ns / own.timing.p50_ns, 3)


def _left_out(candidate: Candidate, operators: Sequence[Operator]) -> tuple[document.FloatOperator, ...]:
    """What the rules of the candidate's runtime or accelerator leave in floats or to the CPU, and why."""
    rules = support.find(candidate.runtime if candidate.accelerator == "cpu" else candidate.accelerator)
    found = rules.place(operators).left_out
    return tuple(document.FloatOperator(op.name, op.type, op.reason) for op in found if op.type not in EDGES)


def _decisions(work: Work, choices: Mapping[str, Choice]) -> tuple[document.Decision, ...]:
    plan = work.plan
    found = []
    for artifact in plan.artifacts:
        if artifact.scheme is not None:
            scheme = artifact.scheme
            grain = "channel" if scheme.per_channel else "tensor"
            kind = "symmetric" if scheme.symmetric_activations else "asymmetric"
            found.append(
                document.Decision(
                    artifact.id,
                    f"{scheme.weight_dtype} weights per {grain}, {kind} {scheme.activation_dtype} activations",
                    f"what the profile of {plan.device.id} says its runtime fuses",
                )
            )
            calibration = work.request.recipe.calibration
            found.append(
                document.Decision(
                    artifact.id,
                    f"ranges by {calibration.sentence()}",
                    "the recipe's calibration, or its default",
                )
            )
    for artifact in plan.artifacts:
        notes = work.made[artifact.id].description.notes
        found.extend(document.Decision(artifact.id, "note", note) for note in notes)
    for name, verdict in work.validation.verdicts.items():
        if plan.artifact(name).precision != "fp32":
            found.append(document.Decision(name, f"--max-drop: {verdict.answer}", verdict.sentence()))
    for candidate in plan.candidates:
        choice = choices[candidate.id]
        found.append(
            document.Decision(candidate.id, "shipped" if choice.shipped else "not shipped", choice.reason)
        )
    return tuple(found)
