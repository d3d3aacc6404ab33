# SPDX-License-Identifier: Apache-2.0
"""This project, with what a recipe does by default, from the same float source and samples as every peer.

ONNX files are made of the float ONNX file that the peers get; LiteRT files of what a user has, so their time includes
bringing it to LiteRT (`stages` says how much). Float files that a build would make beside, to compare with, are not made. Precisions are the recipe's, else chosen as `edgeopt build` chooses.
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
    from edgeopt_profiles.profile import DeviceProfile

VARIANTS = {
    "onnx": "edgeopt, ONNX Runtime",
    "litert": "edgeopt, LiteRT",
    "executorch": "edgeopt, ExecuTorch",
    "openvino": "edgeopt, OpenVINO",
    "onnx-quick": "edgeopt, ONNX Runtime, quick (weights to nearest)",
    "litert-quick": "edgeopt, LiteRT, quick (weights to nearest)",
    "int4-rtn": "edgeopt, int4 weights, nearest",
    "int4-hqq": "edgeopt, int4 weights, HQQ",
    "int4-gptq": "edgeopt, int4 weights, GPTQ",
    "int4-awq": "edgeopt, int4 weights, AWQ",
}
RUNTIMES = {"openvino": "openvino"}
"""Whose file is one of ONNX."""

FILES = {"onnx": "model.onnx", "litert": "model.tflite", "executorch": "model.pte", "openvino": "model.onnx"}
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
    form = work.variant.removesuffix("-quick")
    form = form if form in FILES else "onnx"
    own = "torch" if form == "litert" and not work.recipe else "onnx"
    progress = Progress()
    with progress.stage("load"):
        source = load_source(str(work.source(own)), recipe)
        samples = load_samples(work.calibration, source.model.inputs, None, limit=None, seed=0)
    plan = _plan(source, recipe, work, form)
    bench = Workbench(Cache(None), work.output("scratch"), progress, tool_versions())
    made = make_artifacts(plan, source, samples, recipe, bench)
    (found,) = [entry for entry in made.values() if entry.artifact.precision != "fp32"]
    target = work.output(FILES[form])
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
    return dataclasses.replace(recipe, effort="quick") if work.variant.endswith("-quick") else recipe


def _plan(source: Source, recipe: Recipe, work: Work, form: str) -> Plan:
    """What a build for this machine would make for one runtime."""
    import dataclasses

    from edgeopt.plan import RUNTIME_OF
    from edgeopt_profiles.profile import load_profile
    from edgeopt_wire.errors import RecipeError

    runtime = RUNTIME_OF.get(form, form)
    optional = {"runtimes": (runtime,)} if runtime in ("executorch", "openvino") else {}
    try:
        plan = _suited(load_profile("host"), source, dataclasses.replace(recipe, **optional))
    except RecipeError as reason:
        raise Unavailable(str(reason)) from reason
    wanted = [
        artifact
        for artifact in plan.artifacts
        if artifact.runtime == runtime and artifact.precision != "fp32"
    ]
    if work.variant.endswith("-quick") and any(artifact.precision != "int8" for artifact in wanted):
        raise Unavailable(
            "the quick effort is shown with static int8, and a build makes other integers of this model"
        )
    if not wanted:
        made = ", ".join(sorted({artifact.id for artifact in plan.artifacts if artifact.precision != "fp32"}))
        raise Unavailable(f"a build of this model makes no {form} file below float, but {made}")
    floats = [
        artifact for artifact in plan.artifacts if artifact.precision == "fp32" and artifact.format == "onnx"
    ]
    return dataclasses.replace(plan, artifacts=(*floats, *wanted))


def _suited(profile: DeviceProfile, source: Source, recipe: Recipe) -> Plan:
    """As a build does: ranges at run time where nearly all work is in matrix products and the runtime takes them."""
    import dataclasses

    from edgeopt.plan import make_plan, suits_dynamic
    from edgeopt_converters import graph, path
    from edgeopt_wire.errors import RecipeError

    if not recipe.precisions:
        model = source.model if source.model.format == "onnx" else path.convert(source.model, "onnx")
        if suits_dynamic(graph.of(model).operators):
            try:
                return make_plan(profile, dataclasses.replace(recipe, precisions=("int8-dynamic",)))
            except RecipeError:  # this runtime has fixed ranges only
                pass
    return make_plan(profile, recipe)
