# SPDX-License-Identifier: Apache-2.0
"""Training as a step of a build: int8 files made again from a trained model, and kept where they are better.

How it goes:
- Training begins with what was made without it (weights rounded, channels equalized), in PyTorch; the unmodified model
  is the teacher, so samples need no labels. One training serves all files with the same grids.
- Trained weights are written into the ONNX form and enter the other formats from there; the ranges travel beside
  (`Made.description.ranges`). So every format holds the same integers.
- Each file is judged against the one without training, in its own runtime: on the evaluation samples, or without some
  on those calibration samples that judged and never taught.

Rules:
- Never worse: only the better file goes on. What was decided, and why, is a note of the file.
- A model that cannot be trained here (an operator without a form in PyTorch) is shipped as it was, and the note says so.
- Killed at any moment, the next build goes on behind the last saved step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.artifacts import Adapted, Made, lower, read_artifact, write_artifact
from edgeopt.compress import make_artifact
from edgeopt.judge import Judge, Part
from edgeopt.onnx_select import describe, select
from edgeopt.passes import Order
from edgeopt.passes.quantize_aware_training import Options
from edgeopt.plan import BASELINE, FROM_ONNX, Artifact, Plan
from edgeopt.progress import Step
from edgeopt.sources import file_digest
from edgeopt.wanted import Wanted
from edgeopt.workbench import Workbench
from edgeopt_converters.model import Model
from edgeopt_wire.document import to_json
from edgeopt_wire.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    from edgeopt.evaluate.samples import Sample, Samples
    from edgeopt_profiles.profile import Scheme

MAX_JUDGED = 400
"""Samples that two files are judged on; the report's figures are of all of them."""

ENOUGH_SAMPLES = 64
"""Calibration samples from which on the extensive effort trains by itself: fewer teach a net themselves, not the task."""

HUB_FORMATS = ("onnx", *FROM_ONNX)
"""Formats whose int8 pass takes the ONNX form itself."""


