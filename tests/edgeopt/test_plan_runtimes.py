# SPDX-License-Identifier: Apache-2.0
import pytest

from edgeopt.plan import make_plan
from edgeopt.recipe import Recipe
from edgeopt_profiles import host
from edgeopt_profiles.profile import load_profile
from edgeopt_wire.errors import RecipeError

PROFILE = load_profile("x86-64")


def test_a_recipe_chooses_among_the_runtimes_of_a_device():
    plan = make_plan(PROFILE, Recipe(runtimes=("litert",)))
    assert {candidate.runtime for candidate in plan.candidates if not candidate.reference} == {"litert"}


def test_a_runtime_that_the_device_does_not_take_is_refused_with_those_that_it_takes():
    with pytest.raises(RecipeError, match=r"litert.*onnxruntime.*asks for tensorrt"):
        make_plan(load_profile("x86-64"), Recipe(runtimes=("tensorrt",)))


def test_an_optional_target_is_made_only_where_a_recipe_names_its_runtime():
    assert "openvino" not in {candidate.runtime for candidate in make_plan(PROFILE, Recipe()).candidates}
    plan = make_plan(PROFILE, Recipe(runtimes=("openvino",)))
    artifact = plan.artifact("openvino-int8-u8s8-safe")
    assert (artifact.runtime, artifact.format) == ("openvino", "onnx")
    assert "openvino-fp32-1t" in {candidate.id for candidate in plan.candidates if candidate.reference}
    assert "fp16" not in {entry.precision for entry in plan.artifacts}, "half floats want a precision as well"


def test_every_precision_of_openvino_has_its_own_float_reference():
    plan = make_plan(PROFILE, Recipe(runtimes=("openvino",), precisions=("int8", "fp16", "fp32")))
    shipped = {candidate.id for candidate in plan.candidates if not candidate.reference}
    assert shipped == {f"openvino-{kind}-{n}t" for kind in ("int8", "fp16", "fp32") for n in (1, 4)}
    assert {entry.runtime for entry in plan.artifacts if entry.id != "onnx-fp32"} == {"openvino"}


def test_a_runtime_that_this_machine_lacks_is_refused_with_what_to_install():
    found = host.detect(is_installed=lambda module: module == "onnxruntime")
    with pytest.raises(RecipeError, match=r"asks for openvino.*pip install 'edgeopt\[openvino\]'"):
        make_plan(found, Recipe(runtimes=("openvino",)))
