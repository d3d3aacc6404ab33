# SPDX-License-Identifier: Apache-2.0
"""From what a build made and measured to what it ships, why, and the report that says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edgeopt.artifacts import Made
from edgeopt.attribute import Attribution
from edgeopt.budget import Facts
from edgeopt.coverage import Coverage, problems
from edgeopt.evaluate.metrics import SQNR_CEILING_DB
from edgeopt.evaluate.parity_runtimes import RuntimePair, compare_files
from edgeopt.plan import BASELINE, Candidate, Plan
from edgeopt.predict import Prediction, is_slower, speaks_for
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
    from edgeopt.mixed import Mixed
    from edgeopt.progress import Progress
    from edgeopt.sources import Source


SLOWER = 1.03
"""A candidate whose p50 and whose best run are above its float file's by more than this is slower. Two rounds of the same
file on a shared machine differ by up to three hundredths."""

EDGES = ("QuantizeLinear", "DequantizeLinear", "QUANTIZE", "DEQUANTIZE", "Convert")
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
    coverage: Mapping[str, Coverage] = field(default_factory=dict)
    attributions: Mapping[str, Attribution] = field(default_factory=dict)
    mixed: tuple[Mixed, ...] = ()
    predictions: Mapping[str, Prediction] = field(default_factory=dict)

    def prediction(self, candidate_id: str) -> Prediction:
        """What is estimated of a candidate on the device, or why nothing is."""
        return self.predictions.get(candidate_id, Prediction(None))


@dataclass(frozen=True)
class Choice:
    """Whether a candidate is shipped, and why."""

    shipped: bool
    reason: str
    is_slower: bool = False


def choose(work: Work) -> dict[str, Choice]:
    """Decide which candidates are shipped: those that run right, are not slower than float, and keep the budget.

    Where a candidate is refused because its float file is faster, that one is shipped in its place.
    """
    found = {candidate.id: _choose(work, candidate) for candidate in work.plan.candidates}
    for candidate in work.plan.candidates:
        if not found[candidate.id].is_slower:
            continue
        reference = reference_of(candidate)
        if reference in found and not found[reference].shipped:
            found[reference] = _instead(work, reference, candidate)
    return found


def reference_of(candidate: Candidate) -> str:
    """The float candidate of the same runtime with as many threads."""
    return f"{candidate.runtime}-fp32-{candidate.threads}t"


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
    if wrong := _wrong(work, candidate):
        return Choice(False, wrong)
    if broken := budget.broken_by(_facts(work, candidate)):
        return Choice(False, "; ".join(broken))
    if measurement is None:
        return Choice(
            True, f"not measured here: needs {candidate.accelerator}; the device measures it on installation"
        )
    return _choose_by_speed(work, candidate)


def _wrong(work: Work, candidate: Candidate) -> str:
    """Why a candidate must not run anywhere, or nothing."""
    measurement = work.measured.get(candidate.id)
    if measurement is not None and measurement.error:
        return f"does not run here: {measurement.error}"
    if measurement is not None and not measurement.golden_ok:
        return "gives other outputs in a process of its own than when it was validated"
    quality = work.manifest.variant(candidate.id).quality
    if quality is not None and quality.sqnr_db is not None and quality.sqnr_db <= -SQNR_CEILING_DB:
        return "gives NaN or infinity where the unmodified model gives numbers"
    coverage = work.coverage.get(candidate.artifact)
    if coverage is not None and coverage.wrong:
        return f"{candidate.runtime} computes {', '.join(coverage.wrong)} otherwise than the file says"
    return ""


def _choose_by_speed(work: Work, candidate: Candidate) -> Choice:
    budget = work.request.budget
    kept = "keeps the budget" if budget else "no budget was set"
    faster = _times_faster(candidate, work.measured)
    if faster is None or candidate.id == reference_of(candidate):
        return Choice(True, kept)
    if not speaks_for(work.plan.device):
        return _choose_by_estimate(work, candidate, kept)
    if _is_slower(work.measured[candidate.id], work.measured[reference_of(candidate)]):
        return Choice(
            False,
            f"slower than the float file in {candidate.runtime} with as many threads: {faster:.2f} times its speed",
            is_slower=True,
        )
    return Choice(True, kept)


def _choose_by_estimate(work: Work, candidate: Candidate, kept: str) -> Choice:
    """Refuse what is estimated to be slower even at its best; between the intervals the device measures."""
    own = work.prediction(candidate.id)
    reference = work.prediction(reference_of(candidate)).estimate
    if own.estimate is None:
        return Choice(True, f"{kept}; its speed is the device's to measure, this machine is of another kind")
    if reference is not None and is_slower(own.estimate, reference):
        return Choice(
            False,
            f"{own.estimate.short()} on the device, the float file {reference.short()}: slower with confidence",
            is_slower=True,
        )
    return Choice(True, f"{kept}; {own.estimate.short()} on the device, which measures it on installation")


def _is_slower(own: Measurement, reference: Measurement) -> bool:
    """Whether both the median and the best run are slower: another process can spoil a median, hardly a minimum."""
    if own.timing is None or reference.timing is None:
        return False
    medians = own.timing.p50_ns > SLOWER * reference.timing.p50_ns
    return medians and own.timing.min_ns > SLOWER * reference.timing.min_ns


def _instead(work: Work, reference: str, candidate: Candidate) -> Choice:
    """Ship a float reference because `candidate` is slower than it, where it keeps the budget itself."""
    own = next(entry for entry in work.plan.candidates if entry.id == reference)
    refused = _wrong(work, own) or "; ".join(work.request.budget.broken_by(_facts(work, own)))
    if refused:
        return Choice(False, f"faster than {candidate.id}, but {refused}")
    return Choice(True, f"faster than {candidate.id}, so the float file is shipped in its place")


def _facts(work: Work, candidate: Candidate) -> Facts:
    assessment = work.validation.assessments.get(candidate.artifact)
    verdict = assessment.verdict if assessment else None
    coverage = work.coverage.get(candidate.artifact)
    is_dynamic = work.plan.artifact(candidate.artifact).precision.endswith("-dynamic")
    return Facts(
        size_bytes=work.made[candidate.artifact].size_bytes,
        quality=work.manifest.variant(candidate.id).quality,
        drop=verdict.drop if verdict else None,
        is_share=verdict.is_share if verdict else True,
        measurement=work.measured.get(candidate.id),
        coverage=None if coverage is None else coverage.mac_share if is_dynamic else coverage.static_share,
        at_run_time=coverage.mac_share - coverage.static_share if coverage and not is_dynamic else 0.0,
        on_device=work.plan.device.id == "host",
        estimate=work.prediction(candidate.id).estimate,
        no_estimate=work.prediction(candidate.id).reason,
    )


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
    run = {candidate.runtime for candidate in plan.candidates}
    warnings.extend(
        f"{name}: the recipe names it, and nothing was made for it, because it has none of the precisions that suit this "
        'model; ask for one with precisions = ["int8"] or ["fp32"]'
        for name in work.request.recipe.runtimes
        if name not in run
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
        attributions=dict(work.attributions),
        searches={entry.base: entry.journal for entry in work.mixed if not entry.shared_with},
        runtime_pairs=_runtime_pairs(work, choices),
    )


def _runtime_pairs(work: Work, choices: Mapping[str, Choice]) -> tuple[RuntimePair, ...]:
    """Compare the shipped int8 files of different runtimes; one that is run by many threads stands for itself once."""
    shipped = {candidate.artifact for candidate in work.plan.candidates if choices[candidate.id].shipped}
    wanted = [artifact for artifact in work.plan.artifacts if artifact.id in shipped]
    return compare_files(wanted, work.made, work.validation.outputs)


def repeatable(report: document.BuildReport) -> document.BuildReport:
    """The part of a report that the same inputs give again: no times, no latencies; this part is signed."""
    candidates = tuple(
        replace(entry, measurement=None, times_faster=None, estimate=None, no_estimate="")
        for entry in report.candidates
        if entry.shipped
    )
    return replace(report, stages=(), candidates=candidates, decisions=(), warnings=())


def _candidate(
    work: Work, candidate: Candidate, choice: Choice, operators: Sequence[Operator]
) -> document.Candidate:
    plan, made, manifest, measured = work.plan, work.made, work.manifest, work.measured
    artifact = plan.artifact(candidate.artifact)
    counted, left_out = _computed(work, candidate, operators)
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
        integer_operators=counted - len(left_out) if artifact.precision.startswith("int") else 0,
        float_operators=left_out,
        notes=made[candidate.artifact].description.notes,
        fidelity=_fidelity(work, candidate),
        figures=_figures(work, candidate),
        coverage=work.coverage.get(candidate.artifact),
        estimate=work.prediction(candidate.id).estimate,
        no_estimate=work.prediction(candidate.id).reason,
        calibration=str(made[candidate.artifact].description.extra.get("calibration", "")),
    )


def _fidelity(work: Work, candidate: Candidate) -> document.Fidelity | None:
    found = work.validation.assessments.get(candidate.artifact)
    if found is None:
        return None
    fidelity = found.fidelity
    largest = [output.largest_error for output in fidelity.outputs if output.largest_error is not None]
    return document.Fidelity(
        _short(fidelity.cosine),
        _short(fidelity.kl),
        fidelity.clipped_share,
        _short(max(largest, default=None)),
    )


def _figures(work: Work, candidate: Candidate) -> tuple[document.Figure, ...]:
    found = work.validation.assessments.get(candidate.artifact)
    return tuple(
        document.Figure(
            figure.name,
            _short(figure.baseline) or 0.0,
            _short(figure.value) or 0.0,
            _short(figure.interval.low) if figure.interval else None,
            _short(figure.interval.high) if figure.interval else None,
            figure.verdict.answer,
            figure.verdict.sentence(),
        )
        for figure in (found.figures if found else ())
        if math.isfinite(figure.value)
    )


def _short(value: float | None) -> float | None:
    """Six digits, so that a signed report does not depend on the last bit; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _times_faster(candidate: Candidate, measured: Mapping[str, Measurement]) -> float | None:
    own = measured.get(candidate.id)
    reference = measured.get(reference_of(candidate))
    if own is None or reference is None or own.timing is None or reference.timing is None:
        return None
    return round(reference.timing.p50_ns / own.timing.p50_ns, 3)


