# SPDX-License-Identifier: Apache-2.0
"""`edgeopt build`: baseline -> optimize -> validate -> measure gains, then one package for one device class.

Rules:
- The unmodified model is measured first, then every candidate, on the same data with the code that the agent runs.
- What is shipped, and why the rest is not, stands in the report; a broken budget ships nothing.
- Quality figures are rounded before they enter the signed manifest, so that the same inputs give the same bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.artifacts import (
    Adapted,
    Made,
    attribute_artifact,
    code_digest,
    lower,
    places_of,
    tool_versions,
)
from edgeopt.attribute import Attribution
from edgeopt.cache import Cache
from edgeopt.compress import make_artifacts
from edgeopt.coverage import Coverage
from edgeopt.coverage import read as read_coverage
from edgeopt.cures import is_corrected
from edgeopt.expectations import with_expectations
from edgeopt.mixed import Mixed, search_mixed, with_mixed
from edgeopt.package import SUFFIX, report_path, write_manifest
from edgeopt.plan import BASELINE, Plan, make_plan
from edgeopt.predict import predictions
from edgeopt.progress import Progress
from edgeopt.report.choices import choose
from edgeopt.report.work import Work
from edgeopt.reporting import build_report
from edgeopt.request import BuildRequest, Loaded, load_inputs
from edgeopt.search import Aim
from edgeopt.served_package import check_served, prove_served
from edgeopt.staging import lay_out_package, pack, with_quality
from edgeopt.suiting import suited
from edgeopt.uncalibrated import SAID
from edgeopt.uncalibrated import making as uncalibrated
from edgeopt.validate import Question, Validation, check_task, not_measured, validate
from edgeopt.wanted import Wanted
from edgeopt.workbench import Workbench
from edgeopt_converters import graph
from edgeopt_profiles.profile import load_profile
from edgeopt_wire.document import to_bytes
from edgeopt_wire.errors import EdgeoptError, RecipeError
from edgeopt_wire.manifest import Manifest
from edgeopt_wire.measurement import Measurement

if TYPE_CHECKING:
    from edgeopt.evaluate.samples import Samples
    from edgeopt.report.document import BuildReport

HOST = "build-host"
"""What this machine is called in the measurements of a build."""

ROUNDS = 2
"""Interleaved, so that a machine that slows down does not favour who came first."""


@dataclass(frozen=True)
class BuildOutcome:
    """What a build gave. `package` is None where the budget was not met."""

    report: BuildReport
    report_json: Path
    report_html: Path
    package: Path | None


def build(request: BuildRequest, cache: Cache, progress: Progress) -> BuildOutcome:
    """Build the package that `request` asks for, and its report.

    Raises:
        EdgeoptError: One of its families; the message says what to do. Nothing half-written is left.
    """
    plan = make_plan(load_profile(request.device), request.recipe)
    cache.sweep()
    with tempfile.TemporaryDirectory(prefix="edgeopt-build-") as name:
        scratch = Path(name)
        with progress.stage("load") as step:
            loaded = load_inputs(request, plan)
            check_served(request.recipe, loaded.source.model)
            step.detail = loaded.source.description
        bench = Workbench(cache, scratch, progress, {**tool_versions(), "code": code_digest()})
        _check_task(request, plan, loaded, bench)
        plan = suited(request, plan, loaded, bench)
        made = make_artifacts(plan, loaded.source, loaded.calibration, request.recipe, bench)
        made = _train(request, plan, made, loaded, bench)
        mixed = _search(request, plan, made, loaded, bench)
        plan = with_mixed(plan, mixed)
        made |= {entry.made.artifact.id: entry.made for entry in mixed if entry.made is not None}
        stage = scratch / "stage"
        manifest = lay_out_package(stage, plan, made, loaded, request)
        validation = validate(
            stage,
            manifest,
            plan,
            samples=loaded.evaluation,
            fallback=loaded.calibration or loaded.stand_in,
            question=Question(request.recipe.evaluate, request.budget.max_drop, request.budget.relative),
            bench=bench,
        )
        prove_served(stage, manifest)
        if loaded.stand_in is not None:
            validation = _blind(validation, loaded, request)
        manifest = replace(manifest, variants=with_quality(manifest.variants, plan, validation))
        with progress.stage("learn what a device should see"):
            manifest = with_expectations(
                stage, manifest, evaluation=loaded.evaluation, calibration=loaded.calibration
            )
        coverage = _read_coverage(plan, made, loaded, progress)
        attributions = _attribute(plan, made, loaded, bench)
        measured = _measure(stage, manifest, plan, progress, quick=request.quick)
        work = Work(
            request,
            plan,
            made,
            loaded.source,
            manifest,
            validation,
            measured,
            coverage,
            attributions,
            mixed,
            predictions(plan, {name: graph.of(entry.model()).operators for name, entry in made.items()}),
        )
        with progress.stage("package and report"):
            return _finish(work, stage, progress)


def _check_task(request: BuildRequest, plan: Plan, loaded: Loaded, bench: Workbench) -> None:
    """Score the unmodified model before anything is made of it: its outputs are needed later anyway."""
    if loaded.evaluation is None:
        return
    artifact = plan.artifact(BASELINE)
    base = lower("onnx", loaded.source.model, loaded.source.sha256, bench)
    own = tuple(candidate for candidate in plan.candidates if candidate.artifact == BASELINE)
    alone = replace(plan, artifacts=(artifact,), candidates=own)
    stage = bench.scratch / "baseline"
    manifest = lay_out_package(
        stage, alone, {BASELINE: Made(artifact, base.file, base.description)}, loaded, request
    )
    check_task(
        stage, manifest, alone, samples=loaded.evaluation, evaluation=request.recipe.evaluate, bench=bench
    )


def _blind(validation: Validation, loaded: Loaded, request: BuildRequest) -> Validation:
    """Say first that no data chose the ranges, and withhold what only noise measured."""
    if loaded.evaluation is None:
        validation = not_measured(validation)
    said = (SAID,) if request.budget.max_drop is None else (SAID, uncalibrated.NO_SEARCH)
    return replace(validation, warnings=(*said, *validation.warnings))


def _measure(
    stage: Path, manifest: Manifest, plan: Plan, progress: Progress, *, quick: bool
) -> dict[str, Measurement]:
    from edgeopt.measure import QUICK, ProbeBudget, measure

    here = [candidate.id for candidate in plan.candidates if candidate.accelerator == "cpu"]
    write_manifest(stage, manifest)
    rounds = 1 if quick else ROUNDS
    with progress.stage("measure", len(here) * rounds) as step:
        return measure(
            stage,
            here,
            package_sha256="",
            device_id=HOST,
            device_class="host",
            stand_in_for="" if plan.device.id == "host" else plan.device.id,
            budget=QUICK if quick else ProbeBudget(),
            rounds=rounds,
            progress=lambda *_: step.advance(),
        )


def _train(
    request: BuildRequest, plan: Plan, made: dict[str, Made], loaded: Loaded, bench: Workbench
) -> dict[str, Made]:
    """Train int8 files where that is asked for, or where nothing else kept the drop."""
    from edgeopt import train

    if loaded.calibration is None:
        return made
    return train.train_artifacts(_wanted(request, plan, made, loaded, loaded.calibration), bench)


def _wanted(
    request: BuildRequest, plan: Plan, made: Mapping[str, Made], loaded: Loaded, calibration: Samples
) -> Wanted:
    question = Question(request.recipe.evaluate, request.budget.max_drop, request.budget.relative)
    return Wanted(
        plan,
        made,
        loaded.source,
        calibration,
        loaded.evaluation,
        loaded.training,
        request.recipe,
        question,
    )


def _search(
    request: BuildRequest, plan: Plan, made: Mapping[str, Made], loaded: Loaded, bench: Workbench
) -> tuple[Mixed, ...]:
    """Look for mixed precision where there is a goal, and data to judge it on."""
    if loaded.evaluation is None or loaded.calibration is None:
        if request.recipe.search != Aim():
            raise RecipeError("[search] judges files on evaluation data; give --calibration and --evaluation")
        return ()
    if request.budget.max_drop is not None or request.recipe.search != Aim():
        made = _uncorrected(request, plan, made, loaded, bench)
    return search_mixed(_wanted(request, plan, made, loaded, loaded.calibration), bench)


def _uncorrected(
    request: BuildRequest, plan: Plan, made: Mapping[str, Made], loaded: Loaded, bench: Workbench
) -> Mapping[str, Made]:
    """What a search begins with: biases that make up for a layer's int8 weights are wrong where it stays in floats."""
    wanted = [name for name, entry in made.items() if is_corrected(entry)]
    if not wanted:
        return made
    plain = make_artifacts(plan, loaded.source, loaded.calibration, request.recipe, bench, is_cured=False)
    return {**made, **{name: plain[name] for name in wanted}}