@dataclass(frozen=True)
class Union:
    """Two data sets, one behind the other."""

    first: Samples
    second: Samples

    @property
    def digest(self) -> str:
        """Of both."""
        return hashlib.sha256(f"{self.first.digest} {self.second.digest}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __iter__(self) -> Iterator[Sample]:
        return chain(self.first, self.second)


def train_artifacts(wanted: Wanted, bench: Workbench) -> dict[str, Made]:
    """Return the artifacts, those that training made better in the place of what they were.

    Raises:
        RecipeError: Training is asked for and an option of it makes no sense.
    """
    found = dict(wanted.made)
    groups = _groups(wanted.plan)
    if wanted.recipe.train.when == "always" and not groups:
        raise RecipeError(
            f"[train] trains files with int8 weights and activations, and this build for {wanted.plan.device.id} makes "
            'none; remove it, or add precisions = ["int8"]'
        )
    for artifacts in groups:
        judge = _judge(wanted, bench)
        if not _is_wanted(wanted, judge, artifacts):
            continue
        try:
            trained = _trained(wanted, artifacts, bench)
        except UnsupportedError as error:
            for artifact in artifacts:
                found[artifact.id] = _with_notes(found[artifact.id], f"not trained: {error}")
            continue
        for artifact in artifacts:
            found[artifact.id] = _better(wanted, artifact, trained, judge, bench)
    return found


def _groups(plan: Plan) -> list[tuple[Artifact, ...]]:
    """Int8 artifacts that one training serves: those with the same grids."""
    groups: dict[tuple[bool, bool], list[Artifact]] = {}
    for artifact in plan.artifacts:
        if artifact.precision == "int8" and artifact.scheme is not None:
            kind = (artifact.scheme.per_channel, artifact.scheme.symmetric_activations)
            groups.setdefault(kind, []).append(artifact)
    return [tuple(group) for group in groups.values()]


def _is_wanted(wanted: Wanted, judge: Judge, artifacts: Sequence[Artifact]) -> bool:
    """Always or never by recipe; else where the extensive effort did not keep the drop and the samples are enough."""
    recipe = wanted.recipe
    if recipe.train.when != "auto":
        return recipe.train.when == "always"
    has_question = wanted.question.max_drop is not None and wanted.evaluation is not None
    if recipe.effort != "extensive" or not has_question or len(wanted.calibration) < ENOUGH_SAMPLES:
        return False
    made = wanted.made
    return not all(judge.keeps(made[BASELINE], made[artifact.id]) for artifact in artifacts)


def _data(wanted: Wanted) -> Samples:
    """What teaches and what judges training: calibration first, because learned ranges are known by its first sample."""
    return wanted.calibration if wanted.more is None else Union(wanted.calibration, wanted.more)


def _judge(wanted: Wanted, bench: Workbench) -> Judge:
    """The evaluation samples judge, or those samples that never taught."""
    if wanted.evaluation is not None:
        count = min(len(wanted.evaluation), MAX_JUDGED)
        samples, of_what = Part(wanted.evaluation, tuple(range(count))), "evaluation samples"
    else:
        from edgeopt.training.held_out import split

        data, options = _data(wanted), _options(wanted)
        judging = split(min(len(data), options.samples), options.held_out)[1]
        samples, of_what = Part(data, tuple(judging[:MAX_JUDGED])), "samples that were held out"
    return Judge(wanted.source, samples, of_what, wanted.question, bench)


def _options(wanted: Wanted) -> Options:
    """The pass's options, with what the recipe's `[train]` says."""
    given = wanted.recipe.options("quantize_aware_training")
    options = given if isinstance(given, Options) else Options()
    if options.weight_bits != 8:
        raise RecipeError(
            f"[passes.quantize_aware_training]: weight_bits = {options.weight_bits}, and a build stores weights in 8 bits; "
            "remove it, or take int4-weights as precision"
        )
    training, named = wanted.recipe.train, wanted.recipe.passes.get("quantize_aware_training", {})
    if "max_seconds" not in named:
        options = replace(options, max_seconds=60 * training.minutes)
    if "samples" not in named:
        options = replace(options, samples=max(len(wanted.calibration) + training.samples, 4))
    if training.label_weight == 0:
        return replace(options, labels=())
    return replace(
        options, label_weight=training.label_weight, labels=_labels(_data(wanted), options.samples)
    )


def _labels(data: Samples, count: int) -> tuple[int, ...]:
    found = [sample.label for number, sample in enumerate(data) if number < count]
    classes = tuple(label for label in found if isinstance(label, int))
    if len(classes) < len(found):
        raise RecipeError(
            f"[train] label_weight needs class labels, and {len(found) - len(classes)} of {len(found)} samples have none; "
            "give them a labels.csv or class folders, or remove label_weight: the float model teaches without labels"
        )
    return classes


def _trained(wanted: Wanted, artifacts: Sequence[Artifact], bench: Workbench) -> Made:
    """The trained model in ONNX with its ranges, as a cached stage."""
    begin, scheme = _begin(wanted, artifacts)
    options, data = _options(wanted), _data(wanted)
    key = {
        "stage": "train",
        "begin": file_digest(begin),
        "teacher": file_digest(wanted.made[BASELINE].file),
        "samples": data.digest,
        "scheme": to_json(scheme),
        "calibration": to_json(wanted.recipe.calibration),
        "exclude": list(wanted.recipe.exclude),
        "options": to_json(options),
    }
    artifact = Artifact("onnx-trained", "onnx", "fp32", scheme)
    described = wanted.made[BASELINE].description

    def make(folder: Path, step: Step) -> None:
        order = Order(
            scheme=scheme,
            calibration=wanted.recipe.calibration,
            samples=Adapted(data, wanted.source.model.inputs, described.inputs),
            exclude=wanted.recipe.exclude,
            options=options,
            checkpoint=bench.partial(key),
            on_sample=step.advance,
        )
        _train(folder, begin, wanted.made[BASELINE].model(), order)

    total = min(options.samples, len(data)) + options.steps
    folder = bench.stage(f"train for {len(artifacts)} int8 files", key, make, total=total)
    return replace(read_artifact(folder, artifact), base=begin)


def _begin(wanted: Wanted, artifacts: Sequence[Artifact]) -> tuple[Path, Scheme]:
    """The float ONNX model that training begins with, and the scheme of the file that it was prepared for."""
    for artifact in sorted(artifacts, key=lambda entry: entry.format != "onnx"):
        made = wanted.made[artifact.id]
        begin = made.base if artifact.format in HUB_FORMATS else made.hub
        if begin is not None and artifact.scheme is not None:
            return begin, artifact.scheme
    scheme = artifacts[0].scheme
    assert scheme is not None  # for the type checker: `_groups` takes no artifact without one
    return wanted.made[BASELINE].file, scheme


def _train(folder: Path, begin: Path, teacher: Model, order: Order) -> None:
    """Train in PyTorch, and write the result into the ONNX model that it began with."""
    import onnx

    from edgeopt.onnx_graphs import fold
    from edgeopt.passes import quantize_aware_training
    from edgeopt.training.writing import with_weights
    from edgeopt_converters import onnx_to_torch

    program = fold(onnx.load(begin))
    student, names = onnx_to_torch.convert_with_names(replace(teacher, program=program))
    inputs = [spec.name for spec in student.inputs]
    result = quantize_aware_training.apply(
        student,
        replace(
            order,
            samples=_Renamed(order.samples, inputs),
            exclude=_selectors(program, order.exclude),
            reference=onnx_to_torch.convert(teacher),
        ),
    )
    trained = with_weights(program, result.model.program.state_dict, names)
    write_artifact(folder, replace(teacher, program=trained), result.notes, result.ranges)


@dataclass(frozen=True)
class _Renamed:
    """Samples whose inputs have other names, in the same order."""

    samples: Any
    names: Sequence[str]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for sample in self.samples:
            yield dict(zip(self.names, sample.values(), strict=True))


def _selectors(program: Any, exclude: Sequence[str]) -> tuple[str, ...]:
    """What a recipe excludes, as selectors that mean the same in PyTorch's graph; what has no grid there needs none."""
    from edgeopt.training.student import ONNX_TYPES

    found = [describe(program, name) for name in sorted(select(program, exclude))]
    return tuple(entry for entry in found if entry.partition("#")[0] in ONNX_TYPES.values())


def _better(wanted: Wanted, artifact: Artifact, trained: Made, judge: Judge, bench: Workbench) -> Made:
    """The artifact from the trained model, or as it was."""
    plain = wanted.made[artifact.id]
    try:
        base = _lowered(artifact, replace(trained, origin=plain.origin), bench)
    except UnsupportedError as error:
        return _with_notes(plain, f"not trained: {error}")
    made = make_artifact(
        artifact,
        base,
        wanted.source,
        wanted.calibration,
        plan=wanted.plan,
        recipe=wanted.recipe,
        bench=bench,
    )
    verdict = judge.choose(wanted.made[BASELINE], plain, made, by_labels=wanted.recipe.train.label_weight > 0)
    if not verdict.is_better:
        said = f"training not kept: {verdict.sentence}; {'; '.join(trained.description.notes)}"
        return _with_notes(plain, said)
    before = tuple(note for note in plain.description.notes if "rounded" in note or "equalized" in note)
    described = replace(
        made.description,
        notes=(*before, *made.description.notes, f"training kept: {verdict.sentence}"),
    )
    return replace(made, description=described)


def _lowered(artifact: Artifact, trained: Made, bench: Workbench) -> Made:
    """The trained model in the artifact's format, its ranges beside it."""
    if artifact.format in HUB_FORMATS:
        return replace(trained, hub=trained.file)
    found = lower(artifact.format, trained.model(), file_digest(trained.file), bench, of="trained ")
    described = replace(found.description, notes=trained.description.notes, ranges=trained.description.ranges)
    return replace(found, description=described, hub=trained.file)


def _with_notes(made: Made, *notes: str) -> Made:
    return replace(made, description=replace(made.description, notes=(*made.description.notes, *notes)))
