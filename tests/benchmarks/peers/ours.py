# SPDX-License-Identifier: Apache-2.0
"""This project, with what a recipe does by default, from the same float source and samples as every peer."""

from __future__ import annotations

import shutil
from pathlib import Path

from work import Unavailable, Work

VARIANTS = {
    "onnx": "edgeopt, ONNX Runtime",
    "litert": "edgeopt, LiteRT",
    "onnx-nearest": "edgeopt, ONNX Runtime, weights to nearest",
}
IMPORTS = ("edgeopt.compress", "onnx", "onnxruntime", "torch")


def make(work: Work) -> Path:
    import dataclasses

    from edgeopt.artifacts import tool_versions
    from edgeopt.cache import Cache
    from edgeopt.compress import make_artifacts
    from edgeopt.evaluate.samples import load_samples
    from edgeopt.plan import make_plan
    from edgeopt.progress import Progress
    from edgeopt.recipe import Recipe
    from edgeopt.sources import load_source
    from edgeopt.workbench import Workbench
    from edgeopt_profiles.profile import load_profile

    wanted, _, rounding = work.variant.partition("-")
    recipe = Recipe(rounding=rounding or "gptq")
    source = load_source(str(work.source("torch" if "torch" in work.files else "onnx")), recipe)
    samples = load_samples(work.calibration, source.model.inputs, None, limit=None, seed=0)
    plan = make_plan(load_profile("host"), recipe)
    kept = [a for a in plan.artifacts if a.precision == "fp32" or a.format == wanted]
    if not any(artifact.precision == "int8" for artifact in kept):
        raise Unavailable(f"no runtime for {wanted} is installed")
    plan = dataclasses.replace(plan, artifacts=tuple(kept))
    bench = Workbench(Cache(None), work.output("scratch"), Progress(), tool_versions())
    made = make_artifacts(plan, source, samples, recipe, bench)
    (found,) = [entry for entry in made.values() if entry.artifact.precision == "int8"]
    target = work.output("model.onnx" if wanted == "onnx" else "model.tflite")
    shutil.copyfile(found.file, target)
    shutil.rmtree(work.output("scratch"))
    return target
