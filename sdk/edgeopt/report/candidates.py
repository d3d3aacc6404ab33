# SPDX-License-Identifier: Apache-2.0
"""A candidate as the report shows it: its figures, its speed, and which of its operators compute in integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgeopt.plan import BASELINE, Candidate
from edgeopt.report import document
from edgeopt.report.choices import Choice
from edgeopt.report.work import Work, times_faster
from edgeopt_profiles import support
from edgeopt_profiles.operators import Operator

EDGES = ("QuantizeLinear", "DequantizeLinear", "QUANTIZE", "DEQUANTIZE", "Convert")
"""What only changes between floats and integers; it computes nothing of the model."""


def describe(
    work: Work, candidate: Candidate, choice: Choice, operators: Sequence[Operator]
) -> document.Candidate:
    """Put everything that is known of a candidate into one row."""
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
        times_faster=times_faster(candidate, measured),
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
