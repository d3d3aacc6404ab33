# SPDX-License-Identifier: Apache-2.0
"""The float ONNX model that int8 files begin with: equalized, its weights rounded, or cured of what its files lack.

Decided once for every format; what only ONNX Runtime wants (soft gates, pairs that cannot overflow, the bound of hard
gates) is decided beside it.
Where weights are rounded by second moments, that does all; elsewhere the attribution chooses (`edgeopt.cures`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeopt.artifacts import Adapted, Made, lower, optimize
from edgeopt.cures import Case, cured, with_notes
from edgeopt.passes import Order
from edgeopt.passes.respell_operators import Options as RespellOptions
from edgeopt.passes.round_weights import Options as RoundOptions
from edgeopt.plan import FROM_ONNX, Artifact, Plan
from edgeopt.recipe import Recipe
from edgeopt.sources import Source, file_digest
from edgeopt.workbench import Workbench
from edgeopt_wire.errors import UnsupportedError

if TYPE_CHECKING:
    from edgeopt.evaluate.samples import Samples
    from edgeopt_profiles.profile import Scheme

GATES = frozenset({"Sigmoid", "HardSigmoid", "HardSwish", "Swish"})
"""Where channels meet through these, int8 loses most: a small hard-swish net lost 5.4 points, and 0.2 with its gates
equalized (tests/benchmarks/collapsing_net.py)."""


HARD_GATES = frozenset({"HardSigmoid", "HardSwish"})
"""Gates that are a bounded line, so that a convolution can be one (`edgeopt.hard_gates`)."""

RELU6 = 6.0
"""The bound that LiteRT and ExecuTorch fuse into a convolution."""


@dataclass(frozen=True)
class Preparation:
    """One pass over the float model before it is quantized."""

    name: str
    options: object | None = None


def prepared(
    plan: Plan,
    source: Source,
    floats: Mapping[str, Made],
    *,
    samples: Samples | None,
    recipe: Recipe,
    bench: Workbench,
    is_cured: bool = True,
) -> Mapping[str, Made]:
    """The float models that int8 artifacts start from, by format; without `is_cured` none is mended (`edgeopt.cures`).

    The prepared ONNX model enters the other formats through the hub. Where an operator of it cannot, that format keeps
    weights rounded to nearest, and a note says so. What only ONNX Runtime wants (gates, safe pairs) the others do not
    get; stages that both share are made once.
    """
    has_int8 = any(artifact.precision == "int8" for artifact in plan.artifacts)
    if not has_int8 or samples is None:
        return floats
    base = floats.get("onnx") or lower("onnx", source.model, source.sha256, bench)
    preparing = _Preparing(
        plan, source, replace(base, origin=base.file), samples, recipe, bench, is_cured=is_cured
    )
    shared, own = _preparation(plan, base, preparing.adapted, recipe=recipe, bench=bench)
    mended, said = preparing.mend(own, ["onnx"])
    found = {"onnx": mended}
    others = [name for name in plan.formats if name != "onnx"]
    if not others:
        return found
    # what a grid that hardly differs does not need, the others do not need either
    is_well = bool(said) and mended.file == preparing.prepare(own).file
    rounded, said = (preparing.prepare(shared), said) if is_well else preparing.mend(shared, others)
    is_changed = bool(shared) or rounded.file != base.file
    for name in others:
        if name in FROM_ONNX:
            found[name] = rounded
        elif is_changed:
            found[name] = _entered(name, rounded, floats, said, bench)
        else:
            found[name] = with_notes(floats[name], *said)
    return found


def wants_pair_safe(plan: Plan) -> bool:
    """Whether some ONNX artifact must run without overflow on every x86; other formats keep their plain grid."""
    return any(
        artifact.format == "onnx" and artifact.scheme is not None and artifact.scheme.pair_safe
        for artifact in plan.artifacts
    )


def _preparation(
    plan: Plan, base: Made, samples: Adapted, *, recipe: Recipe, bench: Workbench
) -> tuple[tuple[Preparation, ...], tuple[Preparation, ...]]:
    """The passes before quantization, by effort and by what the model is: for every format, and for ONNX alone."""
    if recipe.effort == "quick":
        return (), ()
    per_channel = all(artifact.scheme is None or artifact.scheme.per_channel for artifact in plan.artifacts)
    program = base.model().program
    equalized = (
        (Preparation("equalize_activations", recipe.options("equalize_activations")),)
        if recipe.effort == "extensive"
        else ()
    )
    gates = (
        (Preparation("equalize_gates", recipe.options("equalize_gates")),)
        if {node.op_type for node in program.graph.node} & GATES
        else ()
    )
    shared, own = equalized, (*equalized, *gates)
    if per_channel and {node.op_type for node in program.graph.node} & HARD_GATES:
        shared = (*equalized, *gates, _respelled(RELU6))
        own = (*own, _respelled(1.0)) if _is_onnxruntimes_alone(plan) else own
    if recipe.rounding == "nearest" or not per_channel:
        return shared, own
    from edgeopt.attribute import ENOUGH_DB, weights_alone_db

    with bench.progress.stage("weigh the weights' own error") as step:
        alone = weights_alone_db(program, samples)
        step.detail = f"{alone:.1f} dB by nearest rounding"
    if alone >= ENOUGH_DB:
        return shared, own
    plain = RoundOptions.of(recipe.options("round_weights"))
    careful = replace(plain, pair_safe=plain.pair_safe or wants_pair_safe(plan))
    return (*shared, Preparation("round_weights", plain)), (*own, Preparation("round_weights", careful))


def _respelled(bound: float) -> Preparation:
    """Hard gates as convolutions with this bound, and nothing else in other words."""
    options = RespellOptions(gelu=False, layer_norm=False, hard_gates=True, gate_bound=bound)
    return Preparation("respell_operators", options)


def _is_onnxruntimes_alone(plan: Plan) -> bool:
    """Whether no other runtime takes the int8 ONNX files: TensorRT and OpenVINO have these gates themselves."""
    files = [entry for entry in plan.artifacts if entry.format == "onnx" and entry.precision == "int8"]
    return all(
        entry.runtime == "onnxruntime" and entry.scheme is not None and not entry.scheme.symmetric_activations
        for entry in files
    )


@dataclass(frozen=True)
class _Preparing:
    """A float ONNX model and what it is prepared with."""

    plan: Plan
    source: Source
    base: Made
    samples: Samples
    recipe: Recipe
    bench: Workbench
    is_cured: bool

    @property
    def adapted(self) -> Adapted:
        """The calibration samples as the model takes them."""
        return Adapted(self.samples, self.source.model.inputs, self.base.description.inputs)

    def prepare(self, steps: tuple[Preparation, ...]) -> Made:
        """Run passes over it, one after another."""
        made = self.base
        for step in steps:
            order = Order(samples=self.adapted, exclude=self.recipe.exclude, options=step.options)
            before = made
            artifact = Artifact(f"onnx-{step.name}", "onnx", "fp32")
            made = optimize(artifact, before, order, self.samples, self.bench, by=step.name)
            made = replace(made, origin=before.origin if step.name == "round_weights" else made.file)
        return made

    def mend(self, steps: tuple[Preparation, ...], formats: Sequence[str]) -> tuple[Made, tuple[str, ...]]:
        """Run passes, then those that the attribution asks for where no weights were rounded; and what was decided."""
        made, scheme = self.prepare(steps), _first_scheme(self.plan, formats)
        is_wanted = self.is_cured and self.recipe.effort != "quick"
        if not is_wanted or scheme is None or any(step.name == "round_weights" for step in steps):
            return made, ()
        scheme = replace(scheme, io="float32")  # an ONNX file judges, whatever the format
        order = Order(
            scheme=scheme,
            calibration=self.recipe.thorough_calibration,
            samples=self.adapted,
            exclude=self.recipe.exclude,
            options=self.recipe.options("quantize_static"),
        )
        artifact = Artifact("onnx-int8", "onnx", "int8", scheme)
        quantize = functools.partial(optimize, artifact, order=order, samples=self.samples, bench=self.bench)
        return cured(Case(made, quantize, scheme, self.source, self.samples, self.recipe, self.bench))


def _first_scheme(plan: Plan, formats: Sequence[str]) -> Scheme | None:
    """The scheme of the first int8 file of some formats."""
    schemes = (
        entry.scheme for entry in plan.artifacts if entry.precision == "int8" and entry.format in formats
    )
    return next(schemes, None)


def _entered(
    name: str, rounded: Made, floats: Mapping[str, Made], said: tuple[str, ...], bench: Workbench
) -> Made:
    """The prepared model in another format, or that format's own with a note where an operator cannot enter it."""
    try:
        lowered = lower(name, rounded.model(), file_digest(rounded.file), bench, of="rounded ")
    except UnsupportedError as error:
        note = f"weights rounded to nearest, because the rounded model cannot be lowered to {name}: {error}"
        return with_notes(floats[name], note)
    return replace(with_notes(lowered, *said), hub=rounded.file)
