# SPDX-License-Identifier: Apache-2.0
"""From a source and a plan to every artifact: lower, prepare the float model, quantize.

What is decided about weights is decided once, on the ONNX form, and enters the other formats through the hub; only
where two runtimes need other integers (no overflow on every x86) is it decided for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeopt.artifacts import Adapted, Made, lower, optimize
from edgeopt.passes import Order
from edgeopt.passes.cast_floats import Options as FloatOptions
from edgeopt.passes.quantize_dynamic import Options as DynamicOptions
from edgeopt.passes.quantize_weights import Options as WeightOptions
from edgeopt.passes.round_weights import Options as RoundOptions
from edgeopt.plan import FROM_ONNX, Artifact, Plan
from edgeopt.recipe import Recipe
from edgeopt.sources import Source, file_digest
from edgeopt.workbench import Workbench
from edgeopt_converters.model import Model
from edgeopt_wire.errors import RecipeError, UnsupportedError

GATES = frozenset({"Sigmoid", "HardSigmoid", "HardSwish", "Swish"})
"""Where channels meet through these, int8 loses most: a small hard-swish net lost 5.4 points, and 0.2 with its gates
equalized (tests/benchmarks/collapsing_net.py)."""

if TYPE_CHECKING:
    from edgeopt.evaluate.samples import Samples


def make_artifacts(
    plan: Plan, source: Source, samples: Samples | None, recipe: Recipe, bench: Workbench
) -> dict[str, Made]:
    """Make every artifact of the plan: id -> made.

    Raises:
        RecipeError: An int8 artifact is planned and there are no calibration samples.
        UnsupportedError: An operator of the model does not exist in a format.
    """
    for artifact in plan.artifacts:
        if artifact.precision == "int8" and samples is None:
            raise RecipeError(
                f"{artifact.id} needs calibration data: give --calibration DATA (a folder of images, an .npz file or "
                "module:factory), or ask for other precisions in the recipe"
            )
    floats = {name: lower(name, source.model, source.sha256, bench) for name in plan.formats}
    fused = _fused(plan, floats, recipe, bench)
    bases = _rounded(plan, source, fused, samples=samples, recipe=recipe, bench=bench)
    made: dict[str, Made] = {}
    for artifact in plan.artifacts:
        base = fused[artifact.format] if artifact.pass_name else floats[artifact.format]
        if artifact.precision == "int8":
            base = bases[artifact.format]
        elif artifact.precision == "int8-dynamic":
            base = _smoothed(base, source, samples, recipe=recipe, bench=bench)
        if artifact.pass_name:
            made[artifact.id] = make_artifact(
                artifact, base, source, samples, plan=plan, recipe=recipe, bench=bench
            )
        else:
            made[artifact.id] = Made(artifact, base.file, base.description)
    return made


def make_artifact(
    artifact: Artifact,
    base: Made,
    source: Source,
    samples: Samples | None,
    *,
    plan: Plan,
    recipe: Recipe,
    bench: Workbench,
) -> Made:
    """Make one artifact from the float model of its format, with learned ranges where that has some."""
    order = _order(artifact, base, source, samples, recipe=recipe, pair_safe=_wants_pair_safe(plan))
    order = replace(order, ranges=base.description.ranges)
    made = optimize(artifact, base, order, samples, bench)
    is_static = (artifact.format, artifact.precision) == ("onnx", "int8")
    if is_static and recipe.effort == "extensive":
        return _corrected(made, order, samples, recipe, bench)
    return made


def _fused(plan: Plan, floats: Mapping[str, Made], recipe: Recipe, bench: Workbench) -> dict[str, Made]:
    """The float models that passes start from: the ONNX one with all fused that belongs to its layers."""
    if not any(artifact.format == "onnx" and artifact.pass_name for artifact in plan.artifacts):
        return dict(floats)
    order = Order(options=recipe.options("fuse_operators"))
    wanted = Artifact("onnx-fused", "onnx", "fp32")
    return {**floats, "onnx": optimize(wanted, floats["onnx"], order, None, bench, by="fuse_operators")}


def _corrected(made: Made, order: Order, samples: Samples | None, recipe: Recipe, bench: Workbench) -> Made:
    """The quantized model with the mean error of every layer taken into its bias, where that helps the output."""
    import onnx

    found = made.description
    reference = Model("onnx", onnx.load(made.origin or made.file), found.name, found.inputs, found.outputs)
    correction = Order(
        samples=order.samples,
        exclude=recipe.exclude,
        options=recipe.options("correct_bias"),
        reference=reference,
    )
    corrected = optimize(made.artifact, made, correction, samples, bench, by="correct_bias")
    return replace(corrected, origin=made.origin, base=made.base)


def _rounded(
    plan: Plan,
    source: Source,
    floats: Mapping[str, Made],
    *,
    samples: Samples | None,
    recipe: Recipe,
    bench: Workbench,
) -> dict[str, Made]:
    """The float models that int8 artifacts start from: prepared, and weights on the int8 grid.

    The rounded ONNX model enters the other formats through the hub. Where an operator of it cannot, that format keeps
    weights rounded to nearest, and a note says so. What only ONNX Runtime wants (gates, safe pairs) the others do not
    get; stages that both share are made once.
    """
    has_int8 = any(artifact.precision == "int8" for artifact in plan.artifacts)
    if not has_int8 or samples is None:
        return dict(floats)
    base = floats.get("onnx") or lower("onnx", source.model, source.sha256, bench)
    base = replace(base, origin=base.file)
    adapted = Adapted(samples, source.model.inputs, base.description.inputs)
    shared, own = _preparation(plan, base, adapted, recipe=recipe, bench=bench)

    def prepare(steps: tuple[Preparation, ...]) -> Made:
        made = base
        for step in steps:
            order = Order(samples=adapted, exclude=recipe.exclude, options=step.options)
            before = made
            made = optimize(
                Artifact(f"onnx-{step.name}", "onnx", "fp32"), before, order, samples, bench, by=step.name
            )
            made = replace(made, origin=before.origin if step.name == "round_weights" else made.file)
        return made

    found = {**floats, "onnx": prepare(own)}
    others = [name for name in plan.formats if name != "onnx"]
    if not others:
        return found
    rounded = prepare(shared)
    for name in others:
        if name in FROM_ONNX:
            found[name] = rounded
            continue
        if not shared:
            continue
        try:
            lowered = lower(name, rounded.model(), file_digest(rounded.file), bench, of="rounded ")
            found[name] = replace(lowered, hub=rounded.file)
        except UnsupportedError as error:
            note = (
                f"weights rounded to nearest, because the rounded model cannot be lowered to {name}: {error}"
            )
            described = replace(floats[name].description, notes=(*floats[name].description.notes, note))
            found[name] = replace(floats[name], description=described)
    return found


@dataclass(frozen=True)
class Preparation:
    """One pass over the float model before it is quantized."""

    name: str
    options: object | None = None


def _smoothed(
    base: Made, source: Source, samples: Samples | None, *, recipe: Recipe, bench: Workbench
) -> Made:
    """The float model that run-time ranges start from: faster spellings, outlying channels moved into weights.

    Rounding by second moments comes with the extensive effort only: it gained 0.4 dB on MiniLM and took minutes.
    """
    order = Order(exclude=recipe.exclude)
    base = optimize(
        Artifact("onnx-respelled", "onnx", "fp32"), base, order, None, bench, by="respell_operators"
    )
    if samples is None or recipe.effort == "quick":
        return base
    adapted = Adapted(samples, source.model.inputs, base.description.inputs)
    rounding = ("round_weights",) if recipe.effort == "extensive" and recipe.rounding != "nearest" else ()
    for name in ("smooth_activations", *rounding):
        order = Order(samples=adapted, exclude=recipe.exclude, options=recipe.options(name))
        base = optimize(
            Artifact(f"onnx-dynamic-{name}", "onnx", "fp32"), base, order, samples, bench, by=name
        )
    return base


def _wants_pair_safe(plan: Plan) -> bool:
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
    if recipe.rounding == "nearest" or not per_channel:
        return equalized, (*equalized, *gates)
    from edgeopt.attribute import ENOUGH_DB, weights_alone_db

    with bench.progress.stage("weigh the weights' own error") as step:
        alone = weights_alone_db(program, samples)
        step.detail = f"{alone:.1f} dB by nearest rounding"
    if alone >= ENOUGH_DB:
        return equalized, (*equalized, *gates)
    plain = RoundOptions.of(recipe.options("round_weights"))
    careful = replace(plain, pair_safe=plain.pair_safe or _wants_pair_safe(plan))
    return (
        (*equalized, Preparation("round_weights", plain)),
        (*equalized, *gates, Preparation("round_weights", careful)),
    )


def _order(
    artifact: Artifact,
    base: Made,
    source: Source,
    samples: Samples | None,
    *,
    recipe: Recipe,
    pair_safe: bool,
) -> Order:
    options = recipe.options(artifact.pass_name)
    if artifact.precision == "int8-dynamic" and pair_safe and "quantize_dynamic" not in recipe.passes:
        # where pairs saturate, unsigned weights take an exact kernel, which is slower: the build measures both ways
        options = replace(DynamicOptions(), unsigned_weights=True)
    if artifact.precision in ("fp16", "bf16", "fp8-e4m3"):
        looks = samples is not None and artifact.precision != "bf16"  # which cannot overflow
        adapted = Adapted(samples, source.model.inputs, base.description.inputs) if looks and samples else ()
        if artifact.precision != "fp8-e4m3":
            options = FloatOptions("bfloat16" if artifact.precision == "bf16" else "float16")
        return Order(samples=adapted, calibration=recipe.calibration, exclude=recipe.exclude, options=options)
    if artifact.precision in ("int8-weights", "int4-weights"):
        given = options if isinstance(options, WeightOptions) else WeightOptions()
        options = replace(given, bits=4 if artifact.precision == "int4-weights" else 8)
        adapted = Adapted(samples, source.model.inputs, base.description.inputs) if samples else ()
        return Order(samples=adapted, exclude=recipe.exclude, options=options)
    if artifact.precision != "int8" or samples is None:
        return Order(exclude=recipe.exclude, options=options)
    return Order(
        scheme=artifact.scheme,
        calibration=recipe.thorough_calibration,
        samples=Adapted(samples, source.model.inputs, base.description.inputs),
        exclude=recipe.exclude,
        options=options,
    )
