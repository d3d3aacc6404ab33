# SPDX-License-Identifier: Apache-2.0
"""`edgeopt analyze`: where a model's int8 error comes from, tensor by tensor, before any package is built.

The analysis is of the ONNX form with the device's own scheme; a device that takes no int8 ONNX is analysed with its
scheme in ONNX as well, because weights and ranges are decided once for every format.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeopt.artifacts import attribute_artifact, code_digest, tool_versions
from edgeopt.attribute import Attribution
from edgeopt.cache import Cache
from edgeopt.compress import make_artifacts
from edgeopt.coverage import Coverage, problems
from edgeopt.coverage import read as read_coverage
from edgeopt.plan import Artifact, Plan, make_plan
from edgeopt.progress import Progress
from edgeopt.request import BuildRequest, load_inputs
from edgeopt.workbench import Workbench
from edgeopt_profiles.profile import load_profile
from edgeopt_wire.errors import RecipeError


@dataclass(frozen=True)
class Analysis:
    """What was found. `exclude` are the operators whose tensors cost most, ready for a recipe's `[quantize]`."""

    SCHEMA = "edgeopt.analysis/1"

    model: str
    device: str
    scheme: str
    attribution: Attribution
    coverage: Coverage
    problems: tuple[str, ...]
    exclude: tuple[str, ...]
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def analyze(request: BuildRequest, cache: Cache, progress: Progress) -> Analysis:
    """Quantize the model for the device's scheme and attribute its error to every tensor.

    Raises:
        RecipeError: There is no calibration data, or the device takes no int8.
    """
    profile = load_profile(request.device)
    plan = make_plan(profile, replace(request.recipe, precisions=()))
    artifact = _artifact(plan)
    plan = replace(plan, artifacts=(Artifact("onnx-fp32", "onnx", "fp32"), artifact), candidates=())
    if not request.calibration:
        raise RecipeError("an analysis needs calibration data: give --calibration DATA")
    with tempfile.TemporaryDirectory(prefix="edgeopt-analyze-") as name:
        scratch = Path(name)
        with progress.stage("load") as step:
            loaded = load_inputs(request, plan)
            step.detail = loaded.source.description
        bench = Workbench(cache, scratch, progress, {**tool_versions(), "code": code_digest()})
        made = make_artifacts(plan, loaded.source, loaded.calibration, request.recipe, bench)[artifact.id]
        samples = loaded.evaluation or loaded.calibration
        assert samples is not None
        found = attribute_artifact(made, samples, loaded.source, bench, tensors=True)
        file = scratch / "model.onnx"
        file.write_bytes(made.file.read_bytes())
        coverage = read_coverage(file, artifact.runtime)
    return Analysis(
        model=loaded.source.model.name,
        device=profile.id,
        scheme=artifact.id,
        attribution=found,
        coverage=coverage,
        problems=problems(coverage),
        exclude=_worst(found),
        notes=made.description.notes,
    )


def _artifact(plan: Plan) -> Artifact:
    """The int8 ONNX artifact of the plan, or one with the scheme of another format."""
    integers = [artifact for artifact in plan.artifacts if artifact.precision == "int8"]
    if not integers:
        raise RecipeError(f"{plan.device.id} takes no int8 model: there is nothing to analyse")
    first = next((artifact for artifact in integers if artifact.format == "onnx"), integers[0])
    if first.format == "onnx" or first.scheme is None:
        return first
    return Artifact(f"onnx-{first.id}", "onnx", "int8", replace(first.scheme, io="float32"))


def _worst(found: Attribution, share: float = 0.05) -> tuple[str, ...]:
    """Operators behind the tensors that cost more than a twentieth of the error each."""
    names = [entry.node for entry in found.tensors if entry.share >= share and entry.node]
    return tuple(dict.fromkeys(names))
