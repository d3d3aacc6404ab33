# SPDX-License-Identifier: Apache-2.0
"""`edgeopt build`: baseline -> optimize -> validate -> measure gains, then one package for one device class.

Rules:
- The unmodified model is measured first, then every candidate, on the same data with the code that the agent runs.
- What is shipped, and why the rest is not, stands in the report; a broken budget ships nothing.
- Quality figures are rounded before they enter the signed manifest, so that the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from edgeopt.budget import Budget
from edgeopt.cache import Cache
from edgeopt.compress import make_artifacts
from edgeopt.coverage import Coverage
from edgeopt.coverage import read as read_coverage
from edgeopt.cures import is_corrected
from edgeopt.extras import check_extras
from edgeopt.mixed import Mixed, search_mixed, with_mixed
from edgeopt.package import GOLDEN_INPUTS, SUFFIX, file_entries, report_path, write_manifest, write_package
from edgeopt.plan import BASELINE, MIN_SQNR_DB, Candidate, Plan, make_plan, suits_dynamic
from edgeopt.predict import Prediction, foresee, predictions
from edgeopt.progress import Progress
from edgeopt.provenance import MAX_PROVENANCE_BYTES, PROVENANCE_PATH, envelope
from edgeopt.recipe import Recipe
from edgeopt.reporting import Work, build_report, choose, repeatable
from edgeopt.search import Aim
from edgeopt.served_package import check_served, lay_out, manifest_extra, prove_served
from edgeopt.sources import Source, load_source
from edgeopt.uncalibrated import SAID
from edgeopt.uncalibrated import making as uncalibrated
from edgeopt.validate import Question, Validation, check_task, not_measured, validate
from edgeopt.wanted import Wanted
from edgeopt.workbench import Workbench
from edgeopt_converters import graph
from edgeopt_profiles.operators import Operator
from edgeopt_profiles.profile import load_profile
from edgeopt_wire.document import canonical_bytes, to_bytes, to_json
from edgeopt_wire.errors import EdgeoptError, RecipeError
from edgeopt_wire.manifest import Compatible, Manifest, Provenance, Variant
from edgeopt_wire.measurement import Measurement

if TYPE_CHECKING:
    from edgeopt.evaluate.samples import Samples
    from edgeopt.report.document import BuildReport

HOST = "build-host"
"""What this machine is called in the measurements of a build."""

ROUNDS = 2
"""Interleaved, so that a machine that slows down does not favour who came first."""


@dataclass(frozen=True)
class BuildRequest:
    """What the command line asks for. `quick` measures shorter and once, for a first look."""

    model: str
    device: str
    calibration: str = ""
    evaluation: str = ""
    evaluation_limit: int | None = None
    budget: Budget = field(default_factory=Budget)
    recipe: Recipe = field(default_factory=Recipe)
    output: Path = Path()
    quick: bool = False
    builder: Any = None
    """Signs the statement of provenance (a securesystemslib signer), or nobody does."""


@dataclass(frozen=True)
class BuildOutcome:
    """What a build gave. `package` is None where the budget was not met."""

    report: BuildReport
    report_json: Path
    report_html: Path
    package: Path | None


@dataclass(frozen=True)
class Loaded:
    """Everything that goes in, loaded and digested."""

    source: Source
    calibration: Samples | None
    evaluation: Samples | None
    labels: tuple[str, ...]
    training: Samples | None = None
    stand_in: Samples | None = None
    """Noise in place of calibration data, where none is wanted."""


def plan_build(request: BuildRequest) -> Plan:
    """Decide what a build would make, without making it (`--dry-run`).

    An ONNX file is looked at, because what is in it decides too; other models would have to be exported first.

    Raises:
        RecipeError: The recipe does not fit the device, or the ONNX file cannot be read.
    """
    plan = make_plan(load_profile(request.device), request.recipe)
    if not request.model.endswith(".onnx") or _is_decided(request, plan):
        return plan
    source = load_source(request.model, request.recipe)
    return _by_traits(request, plan, graph.of(source.model).operators)


def foresee_build(request: BuildRequest, plan: Plan) -> dict[str, Prediction]:
    """Estimate what a build would give, by candidate; nothing where the model is no ONNX file yet.

    Raises:
        RecipeError: The ONNX file cannot be read.
    """
    if not request.model.endswith(".onnx") or plan.device.id == "host":
        return {}
    source = load_source(request.model, request.recipe)
    return foresee(plan, graph.of(source.model).operators)


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
        plan = _suited(request, plan, loaded, bench)
        made = make_artifacts(plan, loaded.source, loaded.calibration, request.recipe, bench)
        made = _train(request, plan, made, loaded, bench)
        mixed = _search(request, plan, made, loaded, bench)
        plan = with_mixed(plan, mixed)
        made |= {entry.made.artifact.id: entry.made for entry in mixed if entry.made is not None}
        stage = scratch / "stage"
        manifest = _stage(stage, plan, made, loaded, request)
        manifest = replace(manifest, files=file_entries(stage, _files(stage)))
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
        manifest = replace(manifest, variants=_with_quality(manifest.variants, plan, validation))
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


def _suited(request: BuildRequest, plan: Plan, loaded: Loaded, bench: Workbench) -> Plan:
    """The plan that suits the model, by its ONNX form."""
    if _is_decided(request, plan):
        return plan
    if loaded.stand_in is not None:  # fixed ranges from batch normalization are what was asked for
        return plan
    base = lower("onnx", loaded.source.model, loaded.source.sha256, bench)
    return _by_traits(request, plan, graph.of(base.model()).operators)


def _is_decided(request: BuildRequest, plan: Plan) -> bool:
    """Whether what is in the model changes nothing: the recipe says what to make, or nothing is int8."""
    return bool(request.recipe.precisions) or all(artifact.precision != "int8" for artifact in plan.artifacts)


def _by_traits(request: BuildRequest, plan: Plan, operators: Sequence[Operator]) -> Plan:
    """Take run-time ranges instead of fixed ones where nearly all of the model's work is in matrix products.

    Fixed ranges lost most of MiniLM (cosine 0.94 against 0.998), and a device would choose them if they were faster.
    """
    offered = {target.precision for target in plan.device.targets if not target.by_recipe} - {"fp32", "int8"}
    if not suits_dynamic(operators) or "onnx" not in plan.formats:
        return plan
    try:
        return make_plan(plan.device, replace(request.recipe, precisions=(*sorted(offered), "int8-dynamic")))
    except RecipeError:  # this device runs no ONNX on its CPU
        return plan


def _check_task(request: BuildRequest, plan: Plan, loaded: Loaded, bench: Workbench) -> None:
    """Score the unmodified model before anything is made of it: its outputs are needed later anyway."""
    if loaded.evaluation is None:
        return
    artifact = plan.artifact(BASELINE)
    base = lower("onnx", loaded.source.model, loaded.source.sha256, bench)
    own = tuple(candidate for candidate in plan.candidates if candidate.artifact == BASELINE)
    alone = replace(plan, artifacts=(artifact,), candidates=own)
    stage = bench.scratch / "baseline"
    manifest = _stage(stage, alone, {BASELINE: Made(artifact, base.file, base.description)}, loaded, request)
    check_task(
        stage, manifest, alone, samples=loaded.evaluation, evaluation=request.recipe.evaluate, bench=bench
    )


def load_inputs(request: BuildRequest, plan: Plan) -> Loaded:
    """Load the model and its data, and refuse at once what would fail later.

    Raises:
        RecipeError: Something is not there or does not fit.
        UnsupportedError: An extra is not installed.
    """
    from edgeopt.evaluate.preprocess import Preprocess
    from edgeopt.evaluate.samples import load_samples

    uncalibrated.check(request.recipe, request.calibration)
    source = load_source(request.model, request.recipe)
    check_extras(plan, source)
    keys = dict(request.recipe.preprocess or source.preprocess)
    preprocess = Preprocess.from_mapping(keys) if keys else None
    inputs = source.model.inputs
    calibration = evaluation = training = None
    if request.calibration:
        wanted = request.recipe.calibration.samples
        calibration = load_samples(request.calibration, inputs, preprocess, limit=wanted, seed=0)
    if request.evaluation:
        limit = request.evaluation_limit
        evaluation = load_samples(request.evaluation, inputs, preprocess, limit=limit, seed=1)
    if data := request.recipe.train.data:
        training = load_samples(data, inputs, preprocess, limit=request.recipe.train.samples, seed=2)
    labels = source.labels
    if request.recipe.labels:
        labels = _read_labels(Path(request.recipe.labels))
    stand_in = (
        uncalibrated.stand_in(source, request.recipe) if uncalibrated.is_asked(request.recipe) else None
    )
    return Loaded(source, calibration, evaluation, labels, training, stand_in)


def _blind(validation: Validation, loaded: Loaded, request: BuildRequest) -> Validation:
    """Say first that no data chose the ranges, and withhold what only noise measured."""
    if loaded.evaluation is None:
        validation = not_measured(validation)
    said = (SAID,) if request.budget.max_drop is None else (SAID, uncalibrated.NO_SEARCH)
    return replace(validation, warnings=(*said, *validation.warnings))


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the labels {path}: {error}") from error


def _stage(
    stage: Path, plan: Plan, made: Mapping[str, Made], loaded: Loaded, request: BuildRequest
) -> Manifest:
    """Lay out model files and golden samples, and describe every candidate, shipped or not."""
    recipe, source = request.recipe, loaded.source
    places = places_of(made)
    for name, place in places.items():
        target = stage / place
        target.parent.mkdir(parents=True, exist_ok=True)
        lay_out(made[name].file, target, recipe.serving)
    if loaded.labels:
        (stage / "labels.txt").write_text("\n".join(loaded.labels) + "\n", encoding="utf-8")
    provenance = Provenance(
        source_sha256=source.sha256,
        recipe_sha256=recipe.digest(),
        calibration_sha256=loaded.calibration.digest if loaded.calibration else "",
        evaluation_sha256=loaded.evaluation.digest if loaded.evaluation else "",
        tools=tool_versions(),
    )
    profile = plan.device
    return Manifest(
        name=source.model.name,
        version=recipe.version or _version(provenance, profile.id),
        device=profile.id,
        compatible=Compatible(tuple(profile.device_classes), tuple(profile.architectures)),
        signature_inputs=source.model.inputs,
        signature_outputs=source.model.outputs,
        variants=tuple(
            _variant(candidate, plan, made[candidate.artifact], places[candidate.artifact])
            for candidate in plan.candidates
        ),
        files=file_entries(stage, _files(stage)),
        golden_inputs=GOLDEN_INPUTS,
        baseline={"artifact": BASELINE, "file_bytes": made[BASELINE].size_bytes},
        provenance=provenance,
        labels="labels.txt" if loaded.labels else "",
        preprocess=dict(recipe.preprocess or source.preprocess),
        postprocess=dict(recipe.postprocess),
        extra=manifest_extra(recipe.serving),
    )


def _version(provenance: Provenance, device: str) -> str:
    return hashlib.sha256(canonical_bytes([to_json(provenance), device])).hexdigest()[:12]


def _variant(candidate: Candidate, plan: Plan, made: Made, place: str) -> Variant:
    artifact = plan.artifact(candidate.artifact)
    return Variant(
        id=candidate.id,
        runtime=candidate.runtime,
        precision=artifact.precision,
        file=place,
        inputs=made.description.inputs,
        outputs=made.description.outputs,
        golden=f"golden/outputs/{artifact.id}",
        min_sqnr_db=MIN_SQNR_DB[artifact.precision],
        threads=candidate.threads,
        accelerator=candidate.accelerator,
        notes=made.description.notes,
        extra=made.description.extra,
    )


def _files(stage: Path) -> list[str]:
    return [
        path.relative_to(stage).as_posix()
        for path in stage.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    ]


def _with_quality(variants: tuple[Variant, ...], plan: Plan, validation: Validation) -> tuple[Variant, ...]:
    artifacts = {candidate.id: candidate.artifact for candidate in plan.candidates}
    return tuple(replace(variant, quality=validation.quality(artifacts[variant.id])) for variant in variants)


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
        report = _pack(base, stage, replace(manifest, variants=shipped), report, work.request)
    target = report_path(base)
    page = target.with_suffix(".html")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(to_bytes(report))
        html.write(report, page)
    except OSError as error:
        raise EdgeoptError(f"cannot write the report {target}: {error.strerror}") from error
    return BuildOutcome(report, target, page, package)


def _pack(
    target: Path, stage: Path, manifest: Manifest, report: BuildReport, request: BuildRequest
) -> BuildReport:
    """Pack the shipped variants with the report's repeatable part and provenance, and say what was packed."""
    (stage / "report.json").write_bytes(to_bytes(repeatable(report)))
    wanted = {variant.file for variant in manifest.variants} | {"report.json"}
    golden = (GOLDEN_INPUTS, *(variant.golden for variant in manifest.variants))
    for path in _files(stage):
        if path == manifest.labels or path.startswith(tuple(f"{folder}/" for folder in golden)):
            wanted.add(path)
    entries = file_entries(stage, wanted)
    content = sum(entry.size_bytes for entry in entries)
    # the package itself while it arrives, and the slot that it is unpacked into
    compatible = replace(manifest.compatible, disk_bytes=2 * (content + MAX_PROVENANCE_BYTES))
    packed = replace(manifest, files=entries, compatible=compatible)
    (stage / PROVENANCE_PATH).write_bytes(envelope(packed, request.recipe, request.builder))
    packed = replace(packed, files=file_entries(stage, {*wanted, PROVENANCE_PATH}))
    digest = write_package(stage, packed, target)
    return replace(report, package=target.name, package_sha256=digest, package_bytes=target.stat().st_size)
