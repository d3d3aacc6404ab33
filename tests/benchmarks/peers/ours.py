# SPDX-License-Identifier: Apache-2.0
"""This project, with what a recipe does by default, from the same float source and samples as every peer.

ONNX files are made of the float ONNX file that the peers get; LiteRT files of what a user has, so their time includes
bringing it to LiteRT (`stages` says how much). Precisions are the recipe's, else chosen as `edgeopt build` chooses.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from work import Unavailable, Work

if TYPE_CHECKING:
    from edgeopt.plan import Plan
    from edgeopt.recipe import Recipe
    from edgeopt.sources import Source

VARIANTS = {
    "onnx": "edgeopt, ONNX Runtime",
    "litert": "edgeopt, LiteRT",
    "onnx-nearest": "edgeopt, ONNX Runtime, weights to nearest",
    "litert-nearest": "edgeopt, LiteRT, weights to nearest",
    "int4-rtn": "edgeopt, int4 weights, nearest",
    "int4-hqq": "edgeopt, int4 weights, HQQ",
    "int4-gptq": "edgeopt, int4 weights, GPTQ",
    "int4-awq": "edgeopt, int4 weights, AWQ",
}
IMPORTS = ("edgeopt.compress", "onnx", "onnxruntime", "torch")


def make(work: Work) -> Path:
    from edgeopt.artifacts import tool_versions
    from edgeopt.cache import Cache
    from edgeopt.compress import make_artifacts
    from edgeopt.evaluate.samples import load_samples
    from edgeopt.progress import Progress
    from edgeopt.sources import load_source
    from edgeopt.workbench import Workbench

    recipe = _recipe(work)
    form = "litert" if work.variant.startswith("litert") else "onnx"
    own = "torch" if form == "litert" and not work.recipe else "onnx"
    progress = Progress()
    with progress.stage("load"):
        source = load_source(str(work.source(own)), recipe)
        samples = load_samples(work.calibration, source.model.inputs, None, limit=None, seed=0)
    plan = _plan(source, recipe, work, form)
    bench = Workbench(Cache(None), work.output("scratch"), progress, tool_versions())
    made = make_artifacts(plan, source, samples, recipe, bench)
    (found,) = [entry for entry in made.values() if entry.artifact.precision != "fp32"]
    target = work.output("model.onnx" if form == "onnx" else "model.tflite")
    shutil.copyfile(found.file, target)
    shutil.rmtree(work.output("scratch"))
    spent = {stage.name: round(stage.seconds, 3) for stage in progress.finished}
    work.output("stages.json").write_text(json.dumps(spent), encoding="utf-8")
    return target


def _recipe(work: Work) -> Recipe:
    import dataclasses

    from edgeopt.recipe import Recipe, load_recipe

    recipe = load_recipe(Path(work.recipe)) if work.recipe else Recipe()
    if work.variant.startswith("int4-"):
        passes = {"quantize_weights": {"method": work.variant.removeprefix("int4-")}}
        return dataclasses.replace(recipe, precisions=("int4-weights",), passes=passes)
    rounding = "nearest" if work.variant.endswith("-nearest") else recipe.rounding
    return dataclasses.replace(recipe, rounding=rounding)


def _plan(source: Source, recipe: Recipe, work: Work, form: str) -> Plan:
    """What a build for this machine would make in one format."""
    import dataclasses

    from edgeopt.plan import RUNTIME_OF, make_plan, suits_dynamic
    from edgeopt_converters import graph, path
    from edgeopt_profiles.profile import load_profile

    model = source.model if source.model.format == "onnx" else path.convert(source.model, "onnx")
    if not recipe.precisions and suits_dynamic(graph.of(model).operators):
        recipe = dataclasses.replace(recipe, precisions=("int8-dynamic",))
    plan = make_plan(load_profile("host"), recipe)
    runtime = RUNTIME_OF[form]
    wanted = [
        artifact
        for artifact in plan.artifacts
        if artifact.runtime == runtime and artifact.precision != "fp32"
    ]
    if work.variant.endswith("-nearest") and any(artifact.precision != "int8" for artifact in wanted):
        raise Unavailable(
            "rounding is a choice of static int8, and a build makes other integers of this model"
        )
    if not wanted:
        made = ", ".join(sorted({artifact.id for artifact in plan.artifacts if artifact.precision != "fp32"}))
        raise Unavailable(f"a build of this model makes no {form} file below float, but {made}")
    floats = [
        artifact
        for artifact in plan.artifacts
        if artifact.precision == "fp32" and artifact.format in ("onnx", form)
    ]
    return dataclasses.replace(plan, artifacts=(*floats, *wanted))