def _read_coverage(
    plan: Plan, made: Mapping[str, Made], loaded: Loaded, progress: Progress
) -> dict[str, Coverage]:
    """Ask each runtime what it makes of each integer file; a sample shows shapes that zeros might not."""
    samples = loaded.calibration or loaded.evaluation
    wanted = [artifact for artifact in plan.artifacts if artifact.precision.startswith("int")]
    found = {}
    with progress.stage("read what runs in integers", len(wanted)) as step:
        for artifact in wanted:
            with tempfile.TemporaryDirectory(prefix="edgeopt-") as folder:
                file = Path(folder) / Path(artifact.file).name  # a runtime tells formats by their suffix
                file.symlink_to(made[artifact.id].file.absolute())
                inputs = made[artifact.id].description.inputs
                rows = Adapted(samples, loaded.source.model.inputs, inputs) if samples else ()
                sample = next(iter(rows), None)
                found[artifact.id] = read_coverage(file, artifact.runtime, sample=sample)
            step.advance()
    return found


def _attribute(
    plan: Plan, made: Mapping[str, Made], loaded: Loaded, bench: Workbench
) -> dict[str, Attribution]:
    """Say where the error of each statically quantized ONNX file comes from; once where two runtimes share a file."""
    samples = loaded.evaluation or loaded.calibration
    if samples is None:
        return {}
    places = places_of(made)
    wanted: dict[str, str] = {}
    for artifact in plan.artifacts:
        if artifact.format == "onnx" and artifact.precision == "int8":
            wanted.setdefault(places[artifact.id], artifact.id)
    return {name: attribute_artifact(made[name], samples, loaded.source, bench) for name in wanted.values()}


def _finish(work: Work, stage: Path, progress: Progress) -> BuildOutcome:
    from edgeopt.report import html

    manifest, output = work.manifest, work.request.output
    choices = choose(work)
    base = output / f"{manifest.name}-{manifest.version}-{manifest.device}{SUFFIX}"
    shipped = tuple(variant for variant in manifest.variants if choices[variant.id].shipped)
    report = build_report(work, choices, progress)
    package = None
    if shipped:
        package = base
        report = pack(base, stage, replace(manifest, variants=shipped), report, work.request)
    target = report_path(base)
    page = target.with_suffix(".html")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(to_bytes(report))
        html.write(report, page)
    except OSError as error:
        raise EdgeoptError(f"cannot write the report {target}: {error.strerror}") from error
    return BuildOutcome(report, target, page, package)
