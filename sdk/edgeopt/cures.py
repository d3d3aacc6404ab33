# SPDX-License-Identifier: Apache-2.0
"""What is wrong with an int8 file decides which passes its float model gets, and measuring decides which of them stay.

| what the attribution says | pass |
|---|---|
| weights are a tenth of the error or more, and share one scale a tensor | `equalize_layers` |
| a constant shift is a tenth of the error or more | `correct_bias`, fast |

Less than a tenth gains under half a decibel if it goes away altogether. Both passes work on the float ONNX model, from
which every format is made, and are for weights that are rounded to nearest: `round_weights` does what they do and more.

Rules:
- Each pass is judged by real int8 files with and without it, in ONNX Runtime, on calibration samples that neither
  equalized nor corrected. It stays only where the output's error falls.
- Every decision is a note with its figures: asked for or not, kept or not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeopt.artifacts import Adapted, Made, attribute_artifact, optimize
from edgeopt.judge import Judge, Part, Verdict
from edgeopt.passes import Order
from edgeopt.passes.correct_bias import Options as BiasOptions
from edgeopt.plan import Artifact
from edgeopt.recipe import Recipe
from edgeopt.sources import Source
from edgeopt.validate import Question
from edgeopt.workbench import Workbench
from edgeopt_profiles.profile import Scheme
from edgeopt_wire import seam

if TYPE_CHECKING:
    from edgeopt.attribute import Attribution
    from edgeopt.evaluate.samples import Samples

WORTH = 0.1
"""The share of the error that a pass must be able to take away: -10 log10(1 - 0.1) is 0.46 dB."""

MAX_JUDGING = 32
"""Samples that judge; every fourth, so that a file of sorted samples is judged on all of it."""

EQUALIZE, CORRECT = "equalize_layers", "correct_bias"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """The float ONNX model of int8 files, and how one of them is made of it: the one that judges."""

    base: Made
    make: Callable[[Made], Made]
    scheme: Scheme | None
    source: Source
    samples: Samples
    recipe: Recipe
    bench: Workbench

    @property
    def numbers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Which samples cure, and which judge: all of them both where there are fewer than eight."""
        everyone = tuple(range(len(self.samples)))
        judging = everyone[3::4][:MAX_JUDGING]
        if len(judging) < 2:
            return everyone, everyone
        return tuple(sorted(set(everyone) - set(judging))), judging

    @property
    def judging(self) -> Part:
        """The samples that judge."""
        return Part(self.samples, self.numbers[1])

    def judge(self) -> Judge:
        """Whoever compares two files."""
        from edgeopt.evaluate.assess import Evaluation

        cures, judges = self.numbers
        of_what = "calibration samples" if cures == judges else "held-out calibration samples"
        return Judge(self.source, self.judging, of_what, Question(Evaluation()), self.bench)

    def run(self, name: str, base: Made, options: object | None) -> Made:
        """One pass over the float model."""
        part = Part(self.samples, self.numbers[0])
        order = Order(
            scheme=self.scheme,
            samples=Adapted(part, self.source.model.inputs, base.description.inputs),
            exclude=self.recipe.exclude,
            options=options,
        )
        found = optimize(Artifact(f"onnx-{name}", "onnx", "fp32"), base, order, part, self.bench, by=name)
        return replace(found, origin=base.origin if name == CORRECT else found.file)


def cured(case: Case) -> tuple[Made, tuple[str, ...]]:
    """The float model with the passes that helped, and what was decided; its description has that as notes too."""
    base = case.base
    said: list[str] = []
    for name in (EQUALIZE, CORRECT):
        base, note = _with(case, name, base)
        said.extend(filter(None, [note]))
    return with_notes(base, *said), tuple(said)


def is_corrected(made: Made) -> bool:
    """Whether a file was made of a model whose biases make up for its integers; trained ones have biases of their own."""
    notes = made.description.notes
    is_kept = any(note.startswith(f"{CORRECT} kept") for note in notes)
    return is_kept and not any(note.startswith("training kept") for note in notes)


def weights_equalized(case: Case) -> Made:
    """The file with weights of 4 bits, from equalized layers where that makes the output's error fall."""
    plain = case.make(case.base)
    links = seam.load("edgeopt.passes", EQUALIZE).pairs(case.base.model(), case.recipe.exclude)
    if not links:
        return plain
    tried = case.make(case.run(EQUALIZE, case.base, case.recipe.options(EQUALIZE)))
    verdict = case.judge().choose(case.base, plain, tried)
    better = tried if verdict.is_better else plain
    note = _told(
        EQUALIZE, verdict, f"weights are all that is rounded, and {links} pairs of layers share ranges"
    )
    return with_notes(better, note)


def with_notes(made: Made, *notes: str) -> Made:
    """The same with more to be said of it."""
    return replace(made, description=replace(made.description, notes=(*made.description.notes, *notes)))


def _with(case: Case, name: str, base: Made) -> tuple[Made, str]:
    """The model after one pass where that is asked for and helps, and what was decided."""
    if name == EQUALIZE and (case.scheme is None or case.scheme.per_channel):
        return base, ""
    plain = case.make(base)
    found = attribute_artifact(plain, case.judging, case.source, case.bench)
    is_asked, reason = _asked(name, found)
    if not is_asked:
        return base, f"no {name}: {reason}"
    options = case.recipe.options(name) if name in case.recipe.passes or name == EQUALIZE else None
    after = case.run(name, base, options or BiasOptions("fast"))
    verdict = case.judge().choose(case.base, plain, case.make(after))
    return after if verdict.is_better else base, _told(name, verdict, reason)


def _asked(name: str, found: Attribution) -> tuple[bool, str]:
    """Whether the attribution asks for a pass, and its figures."""
    if name == CORRECT:
        return found.shift_share >= WORTH, f"a constant shift is {100 * found.shift_share:.0f} % of the error"
    share = found.weights_share
    return share >= WORTH, (
        f"weights with one scale a tensor are {100 * share:.0f} % of the error ({found.weights_db:.1f} dB alone, "
        f"activations {found.activations_db:.1f})"
    )


def _told(name: str, verdict: Verdict, reason: str) -> str:
    note = f"{name} {'kept' if verdict.is_better else 'not kept'}: {verdict.sentence}; {reason}"
    _log.info("%s", note)
    return note
