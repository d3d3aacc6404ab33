# SPDX-License-Identifier: Apache-2.0
"""Which of two files of one artifact is the better one: both run in their runtime on the same samples.

Rules:
- One that keeps `--max-drop` beats one that does not; then the figure of the task decides where labels taught; then the
  SQNR of the outputs, in tenths of a decibel. Equal means the first, which cost less.
- The verdict is a sentence with both figures, for the report.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.artifacts import Made
from edgeopt.progress import Step
from edgeopt.sources import Source, file_digest
from edgeopt.workbench import Workbench
from edgeopt_wire.document import to_json
from edgeopt_wire.manifest import Variant

if TYPE_CHECKING:
    from edgeopt.evaluate.assess import Assessment, Reference
    from edgeopt.evaluate.outputs import Outputs
    from edgeopt.evaluate.samples import Sample, Samples
    from edgeopt.validate import Question

OUTPUTS = "outputs.npz"


@dataclass(frozen=True)
class Part:
    """Some samples of a data set, by their numbers in rising order."""

    whole: Samples
    numbers: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Of the whole and of what is taken of it."""
        return hashlib.sha256(f"{self.whole.digest} {self.numbers}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Sample]:
        wanted = set(self.numbers)
        return (sample for number, sample in enumerate(self.whole) if number in wanted)


@dataclass(frozen=True)
class Verdict:
    """Whether the second file is the better one, and what both gave."""

    is_better: bool
    sentence: str


@dataclass(frozen=True)
class Judge:
    """What two files are judged by: the float model's outputs on samples, `of_what` they are, and what is asked."""

    source: Source
    samples: Samples
    of_what: str
    question: Question
    bench: Workbench

    def choose(self, baseline: Made, first: Made, second: Made, *, by_labels: bool = False) -> Verdict:
        """Compare two files of one artifact with the float model."""
        reference = self._reference(baseline)
        before, after = (self._assess(reference, made) for made in (first, second))
        is_better = self._rank(after, by_labels=by_labels) > self._rank(before, by_labels=by_labels)
        said = f"{_said(after)} against {_said(before)} on {len(self.samples)} {self.of_what}"
        return Verdict(is_better, said)

    def keeps(self, baseline: Made, made: Made) -> bool:
        """Whether one file keeps `--max-drop`."""
        return self._keeps_drop(self._assess(self._reference(baseline), made))

    def _reference(self, baseline: Made) -> Reference:
        from edgeopt.evaluate.assess import refer

        return refer(self._outputs(baseline), self.question.evaluation)

    def _assess(self, reference: Reference, made: Made) -> Assessment:
        from edgeopt.evaluate.assess import assess

        return assess(
            reference,
            self._outputs(made),
            specs=made.description.outputs,
            max_drop=self.question.max_drop,
            relative=self.question.relative,
        )

    def _rank(self, found: Assessment, *, by_labels: bool) -> tuple[bool, float, float]:
        figure = found.figures[0] if by_labels and found.figures else None
        value = 0.0 if figure is None else figure.value if figure.higher_is_better else -figure.value
        sqnr = found.quality.sqnr_db
        return self._keeps_drop(found), value, float("-inf") if sqnr is None else sqnr

    def _keeps_drop(self, found: Assessment) -> bool:
        """Whether a file keeps `--max-drop`, on the samples as they are; without a task, agreement is what drops."""
        allowed = self.question.max_drop
        if allowed is None:
            return True
        if found.verdict is None:
            return 1 - (found.quality.agreement or 0.0) <= allowed
        return found.verdict.drop <= allowed * (
            abs(found.figures[0].baseline) if self.question.relative else 1.0
        )

    def _outputs(self, made: Made) -> Outputs:
        """What a file says, as a cached stage."""
        from edgeopt.evaluate.outputs import Outputs, collect
        from edgeopt_agent import runtimes, tensors

        found, runtime = made.description, made.artifact.runtime
        key = {
            "stage": "judge",
            "artifact": file_digest(made.file),
            "inputs": to_json(found.inputs),
            "runtime": runtime,
            "samples": self.samples.digest,
        }
        variant = Variant(
            id="judged", runtime=runtime, precision=made.artifact.precision, file=made.file.name,
            inputs=found.inputs, outputs=found.outputs, golden="", min_sqnr_db=0.0, threads=1,
        )  # fmt: skip
        signature = self.source.model

        def make(folder: Path, step: Step) -> None:
            session = runtimes.find(runtime).load(made.file, variant)
            try:
                collect(
                    lambda inputs: tensors.from_variant(
                        found.outputs,
                        signature.outputs,
                        session.run(tensors.to_variant(signature.inputs, found.inputs, inputs)),
                    ),
                    self.samples,
                    step.advance,
                ).save(folder / OUTPUTS)
            finally:
                session.close()

        folder = self.bench.stage(f"judge {made.artifact.id}", key, make, total=len(self.samples))
        return Outputs.load(folder / OUTPUTS)


def _said(found: Assessment) -> str:
    """The figures of one file."""
    said = f"{found.quality.sqnr_db:.1f} dB" if found.quality.sqnr_db is not None else "no number"
    if found.quality.agreement is not None:
        said += f" and agreement {found.quality.agreement:.4f}"
    if found.figures:
        said += f" and {found.figures[0].name} {found.figures[0].value:.4g}"
    return said
