# SPDX-License-Identifier: Apache-2.0
"""A build's search for mixed precision: from its int8 ONNX artifact and its budget to one artifact more, or none.

The search runs where int8 alone does not keep `--max-drop`; its first try is int8 alone, so it answers that itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from edgeopt.artifacts import MODEL_FILE, TENSOR_SAMPLES, Adapted, Made, write_artifact
from edgeopt.onnx_select import PRODUCTS, describe
from edgeopt.plan import BASELINE, Artifact, Candidate, Plan
from edgeopt.search import BEST, Journal, Point, Trial, measure_point, rank_operators, relative_time, search
from edgeopt.sources import file_digest
from edgeopt_converters.model import Model
from edgeopt_wire.document import canonical_bytes, to_json
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.assess import Reference
    from edgeopt.evaluate.outputs import Outputs
    from edgeopt.evaluate.samples import Sample, Samples
    from edgeopt.ranges import Range
    from edgeopt.recipe import Recipe
    from edgeopt.sources import Source
    from edgeopt.validate import Question
    from edgeopt.workbench import Workbench
    from edgeopt_profiles.profile import Scheme

PRECISION = "int8-mixed"
MAX_SAMPLES = 400
"""Samples that one try is judged on; the report's figures are of all of them."""


@dataclass(frozen=True)
class Wanted:
    """What a search needs of a build."""

    plan: Plan
    made: Mapping[str, Made]
    source: Source
    calibration: Samples
    evaluation: Samples
    recipe: Recipe
    question: Question


@dataclass(frozen=True)
class Mixed:
    """What a search gave: its journal, operators by what survives an export, and the artifact where one was made."""

    journal: Journal
    floats: tuple[str, ...]
    made: Made | None


def search_mixed(wanted: Wanted, bench: Workbench) -> Mixed | None:
    """Search where the plan has int8 for ONNX Runtime's CPU and a drop is allowed; else None."""
    import onnx

    artifact = _searchable(wanted.plan)
    if artifact is None or wanted.question.max_drop is None or wanted.recipe.effort == "quick":
        return None
    made = wanted.made[artifact.id]
    key = {
        "stage": "search",
        "artifact": file_digest(made.file),
        "evaluation": wanted.evaluation.digest,
        "question": to_json(wanted.question),
        "tools": dict(bench.tools),
    }
    digest = hashlib.sha256(canonical_bytes(key)).hexdigest()
    folder = bench.cache.keep(f"search-{digest}", bench.scratch)
    judge = _Judge.open(wanted, made)
    with bench.progress.stage(f"search mixed precision from {artifact.id}") as step:
        alone = judge.point((), made.file.read_bytes())
        if alone.kept:
            step.detail = "int8 everywhere keeps the drop"
            return Mixed(Journal(digest, judge.allowed, (), (alone,), finished=True), (), None)
        workshop = _Workshop.open(judge, made)
        journal = search(workshop.trial(), folder, digest, on_try=lambda _: step.advance())
        best = journal.best
        step.detail = _said(best, len(journal.points))
    if best is None or not best.floats:
        return Mixed(journal, (), None)
    names = tuple(describe(workshop.folded, name) for name in best.floats)
    found = replace(artifact, id=f"{artifact.id}-mixed", precision=PRECISION)
    note = f"left in floats to keep --max-drop: {', '.join(names)}"
    target = bench.scratch / found.id
    target.mkdir(parents=True, exist_ok=True)
    program = onnx.load(folder / BEST)
    write_artifact(
        target,
        Model("onnx", program, made.description.name, made.description.inputs, made.description.outputs),
        (*made.description.notes, note),
    )
    described = replace(made.description, notes=(*made.description.notes, note))
    return Mixed(journal, names, Made(found, target / MODEL_FILE, described, made.origin))


def with_mixed(plan: Plan, mixed: Mixed) -> Plan:
    """The plan with the mixed artifact beside the int8 one, run with as many threads."""
    if mixed.made is None:
        return plan
    artifact = mixed.made.artifact
    threads = sorted(
        {
            candidate.threads
            for candidate in plan.candidates
            if candidate.runtime == "onnxruntime"
            and candidate.accelerator == "cpu"
            and not candidate.reference
        }
    )
    more = tuple(
        Candidate(f"onnxruntime-{PRECISION}-{count}t", artifact.id, "onnxruntime", count, "cpu")
        for count in threads
    )
    return replace(plan, artifacts=(*plan.artifacts, artifact), candidates=(*more, *plan.candidates))


def _searchable(plan: Plan) -> Artifact | None:
    runs_on_cpu = {
        candidate.artifact
        for candidate in plan.candidates
        if candidate.runtime == "onnxruntime" and candidate.accelerator == "cpu" and not candidate.reference
    }
    for artifact in plan.artifacts:
        if artifact.precision == "int8" and artifact.format == "onnx" and artifact.id in runs_on_cpu:
            return artifact
    return None


def _said(best: Point | None, tries: int) -> str:
    if best is None:
        return "nothing was tried"
    answer = "keeps" if best.kept else "nothing keeps"
    return f"{tries} tries; {answer} the drop with {len(best.floats)} operators in floats"


