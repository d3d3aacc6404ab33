# SPDX-License-Identifier: Apache-2.0
"""From a source and a plan to every artifact: lower, prepare the float model, quantize.

What is decided about weights is decided once, on the ONNX form, and enters the other formats through the hub; only
where two runtimes need other integers (no overflow on every x86) is it decided for each.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeopt.artifacts import Adapted, Made, lower, optimize
from edgeopt.passes import Order
from edgeopt.passes.quantize_dynamic import Options as DynamicOptions
from edgeopt.passes.quantize_weights import Options as WeightOptions
from edgeopt.passes.round_weights import Options as RoundOptions
from edgeopt.plan import Artifact, Plan
from edgeopt.recipe import Recipe
from edgeopt.sources import Source, file_digest
from edgeopt.workbench import Workbench
from edgeopt_wire.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    from edgeopt.evaluate.samples import Samples


def check_extras(plan: Plan, source: Source) -> None:
    """Refuse at once what would fail after minutes: a format whose libraries are not installed.

    Raises:
        UnsupportedError: An extra is missing; the message says which to install.
    """
    needed = {
        "onnx": ("onnx", "onnxruntime"),
        "litert": ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"),
    }
    for name in plan.formats:
        missing = [module for module in needed[name] if importlib.util.find_spec(module) is None]
        if missing:
            why = " (a LiteRT model is made by way of PyTorch)" if name == "litert" else ""
            raise UnsupportedError(
                f"{plan.device.id} takes {name} models{why} and {', '.join(missing)} is not installed: "
                f"pip install 'edgeopt[{name}]'"
            )
    if source.model.format == "torch" and importlib.util.find_spec("onnxscript") is None:
        raise UnsupportedError("a PyTorch model needs onnxscript: pip install 'edgeopt[torch]'")


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
    bases = _rounded(plan, source, floats, samples=samples, recipe=recipe, bench=bench)
    made: dict[str, Made] = {}
    for artifact in plan.artifacts:
        base = floats[artifact.format]
        if artifact.precision == "int8":
            base = bases[artifact.format]
        elif artifact.precision == "int8-dynamic":
            base = _smoothed(base, source, samples, recipe=recipe, bench=bench)
        if artifact.pass_name:
            order = _order(artifact, base, source, samples, recipe=recipe, pair_safe=_wants_pair_safe(plan))
            made[artifact.id] = optimize(artifact, base, order, samples, bench)
        else:
            made[artifact.id] = Made(artifact, base.file, base.description)
    return made


def _rounded(
    plan: Plan,
    source: Source,
    floats: Mapping[str, Made],
    *,
    samples: Samples | None,
    recipe: Recipe,
    bench: Workbench,
) -> dict[str, Made]:
    """The float models that int8 artifacts start from: weights on the int8 grid, decided once for every format.

    The rounded ONNX model enters the other formats through the hub. Where an operator of it cannot, that format keeps
    weights rounded to nearest, and a note says so.
    """
    has_int8 = any(artifact.precision == "int8" for artifact in plan.artifacts)
    if not has_int8 or samples is None:
        return dict(floats)
    rounded = floats.get("onnx") or lower("onnx", source.model, source.sha256, bench)
    rounded = replace(rounded, origin=rounded.file)
    adapted = Adapted(samples, source.model.inputs, rounded.description.inputs)
    safe: Made | None = None
    for name in _preparation(plan, rounded, adapted, recipe=recipe, bench=bench):
        artifact = Artifact(f"onnx-{name}", "onnx", "fp32")
        order = Order(samples=adapted, exclude=recipe.exclude, options=recipe.options(name))
        before = rounded
        if name != "round_weights":
            rounded = optimize(artifact, before, order, samples, bench, by=name)
            rounded = replace(rounded, origin=rounded.file)
            continue
        if _wants_pair_safe(plan):
            careful = replace(order, options=replace(RoundOptions.of(order.options), pair_safe=True))
            safe = optimize(artifact, before, careful, samples, bench, by=name)
        if safe is None or plan.formats != ("onnx",):
            rounded = optimize(artifact, before, order, samples, bench, by=name)
    if rounded.artifact.id == "onnx-fp32" and safe is None:
        return {**floats, "onnx": rounded}
    found = dict(floats)
    found["onnx"] = safe or rounded
    for name in plan.formats:
        if name != "onnx":
            try:
                found[name] = lower(name, rounded.model(), file_digest(rounded.file), bench, of="rounded ")
            except UnsupportedError as error:
                note = f"weights rounded to nearest, because the rounded model cannot be lowered to {name}: {error}"
                described = replace(floats[name].description, notes=(*floats[name].description.notes, note))
                found[name] = replace(floats[name], description=described)
    return found


def _smoothed(
    base: Made, source: Source, samples: Samples | None, *, recipe: Recipe, bench: Workbench
) -> Made:
    """The float model that run-time ranges start from: outlying channels moved into weights, weights rounded."""
    if samples is None or recipe.effort == "quick":
        return base
    adapted = Adapted(samples, source.model.inputs, base.description.inputs)
    for name in ("smooth_activations", "round_weights"):
        if name == "round_weights" and recipe.rounding == "nearest":
            continue
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
) -> tuple[str, ...]:
    """The passes over the float model before it is quantized, by effort and by what its weights cost."""
    per_channel = all(artifact.scheme is None or artifact.scheme.per_channel for artifact in plan.artifacts)
    chosen = ("equalize_activations",) if recipe.effort == "extensive" else ()
    if recipe.effort == "quick" or recipe.rounding == "nearest" or not per_channel:
        return chosen
    from edgeopt.attribute import ENOUGH_DB, weights_alone_db

    with bench.progress.stage("weigh the weights' own error") as step:
        alone = weights_alone_db(base.model().program, samples)
        step.detail = f"{alone:.1f} dB by nearest rounding"
    return chosen if alone >= ENOUGH_DB else (*chosen, "round_weights")


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
