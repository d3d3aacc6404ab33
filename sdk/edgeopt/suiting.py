# SPDX-License-Identifier: Apache-2.0
"""The plan that suits a request: by the recipe, by the device's profile, and by what is in the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgeopt.artifacts import lower
from edgeopt.plan import Plan, make_plan, suits_dynamic
from edgeopt.predict import Prediction, foresee
from edgeopt.request import BuildRequest, Loaded
from edgeopt.sources import load_source
from edgeopt.workbench import Workbench
from edgeopt_converters import graph
from edgeopt_profiles.operators import Operator
from edgeopt_profiles.profile import load_profile
from edgeopt_wire.errors import RecipeError


def plan_build(request: BuildRequest) -> Plan:
    """Decide what a build would make, without making it (`--dry-run`).

    An ONNX file is looked at, because what is in it decides too; other models would have to be exported first.

    Raises:
        RecipeError: The recipe does not fit the device, or the ONNX file cannot be read.
    """
    plan = make_plan(load_profile(request.device), request.recipe)
    if not request.model.endswith(".onnx") or _is_decided(request, plan):
        return plan
    source = load_source(request.model, request.recipe)
    return _by_traits(request, plan, graph.of(source.model).operators)


def foresee_build(request: BuildRequest, plan: Plan) -> dict[str, Prediction]:
    """Estimate what a build would give, by candidate; nothing where the model is no ONNX file yet.

    Raises:
        RecipeError: The ONNX file cannot be read.
    """
    if not request.model.endswith(".onnx") or plan.device.id == "host":
        return {}
    source = load_source(request.model, request.recipe)
    return foresee(plan, graph.of(source.model).operators)


def suited(request: BuildRequest, plan: Plan, loaded: Loaded, bench: Workbench) -> Plan:
    """Return the plan that suits the model, by its ONNX form."""
    if _is_decided(request, plan):
        return plan
    if loaded.stand_in is not None:  # fixed ranges from batch normalization are what was asked for
        return plan
    base = lower("onnx", loaded.source.model, loaded.source.sha256, bench)
    return _by_traits(request, plan, graph.of(base.model()).operators)


def _is_decided(request: BuildRequest, plan: Plan) -> bool:
    """Whether what is in the model changes nothing: the recipe says what to make, or nothing is int8."""
    return bool(request.recipe.precisions) or all(artifact.precision != "int8" for artifact in plan.artifacts)


def _by_traits(request: BuildRequest, plan: Plan, operators: Sequence[Operator]) -> Plan:
    """Take run-time ranges instead of fixed ones where nearly all of the model's work is in matrix products.

    Fixed ranges lost most of MiniLM (cosine 0.94 against 0.998), and a device would choose them if they were faster.
    """
    offered = {target.precision for target in plan.device.targets if not target.by_recipe} - {"fp32", "int8"}
    if not suits_dynamic(operators) or "onnx" not in plan.formats:
        return plan
    try:
        return make_plan(plan.device, replace(request.recipe, precisions=(*sorted(offered), "int8-dynamic")))
    except RecipeError:  # this device runs no ONNX on its CPU
        return plan
