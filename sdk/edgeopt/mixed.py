# SPDX-License-Identifier: Apache-2.0
"""A build's searches for mixed precision: from its int8 artifacts and a goal to one artifact more for each, or none.

- The goal is the recipe's `[search]`, else `--max-drop`; with neither, and at effort `quick`, nothing is searched.
- The first try is int8 alone. Where it keeps the goal and nothing below int8 is asked for, that is the answer.
- What the levels of a format are, and how a file with them is made, is its workshop's (`mixed_onnx`, `mixed_litert`).
- Times are measured here, next to the float file, where this machine speaks for the device; elsewhere they are estimated
  where published latencies allow it (`edgeopt.predict`), and measured here as the last resort.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeopt.artifacts import MODEL_FILE, Adapted, Made, write_artifact
from edgeopt.plan import BASELINE, Artifact, Candidate, Plan
from edgeopt.predict import predict, speaks_for
from edgeopt.search import BEST, Changes, Goal, Journal, Judged, Knob, Point, Trial, measure_point, search
from edgeopt.side_by_side import loaded, relative_time
from edgeopt.sources import file_digest
from edgeopt.wanted import Wanted
from edgeopt_converters import graph
from edgeopt_converters.model import Model
from edgeopt_wire.document import canonical_bytes, to_json
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.assess import Reference
    from edgeopt.evaluate.outputs import Outputs
    from edgeopt.evaluate.samples import Sample, Samples
    from edgeopt.workbench import Workbench

PRECISION = "int8-mixed"
MAX_SAMPLES = 400
"""Samples that one try is judged on; the report's figures are of all of them."""

FORMATS = ("onnx", "litert")


def goal_of(wanted: Wanted) -> Goal | None:
    """What the recipe's `[search]` asks for, else the allowed drop in the unit of the judged figure."""
    asked = wanted.recipe.search.goal()
    if asked is not None or wanted.question.max_drop is None:
        return asked
    return Goal("drop", wanted.question.max_drop)


@dataclass(frozen=True)
class Mixed:
    """What a search gave: its journal, its changes by what survives an export, and the artifact where one was made."""

    base: str
    journal: Journal
    changes: tuple[str, ...] = ()
    exclude: str = ""
    """Ready to paste into a recipe's `[quantize]`, or empty."""
    made: Made | None = None
    shared_with: str = ""
    """The artifact whose search this is, where two runtimes take the same int8 file."""


class Workshop(Protocol):
    """How a format's files are made with a level for each operator."""

    knobs: tuple[Knob, ...]

    def make(self, changes: Changes) -> bytes:
        """A file with these changes; `RuntimeFailure` where the quantizer refuses them."""
        ...

    def describe(self, name: str) -> str:
        """The selector of an operator that survives an export."""
        ...

    def program(self, file: bytes) -> Any:
        """A file as a model's program."""
        ...


def search_mixed(wanted: Wanted, bench: Workbench) -> tuple[Mixed, ...]:
    """Search for every int8 artifact that a CPU runs, where there is a goal."""
    if goal_of(wanted) is None or wanted.recipe.effort == "quick":
        return ()
    found: dict[str, Mixed] = {}
    for artifact in _searchable(wanted.plan):
        made = wanted.made[artifact.id]
        same = next((entry for entry in found.values() if _is_same(wanted.made[entry.base], made)), None)
        found[artifact.id] = _shared(same, made) if same else _search_one(wanted, artifact, bench)
    return tuple(found.values())


def _is_same(first: Made, second: Made) -> bool:
    return file_digest(first.file) == file_digest(second.file)


def _shared(found: Mixed, made: Made) -> Mixed:
    """What was found for another runtime of the same int8 file; this one validates and measures it too."""
    artifact = _artifact(made)
    own = replace(found.made, artifact=artifact) if found.made else None
    return replace(found, base=made.artifact.id, made=own, shared_with=found.base)


def _artifact(made: Made) -> Artifact:
    return replace(made.artifact, id=f"{made.artifact.id}-mixed", precision=PRECISION)