def _computed(
    work: Work, candidate: Candidate, operators: Sequence[Operator]
) -> tuple[int, tuple[document.FloatOperator, ...]]:
    """How many operators compute, and those of an integer file that do so in floats or not on the accelerator.

    The runtime's own word where this machine has the runtime; the rules of the accelerator elsewhere.
    """
    counted = sum(1 for operator in operators if operator.type not in EDGES)
    if not work.plan.artifact(candidate.artifact).precision.startswith("int"):
        return counted, ()
    coverage = work.coverage.get(candidate.artifact)
    if candidate.accelerator == "cpu" and coverage is not None:
        left = tuple(document.FloatOperator(op.name, op.type, op.reason) for op in coverage.left_out)
        return coverage.operators, left
    rules = support.find(candidate.runtime if candidate.accelerator == "cpu" else candidate.accelerator)
    found = rules.place(operators).left_out
    left = tuple(document.FloatOperator(op.name, op.type, op.reason) for op in found if op.type not in EDGES)
    return counted, left


def _explained(work: Work) -> list[document.Decision]:
    """Where the error comes from, what the search chose, and what runs in integers."""
    found: list[document.Decision] = []
    for name, attribution in work.attributions.items():
        found.append(
            document.Decision(
                name,
                f"most of the error comes from {attribution.dominant}: {attribution.cure()}",
                attribution.sentence(),
            )
        )
    for entry in work.mixed:
        found.extend(_searched(entry))
    for name, coverage in work.coverage.items():
        if work.plan.artifact(name).precision != "fp32":
            found.append(document.Decision(name, "what runs in integers", coverage.sentence()))
            found.extend(document.Decision(name, "known problem", text) for text in problems(coverage))
    return found


