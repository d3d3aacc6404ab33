# SPDX-License-Identifier: Apache-2.0
"""What a build decided, each choice with its reason: the log that a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeopt.coverage import problems
from edgeopt.report.choices import Choice
from edgeopt.report.document import Decision
from edgeopt.report.work import Work

if TYPE_CHECKING:
    from edgeopt.mixed import Mixed


def decisions(work: Work, choices: Mapping[str, Choice]) -> tuple[Decision, ...]:
    """List every choice: grids, ranges, passes, what the evaluation says, what ships."""
    plan = work.plan
    found = []
    for artifact in plan.artifacts:
        if artifact.scheme is not None:
            scheme = artifact.scheme
            grain = "channel" if scheme.per_channel else "tensor"
            kind = "symmetric" if scheme.symmetric_activations else "asymmetric"
            found.append(
                Decision(
                    artifact.id,
                    f"{scheme.weight_dtype} weights per {grain}, {kind} {scheme.activation_dtype} activations",
                    f"what the profile of {plan.device.id} says its runtime fuses",
                )
            )
            calibration = work.request.recipe.thorough_calibration
            found.append(
                Decision(
                    artifact.id,
                    f"ranges by {calibration.sentence()}",
                    "the recipe's calibration, or its default",
                )
            )
    for artifact in plan.artifacts:
        notes = work.made[artifact.id].description.notes
        found.extend(Decision(artifact.id, "note", note) for note in notes)
    for name, found_of in work.validation.assessments.items():
        verdict = found_of.verdict
        if verdict is not None and plan.artifact(name).precision != "fp32":
            found.append(Decision(name, f"--max-drop: {verdict.answer}", verdict.sentence()))
    found.extend(_explained(work))
    for candidate in plan.candidates:
        estimate = work.prediction(candidate.id).estimate
        if estimate is not None:
            found.append(Decision(candidate.id, estimate.short(), f"not measured: {estimate.basis}"))
        choice = choices[candidate.id]
        found.append(Decision(candidate.id, "shipped" if choice.shipped else "not shipped", choice.reason))
    return tuple(found)


def _explained(work: Work) -> list[Decision]:
    """Where the error comes from, what the search chose, and what runs in integers."""
    found: list[Decision] = []
    for name, attribution in work.attributions.items():
        found.append(
            Decision(
                name,
                f"most of the error comes from {attribution.dominant}: {attribution.cure()}",
                attribution.sentence(),
            )
        )
    for entry in work.mixed:
        found.extend(_searched(entry))
    for name, coverage in work.coverage.items():
        if work.plan.artifact(name).precision != "fp32":
            found.append(Decision(name, "what runs in integers", coverage.sentence()))
            found.extend(Decision(name, "known problem", text) for text in problems(coverage))
    return found


def _searched(mixed: Mixed) -> list[Decision]:
    journal, best = mixed.journal, mixed.journal.best
    goal = journal.goal.sentence()
    if best is None:
        return []
    subject = f"search from {mixed.base}"
    if mixed.shared_with:
        reason = "both runtimes take the same int8 file"
        return [Decision(subject, f"as found from {mixed.shared_with}", reason)]
    if not best.changes:
        said = "it keeps" if best.kept else "nothing that was tried comes nearer to"
        return [Decision(subject, "int8 everywhere", f"{said} {goal}")]
    kept = "keeps" if best.kept else "comes nearest to"
    taken = "estimated at" if best.is_estimated else "at"
    reason = f"{kept} {goal} {taken} {best.relative_time:.2f} of the float file's time, found in {len(journal.points)} tries"
    found = [Decision(subject, ", ".join(mixed.changes), reason)]
    if mixed.exclude:
        found.append(
            Decision(subject, mixed.exclude, "for [quantize] of a recipe: these in float32, without a search")
        )
    return found