def _search_one(wanted: Wanted, artifact: Artifact, bench: Workbench) -> Mixed:
    made = wanted.made[artifact.id]
    key = {
        "stage": "search",
        "artifact": file_digest(made.file),
        "runtime": artifact.runtime,
        "evaluation": wanted.judging.digest,
        "question": to_json(wanted.question),
        "search": to_json(wanted.recipe.search),
        "device": wanted.plan.device.id,
        "exclude": list(wanted.recipe.exclude),
        "tools": dict(bench.tools),
    }
    digest = hashlib.sha256(canonical_bytes(key)).hexdigest()
    folder = bench.cache.keep(f"search-{digest}", bench.scratch)
    options = wanted.recipe.search
    with (
        bench.progress.stage(f"search mixed precision from {artifact.id}") as step,
        _Judge.open(wanted, made) as judge,
    ):
        alone = measure_point(judge.trial(None), ())[0]
        if alone.kept and not options.goes_below:
            step.detail = f"int8 everywhere keeps {judge.goal.sentence()}"
            return Mixed(artifact.id, Journal(digest, judge.goal, (), (alone,), finished=True))
        workshop = _open_workshop(judge, made)
        trial = judge.trial(workshop)
        journal = search(trial, folder, digest, max_tries=options.max_tries, on_try=lambda _: step.advance())
        step.detail = _said(journal)
    best = journal.best
    if best is None or not best.changes:
        return Mixed(artifact.id, journal)
    return _finished(made, journal, best, workshop=workshop, folder=folder, bench=bench)


def _finished(
    made: Made, journal: Journal, best: Point, *, workshop: Workshop, folder: Path, bench: Workbench
) -> Mixed:
    """The best file as an artifact of the build."""
    names = tuple(f"{workshop.describe(change.operator)} {change.level}" for change in best.changes)
    exclude = ", ".join(
        f'"{workshop.describe(change.operator)}"' for change in best.changes if change.level != "int4"
    )
    found = _artifact(made)
    kept = "to keep" if best.kept else "as near as it came to"
    note = f"not int8, {kept} {journal.goal.sentence()}: {', '.join(names)}"
    target = bench.scratch / found.id
    target.mkdir(parents=True, exist_ok=True)
    of, notes = made.description, (*made.description.notes, note)
    program = workshop.program((folder / BEST).read_bytes())
    write_artifact(target, Model(of.format, program, of.name, of.inputs, of.outputs), notes)
    mixed = Made(found, target / MODEL_FILE, replace(of, notes=notes), made.origin)
    return Mixed(made.artifact.id, journal, names, f"exclude = [{exclude}]" if exclude else "", mixed)


def with_mixed(plan: Plan, mixed: tuple[Mixed, ...]) -> Plan:
    """The plan with the mixed artifacts beside the int8 ones, run with as many threads."""
    for entry in mixed:
        if entry.made is None:
            continue
        artifact = entry.made.artifact
        more = tuple(
            replace(candidate, id=candidate.id.replace("int8", PRECISION), artifact=artifact.id)
            for candidate in _on_cpu(plan)
            if candidate.artifact == entry.base
        )
        plan = replace(plan, artifacts=(*plan.artifacts, artifact), candidates=(*more, *plan.candidates))
    return plan


def _on_cpu(plan: Plan) -> list[Candidate]:
    return [entry for entry in plan.candidates if entry.accelerator == "cpu" and not entry.reference]


def _searchable(plan: Plan) -> list[Artifact]:
    run = {candidate.artifact for candidate in _on_cpu(plan)}
    return [
        artifact
        for artifact in plan.artifacts
        if artifact.precision == "int8"
        and artifact.format in FORMATS
        and artifact.id in run
        and (artifact.scheme is None or artifact.scheme.io == "float32")
    ]


def _open_workshop(judge: _Judge, made: Made) -> Workshop:
    from edgeopt import mixed_litert, mixed_onnx

    module: Any = {"onnx": mixed_onnx, "litert": mixed_litert}[made.artifact.format]
    samples = Adapted(judge.wanted.calibration, judge.wanted.source.model.inputs, made.description.inputs)
    workshop: Workshop = module.open_workshop(made, samples, judge.wanted.recipe)
    return workshop


def _said(journal: Journal) -> str:
    best = journal.best
    if best is None:
        return "nothing was tried"
    answer = "keeps" if best.kept else "nothing keeps"
    return f"{len(journal.points)} tries; {answer} {journal.goal.sentence()} with {len(best.changes)} operators not in int8"