def _searched(mixed: Mixed) -> list[document.Decision]:
    journal, best = mixed.journal, mixed.journal.best
    goal = journal.goal.sentence()
    if best is None:
        return []
    subject = f"search from {mixed.base}"
    if mixed.shared_with:
        reason = "both runtimes take the same int8 file"
        return [document.Decision(subject, f"as found from {mixed.shared_with}", reason)]
    if not best.changes:
        said = "it keeps" if best.kept else "nothing that was tried comes nearer to"
        return [document.Decision(subject, "int8 everywhere", f"{said} {goal}")]
    kept = "keeps" if best.kept else "comes nearest to"
    taken = "estimated at" if best.is_estimated else "at"
    reason = f"{kept} {goal} {taken} {best.relative_time:.2f} of the float file's time, found in {len(journal.points)} tries"
    found = [document.Decision(subject, ", ".join(mixed.changes), reason)]
    if mixed.exclude:
        found.append(
            document.Decision(
                subject, mixed.exclude, "for [quantize] of a recipe: these in float32, without a search"
            )
        )
    return found


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
            calibration = work.request.recipe.thorough_calibration
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
    for name, found_of in work.validation.assessments.items():
        verdict = found_of.verdict
        if verdict is not None and plan.artifact(name).precision != "fp32":
            found.append(document.Decision(name, f"--max-drop: {verdict.answer}", verdict.sentence()))
    found.extend(_explained(work))
    for candidate in plan.candidates:
        estimate = work.prediction(candidate.id).estimate
        if estimate is not None:
            found.append(document.Decision(candidate.id, estimate.short(), f"not measured: {estimate.basis}"))
        choice = choices[candidate.id]
        found.append(
            document.Decision(candidate.id, "shipped" if choice.shipped else "not shipped", choice.reason)
        )
    return tuple(found)