@dataclass(frozen=True)
class _Judge:
    """What the float model says of the evaluation samples, and how a file is compared with it."""

    wanted: Wanted
    made: Made
    float_file: bytes
    reference: Reference

    @classmethod
    def open(cls, wanted: Wanted, made: Made) -> _Judge:
        from edgeopt.evaluate.assess import refer

        float_file = wanted.made[BASELINE].file.read_bytes()
        outputs = _outputs(float_file, wanted, made)
        return cls(wanted, made, float_file, refer(outputs, wanted.question.evaluation))

    @property
    def allowed(self) -> float:
        """The drop that is allowed, in the unit of the judged figure."""
        allowed = self.wanted.question.max_drop or 0.0
        if self.wanted.question.relative and self.reference.scores is not None:
            allowed *= abs(self.reference.scores.find(self.reference.metric).value)
        return allowed

    def judge(self, file: bytes) -> tuple[float, float]:
        """The drop and the SQNR of a file."""
        from edgeopt.evaluate.assess import assess

        question = self.wanted.question
        found = assess(
            self.reference,
            _outputs(file, self.wanted, self.made),
            max_drop=question.max_drop,
            relative=question.relative,
        )
        sqnr = found.quality.sqnr_db if found.quality.sqnr_db is not None else 0.0
        if found.verdict is not None:
            return found.verdict.drop, sqnr
        return 1 - (found.quality.agreement or 0.0), sqnr

    def point(self, floats: tuple[str, ...], file: bytes) -> Point:
        """Judge and time one file."""
        return measure_point(self.trial((), {}, lambda _: file), floats)[0]

    def trial(
        self, order: tuple[str, ...], macs: Mapping[str, int], make: Callable[[tuple[str, ...]], bytes]
    ) -> Trial:
        """A search's question."""
        sample = next(iter(_adapted(self.wanted, self.made)))
        return Trial(
            order,
            macs,
            self.allowed,
            make,
            self.judge,
            lambda file: relative_time(self.float_file, file, sample),
        )


@dataclass(frozen=True)
class _Workshop:
    """Everything that making one try needs, set up once."""

    judge: _Judge
    scheme: Scheme
    folded: Any
    ranges: Mapping[str, Range]
    order: tuple[str, ...]
    macs: Mapping[str, int]

    @classmethod
    def open(cls, judge: _Judge, made: Made) -> _Workshop:
        import onnx

        from edgeopt.attribute import Laboratory, sensitivity
        from edgeopt.calibrate import Stream, find_ranges
        from edgeopt.onnx_graphs import fold, observer
        from edgeopt_converters import graph

        scheme = made.artifact.scheme
        if made.base is None or scheme is None:
            raise RecipeError(f"{made.artifact.id} was not made from a float model; nothing can be searched")
        wanted = judge.wanted
        folded = fold(onnx.load(made.base))
        adapted = Adapted(wanted.calibration, wanted.source.model.inputs, made.description.inputs)
        ranges = find_ranges(
            observer(folded),
            Stream(adapted),
            wanted.recipe.calibration,
            keep_full=frozenset(output.name for output in folded.graph.output),
            symmetric=scheme.symmetric_activations,
        )
        origin = onnx.load(made.origin or made.base)
        laboratory = Laboratory.open(origin, made.model().program, adapted, TENSOR_SAMPLES)
        owners = _owners(folded)
        errors = [(owners.get(entry.node, entry.node), entry.share) for entry in sensitivity(laboratory)]
        model = Model("onnx", folded, "search", made.description.inputs, made.description.outputs)
        macs = {operator.name: operator.macs for operator in graph.of(model).operators}
        return cls(judge, scheme, folded, ranges, rank_operators(folded, errors), macs)

    def trial(self) -> Trial:
        """A search's question: make a file with these operators in floats, judge it, time it."""
        from edgeopt.passes.quantize_static import with_ranges

        def make(floats: tuple[str, ...]) -> bytes:
            excluded = tuple(dict.fromkeys((*self.judge.wanted.recipe.exclude, *floats)))
            quantized = with_ranges(self.folded, self.scheme, self.ranges, excluded)
            program: bytes = quantized.SerializeToString(deterministic=True)
            return program

        return self.judge.trial(self.order, self.macs, make)


def _adapted(wanted: Wanted, made: Made) -> Adapted:
    return Adapted(wanted.evaluation, wanted.source.model.inputs, made.description.inputs)


def _outputs(file: bytes, wanted: Wanted, made: Made) -> Outputs:
    """Run the first samples in ONNX Runtime."""
    import onnxruntime as ort

    from edgeopt.evaluate.outputs import collect
    from edgeopt_agent.tensors import to_variant

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    signature, own_inputs = wanted.source.model.inputs, made.description.inputs

    def infer(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        own = to_variant(signature, own_inputs, inputs)
        return dict(zip(names, session.run(names, own), strict=True))

    return collect(infer, _First(wanted.evaluation))


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


def _owners(program: Any) -> dict[str, str]:
    """An activation that a runtime fuses into its convolution belongs to that: Relu or Clip -> the layer's name."""
    writer = {name: node for node in program.graph.node for name in node.output}
    found = {}
    for node in program.graph.node:
        source = writer.get(node.input[0]) if node.input else None
        if node.op_type in ("Relu", "Clip") and source is not None and source.op_type in PRODUCTS:
            found[node.name] = source.name
    return found
