# SPDX-License-Identifier: Apache-2.0
"""A float model is brought to a format when something needs it there, and not before: lowering takes seconds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.cache import Cache
from edgeopt.floats import Floats
from edgeopt.plan import Artifact, Plan, make_plan
from edgeopt.progress import Progress
from edgeopt.recipe import Recipe
from edgeopt.sources import Source, file_digest
from edgeopt.workbench import Workbench
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import load_profile
from edgeopt_wire.errors import UnsupportedError
from edgeopt_wire.tensor import TensorSpec


def _source(folder: Path, operator: str = "Relu") -> Source:
    weights = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], "layer"),
        helper.make_node(operator, ["h"], ["y"], "last"),
    ]
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "net", edges[:1], edges[1:], [weights])
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    file = folder / "net.onnx"
    onnx.save(program, file)
    spec = [TensorSpec(name, (1, 4), "float32") for name in ("x", "y")]
    return Source(Model("onnx", program, "net", (spec[0],), (spec[1],)), file_digest(file), "net")


def _floats(folder: Path, *artifacts: Artifact, operator: str = "Relu") -> tuple[Floats, list[str]]:
    progress = Progress()
    plan: Plan = replace(make_plan(load_profile("host"), Recipe()), artifacts=artifacts)
    found = Floats(plan, _source(folder, operator), Workbench(Cache(None), folder, progress, {}))
    return found, [stage.name for stage in progress.finished]


BASE = Artifact("onnx-fp32", "onnx", "fp32")


def test_an_int8_file_made_of_the_onnx_form_needs_no_float_file_of_its_own(tmp_path: Path) -> None:
    found, made = _floats(tmp_path, BASE, Artifact("executorch-int8", "executorch", "int8"))
    assert made == ["lower to onnx"]
    assert "executorch" in found
    assert list(found) == ["onnx", "executorch"]


def test_what_is_measured_is_lowered_at_once_and_fails_before_anything_is_quantized(tmp_path: Path) -> None:
    litert = (Artifact("litert-int8", "litert", "int8"), Artifact("litert-fp32", "litert", "fp32"))
    with pytest.raises(UnsupportedError, match="Hardmax"):
        _floats(tmp_path, BASE, *litert, operator="Hardmax")


def test_one_format_can_hold_another_model_without_touching_the_first(tmp_path: Path) -> None:
    found, _ = _floats(tmp_path, BASE)
    other = replace(found["onnx"], hub=tmp_path / "other")
    assert found.but("onnx", other)["onnx"] is other
    assert found["onnx"] is not other
    with pytest.raises(KeyError):
        found["litert"]