@dataclass(frozen=True)
class _Judge:
    """What the float model says of the evaluation samples, and how a file is compared with it and timed."""

    wanted: Wanted
    made: Made
    reference: Reference
    goal: Goal
    sample: Mapping[str, np.ndarray]
    stack: ExitStack

    @classmethod
    def open(cls, wanted: Wanted, made: Made) -> _Judge:
        from edgeopt.evaluate.assess import refer

        baseline = wanted.made[BASELINE]
        outputs = _outputs(baseline.file.read_bytes(), wanted, baseline)
        reference = refer(outputs, wanted.question.evaluation)
        goal = goal_of(wanted)
        if goal is None:
            raise RecipeError("nothing says what a search is to keep; give --max-drop or [search]")
        if goal.metric == "drop" and wanted.question.relative and reference.scores is not None:
            goal = replace(goal, limit=goal.limit * abs(reference.scores.find(reference.metric).value))
        sample = next(iter(_adapted(wanted, made)))
        return cls(wanted, made, reference, goal, sample, ExitStack())

    def __enter__(self) -> _Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def judge(self, file: bytes) -> Judged:
        """How near a file is to the float model."""
        from edgeopt.evaluate.assess import assess

        question = self.wanted.question
        found = assess(
            self.reference,
            _outputs(file, self.wanted, self.made),
            max_drop=question.max_drop,
            relative=question.relative,
        )
        quality, verdict = found.quality, found.verdict
        drop = verdict.drop if verdict is not None else 1 - (quality.agreement or 0.0)
        return Judged(drop, quality.sqnr_db if quality.sqnr_db is not None else 0.0, found.fidelity.kl)

    def trial(self, workshop: Workshop | None) -> Trial:
        """A search's question; without a workshop, of the int8 artifact as it is."""
        if workshop is None:
            file = self.made.file.read_bytes()
            return Trial((), self.goal, lambda _: file, self.judge, self._timer(None))
        return Trial(workshop.knobs, self.goal, workshop.make, self.judge, self._timer(workshop))

    def _timer(self, workshop: Workshop | None) -> Any:
        runtime = self.made.artifact.runtime
        floats = self.wanted.made[f"{self.made.artifact.format}-fp32"]
        edges = (self.made.description.inputs, self.made.description.outputs)
        estimates = None if speaks_for(self.wanted.plan.device) else self._estimator(floats, workshop)

        def measured(file: bytes) -> tuple[float, bool]:
            with (
                loaded(floats.file.read_bytes(), runtime, *edges) as first,
                loaded(file, runtime, *edges) as second,
            ):
                return relative_time(first, second, self.sample), False

        def timer(file: bytes) -> tuple[float, bool]:
            ratio = estimates(file) if estimates is not None else None
            return measured(file) if ratio is None else (ratio, True)

        return timer

    def _estimator(self, floats: Made, workshop: Workshop | None) -> Any:
        """File -> estimated time over the float file's, or None where nothing is published to rest on."""
        device, of = self.wanted.plan.device, self.made.description
        candidate = next(
            entry for entry in _on_cpu(self.wanted.plan) if entry.artifact == self.made.artifact.id
        )
        mixed = replace(self.made.artifact, precision=PRECISION)
        plain = replace(self.made.artifact, precision="fp32")
        reference = predict(device, candidate, plain, graph.of(floats.model()).operators).estimate

        def ratio(file: bytes) -> float | None:
            if workshop is None:
                model = self.made.model()
            else:
                model = Model(of.format, workshop.program(file), of.name, of.inputs, of.outputs)
            own = predict(device, candidate, mixed, graph.of(model).operators).estimate
            if own is None or reference is None:
                return None
            return own.latency_ns / reference.latency_ns

        return ratio


def _adapted(wanted: Wanted, made: Made) -> Adapted:
    return Adapted(wanted.judging, wanted.source.model.inputs, made.description.inputs)


def _outputs(file: bytes, wanted: Wanted, made: Made) -> Outputs:
    """Run the first samples as the agent would."""
    from edgeopt.evaluate.outputs import collect
    from edgeopt_agent.tensors import from_variant, to_variant

    signature, own = wanted.source.model, made.description
    with loaded(file, made.artifact.runtime, own.inputs, own.outputs) as session:

        def infer(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = session.run(to_variant(signature.inputs, own.inputs, inputs))
            return from_variant(own.outputs, signature.outputs, found)

        return collect(infer, _First(wanted.judging))


@dataclass(frozen=True)
class _First:
    """The first samples of a data set."""

    whole: Samples

    @property
    def digest(self) -> str:
        return self.whole.digest

    def __len__(self) -> int:
        return min(len(self.whole), MAX_SAMPLES)

    def __iter__(self) -> Iterator[Sample]:
        return islice(iter(self.whole), MAX_SAMPLES)
