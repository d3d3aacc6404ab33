# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest

from edgeopt.plan import make_plan
from edgeopt.recipe import Recipe
from edgeopt_profiles.profile import Target, load_profile
from edgeopt_wire.errors import RecipeError

PROFILE = load_profile("x86-64")


def test_a_recipe_chooses_among_the_runtimes_of_a_device():
    plan = make_plan(PROFILE, Recipe(runtimes=("litert",)))
    assert {candidate.runtime for candidate in plan.candidates if not candidate.reference} == {"litert"}


def test_a_runtime_that_the_device_does_not_take_is_refused_with_those_that_it_takes():
    with pytest.raises(RecipeError, match=r"litert.*onnxruntime.*asks for tensorrt"):
        make_plan(load_profile("x86-64"), Recipe(runtimes=("tensorrt",)))


def test_an_optional_target_is_made_only_where_a_recipe_names_its_runtime():
    extra = Target("openvino", "onnx", "int8", (1,), "cpu", "u8s8-safe", optional=True)
    profile = replace(PROFILE, targets=(extra, *(t for t in PROFILE.targets if t.runtime != "openvino")))
    assert "openvino" not in {candidate.runtime for candidate in make_plan(profile, Recipe()).candidates}
    plan = make_plan(profile, Recipe(runtimes=("openvino",)))
    artifact = plan.artifact("openvino-int8-u8s8-safe")
    assert (artifact.runtime, artifact.file) == ("openvino", "variants/openvino-int8-u8s8-safe.onnx")
    assert "openvino-fp32-1t" in {candidate.id for candidate in plan.candidates if candidate.reference}
