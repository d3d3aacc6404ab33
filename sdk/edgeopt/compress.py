# SPDX-License-Identifier: Apache-2.0
"""From a source and a plan to every artifact: lower, prepare the float model, quantize.

What is decided about weights is decided once, on the ONNX form, and enters the other formats through the hub; only
where two runtimes need other integers (no overflow on every x86) is it decided for each.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeopt.artifacts import Adapted, Made, lower, optimize
from edgeopt.cures import Case, weights_equalized, with_notes
from edgeopt.floats import Floats
from edgeopt.passes import Order
from edgeopt.passes.cast_floats import Options as FloatOptions
from edgeopt.passes.quantize_dynamic import Options as DynamicOptions
from edgeopt.passes.quantize_litert_dynamic import Options as LitertDynamicOptions
from edgeopt.passes.quantize_weights import Options as WeightOptions
from edgeopt.plan import FROM_ONNX, Artifact, Plan
from edgeopt.prepare import prepared, wants_pair_safe
from edgeopt.recipe import Recipe
from edgeopt.sources import Source, file_digest
from edgeopt.uncalibrated import making as uncalibrated
from edgeopt.workbench import Workbench
from edgeopt.zero_points import suited
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    from edgeopt.evaluate.samples import Samples


def make_artifacts(
    plan: Plan,
    source: Source,
    samples: Samples | None,
    recipe: Recipe,
    bench: Workbench,
    *,
    is_cured: bool = True,
) -> dict[str, Made]:
    """Make every artifact of the plan: id -> made; without `is_cured` none with passes that the attribution asks for.

    Raises:
        RecipeError: An int8 artifact is planned and there are no calibration samples.
        UnsupportedError: An operator of the model does not exist in a format.
    """
    is_blind = uncalibrated.is_asked(recipe)
    for artifact in plan.artifacts:
        if artifact.precision == "int8" and samples is None and not is_blind:
            raise RecipeError(
                f"{artifact.id} needs calibration data: give --calibration DATA (a folder of images, an .npz file or "
                "module:factory), or ask for other precisions in the recipe; where there is none, [calibration] "
                'method = "batchnorm" in the recipe makes uncalibrated int8 files of a model that has batch normalizations'
            )
    floats = Floats(plan, source, bench)
    fused = _fused(plan, floats, recipe, bench)
    bases = prepared(plan, source, fused, samples=samples, recipe=recipe, bench=bench, is_cured=is_cured)
    made = uncalibrated.make_int8(plan, source, fused, recipe, bench) if is_blind else {}
    for artifact in plan.artifacts:
        if artifact.id in made:
            continue
        if artifact.precision == "int8":
            base = bases[artifact.format]
        elif artifact.precision == "int8-dynamic":
            base = _dynamic_base(artifact, fused, source, samples, recipe=recipe, bench=bench)
        else:
            base = (fused if artifact.pass_name else floats)[artifact.format]
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
    order = _order(artifact, base, source, samples, recipe=recipe, pair_safe=wants_pair_safe(plan))
    order = replace(order, ranges=base.description.ranges)
    if artifact.precision == "int4-weights" and samples is not None and recipe.effort != "quick":
        quantize = functools.partial(optimize, artifact, order=order, samples=samples, bench=bench)
        return weights_equalized(Case(base, quantize, None, source, samples, recipe, bench))
    made = optimize(artifact, base, order, samples, bench)
    is_static = (artifact.format, artifact.precision) == ("onnx", "int8")
    if is_static and recipe.effort == "extensive":
        return _corrected(made, order, samples, recipe, bench)
    return made


def _fused(plan: Plan, floats: Floats, recipe: Recipe, bench: Workbench) -> Floats:
    """The float models that passes start from: the ONNX one with all fused that belongs to its layers."""
    if not any(artifact.format == "onnx" and artifact.pass_name for artifact in plan.artifacts):
        return floats
    order = Order(options=recipe.options("fuse_operators"))
    wanted = Artifact("onnx-fused", "onnx", "fp32")
    return floats.but("onnx", optimize(wanted, floats["onnx"], order, None, bench, by="fuse_operators"))


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


def _dynamic_base(
    artifact: Artifact,
    floats: Mapping[str, Made],
    source: Source,
    samples: Samples | None,
    *,
    recipe: Recipe,
    bench: Workbench,
) -> Made:
    """The float model that run-time ranges start from in an artifact's format: smoothed once, on the ONNX form."""
    form = "onnx" if artifact.format in FROM_ONNX else artifact.format
    if form != "onnx" and (samples is None or recipe.effort == "quick"):
        return floats[form]
    smoothed = _smoothed(floats["onnx"], source, samples, recipe=recipe, bench=bench)
    if form == "onnx":
        return smoothed
    try:
        digest = file_digest(smoothed.file)
        lowered = lower(artifact.format, smoothed.model(), digest, bench, of="smoothed ")
        return replace(lowered, hub=smoothed.file)
    except UnsupportedError as error:
        note = f"activations not smoothed, because the smoothed model cannot be lowered to {artifact.format}: {error}"
        return with_notes(floats[artifact.format], note)


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
    is_dynamic = (artifact.format, artifact.precision) == ("onnx", "int8-dynamic")
    if is_dynamic and pair_safe and "quantize_dynamic" not in recipe.passes:
        # where pairs saturate, unsigned weights take an exact kernel, which is slower: the build measures both ways
        options = replace(DynamicOptions(), unsigned_weights=True)
    if artifact.precision in ("fp16", "bf16", "fp8-e4m3"):
        looks = samples is not None and artifact.precision != "bf16"  # which cannot overflow
        adapted = Adapted(samples, source.model.inputs, base.description.inputs) if looks and samples else ()
        if artifact.precision != "fp8-e4m3":
            options = FloatOptions("bfloat16" if artifact.precision == "bf16" else "float16")
        return Order(samples=adapted, calibration=recipe.calibration, exclude=recipe.exclude, options=options)
    if artifact.format == "litert" and artifact.precision in ("int8-dynamic", "int8-weights"):
        stored = LitertDynamicOptions(convolutions=artifact.precision == "int8-weights")
        given = options if artifact.pass_name in recipe.passes else stored
        return Order(exclude=recipe.exclude, options=given)
    if artifact.precision in ("int8-weights", "int4-weights"):
        given = options if isinstance(options, WeightOptions) else WeightOptions()
        options = replace(given, bits=4 if artifact.precision == "int4-weights" else 8)
        adapted = Adapted(samples, source.model.inputs, base.description.inputs) if samples else ()
        return Order(samples=adapted, exclude=recipe.exclude, options=options)
    if artifact.precision != "int8" or samples is None:
        return Order(exclude=recipe.exclude, options=options)
    return Order(
        scheme=_scheme(artifact, base),
        calibration=recipe.thorough_calibration,
        samples=Adapted(samples, source.model.inputs, base.description.inputs),
        exclude=recipe.exclude,
        options=options,
    )


def _scheme(artifact: Artifact, base: Made) -> Scheme | None:
    """The artifact's scheme without what changes nothing in this model, so that a file for two runtimes is made once."""
    scheme = artifact.scheme
    return suited(scheme, base.model().program) if scheme is not None and scheme.zero_products else scheme
