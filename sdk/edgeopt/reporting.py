# SPDX-License-Identifier: Apache-2.0
"""The report of a build as one document, and the part of it that the same inputs give again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeopt.evaluate.parity_runtimes import RuntimePair, compare_files
from edgeopt.plan import Plan
from edgeopt.report import document
from edgeopt.report.candidates import describe
from edgeopt.report.choices import Choice
from edgeopt.report.decisions import decisions
from edgeopt.report.work import Work
from edgeopt_converters import graph
from edgeopt_profiles.profile import load_profile
from edgeopt_wire.document import to_json

if TYPE_CHECKING:
    from edgeopt.progress import Progress


def build_report(work: Work, choices: Mapping[str, Choice], progress: Progress) -> document.BuildReport:
    """Put everything into one document."""
    plan, manifest, validation, measured = work.plan, work.manifest, work.validation, work.measured
    operators = {name: graph.of(entry.model()).operators for name, entry in work.made.items()}
    candidates = tuple(
        describe(work, candidate, choices[candidate.id], operators[candidate.artifact])
        for candidate in plan.candidates
    )
    warnings = list(validation.warnings)
    if plan.device.id != "host":
        warnings.append(
            f"latencies were taken on this machine, not on a {plan.device.title}; a rollout measures on the device"
        )
    warnings.extend(_timed_otherwise(plan, load_profile("host").cpu.isa))
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
        decisions=decisions(work, choices),
        provenance=manifest.provenance,
        warnings=tuple(dict.fromkeys(warnings)),
        attributions=dict(work.attributions),
        searches={entry.base: entry.journal for entry in work.mixed if not entry.shared_with},
        runtime_pairs=_runtime_pairs(work, choices),
    )


def _timed_otherwise(plan: Plan, here: Sequence[str]) -> tuple[str, ...]:
    """What this machine's instructions leave open: OpenVINO's integers without VNNI may be slower than floats."""
    files = {
        entry.id for entry in plan.artifacts if entry.runtime == "openvino" and entry.precision == "int8"
    }
    if plan.device.id == "host" or not files or not any("vnni" in name for name in here):
        return ()
    said = (
        "OpenVINO's int8 files were timed on a CPU with VNNI only; without it they may be slower than the float file, as "
        "products of matrices are: nothing is promised there, and a device measures all variants before it takes one"
    )
    return (said,)


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
