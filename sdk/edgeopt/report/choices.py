# SPDX-License-Identifier: Apache-2.0
"""Which candidates a build ships, and why: those that run right, are not slower than float, and keep the budget."""

from __future__ import annotations

from dataclasses import dataclass

from edgeopt.budget import Facts
from edgeopt.evaluate.metrics import SQNR_CEILING_DB
from edgeopt.plan import Candidate
from edgeopt.predict import is_slower, speaks_for
from edgeopt.report.work import Work, reference_of, times_faster
from edgeopt_wire.measurement import Measurement

SLOWER = 1.03
"""A candidate whose p50 and whose best run are above its float file's by more than this is slower. Two rounds of the same
file on a shared machine differ by up to three hundredths."""


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
    faster = times_faster(candidate, work.measured)
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
