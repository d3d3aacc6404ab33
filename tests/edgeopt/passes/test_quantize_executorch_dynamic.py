# SPDX-License-Identifier: Apache-2.0
"""Int8 layers of a transformer in ExecuTorch: ranges found at run time, attention and norms in floats, tables small."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgeopt.passes import Order, quantize_executorch
from edgeopt.passes import quantize_executorch_dynamic as subject
from edgeopt.plan import make_plan
from edgeopt.recipe import Recipe
from edgeopt_agent import runtimes
from edgeopt_converters import path as conversion
from edgeopt_converters.executorch_graph import operators
from edgeopt_converters.model import Model
from edgeopt_converters.torch_program import program_model
from edgeopt_profiles.profile import Scheme, load_profile
from edgeopt_wire.errors import RecipeError, UnsupportedError
from edgeopt_wire.manifest import Variant

pytest.importorskip("executorch")
torch = pytest.importorskip("torch")

from text_block import Block  # noqa: E402 - it needs torch

TOKENS = np.random.default_rng(0).integers(0, 512, (16, 1, 8))


@functools.cache
def text() -> Model:
    """The block as ONNX has it: matrices (in, out) with the bias behind, GELU written out."""
    exported = torch.export.export(Block().eval(), (torch.zeros((1, 8), dtype=torch.int64),))
    return conversion.convert(program_model(exported, name="text"), "onnx")


@functools.cache
def quantized(exclude: tuple[str, ...] = ()) -> Model:
    return subject.apply(text(), Order(exclude=exclude)).model


def run(model: Model, folder: Path) -> np.ndarray:
    file = folder / ("model.onnx" if model.format == "onnx" else "model.pte")
    file.write_bytes(model.program if isinstance(model.program, bytes) else model.program.SerializeToString())
    runtime = {"onnx": "onnxruntime", "executorch": "executorch"}[model.format]
    variant = Variant("v", runtime, "int8", file.name, model.inputs, model.outputs, "", 0.0)
    session = runtimes.find(runtime).load(file, variant)
    found = np.stack([session.run({model.inputs[0].name: row})[model.outputs[0].name] for row in TOKENS])
    session.close()
    return found


def sqnr_db(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10((wanted**2).sum() / ((found - wanted) ** 2).sum()))


def kinds(model: Model) -> Counter[tuple[str, str]]:
    return Counter((entry.type, entry.dtype) for entry in operators(model.program))


def test_layers_and_tables_are_int8_and_attention_is_not(tmp_path: Path) -> None:
    made = quantized()
    found = kinds(made)
    assert found["FullyConnected", "int8"] == 3
    assert found["FullyConnected", "float32"] == 0
    assert found["BatchMatrixMultiply", "float32"] == 2
    assert found["Gelu", "float32"] == 1
    assert found["aten::embedding.out", "int8"] == 1
    assert sqnr_db(run(made, tmp_path), run(text(), tmp_path)) > 35


def test_the_file_holds_no_float_weights() -> None:
    weights = 512 * 32 + 32 * 96 + 32 * 128 + 128 * 32
    floats = conversion.convert(text(), "executorch")
    assert len(floats.program) > 4 * weights
    assert len(floats.program) - len(quantized().program) > 2.5 * weights


def test_a_recipe_leaves_layers_and_tables_in_float(tmp_path: Path) -> None:
    made = quantized(("Gemm#0", "Gather"))
    found = kinds(made)
    assert (found["FullyConnected", "int8"], found["FullyConnected", "float32"]) == (2, 1)
    assert found["aten::embedding.out", "float32"] == 1
    assert sqnr_db(run(made, tmp_path), run(text(), tmp_path)) > 35


def test_a_selector_that_means_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="Conv#0"):
        subject.apply(text(), Order(exclude=("Conv#0",)))


def test_gelu_is_one_operator_of_the_float_file_too(tmp_path: Path) -> None:
    floats = conversion.convert(text(), "executorch")
    assert kinds(floats)["Gelu", "float32"] == 1
    assert sqnr_db(run(floats, tmp_path), run(text(), tmp_path)) > 60


@pytest.mark.parametrize("module", [subject, quantize_executorch])
def test_what_has_nothing_to_quantize_is_refused(module: object) -> None:
    net = torch.nn.Sequential(torch.nn.Softmax(-1), torch.nn.Tanh()).eval()
    exported = torch.export.export(net, (torch.zeros(1, 8),))
    model = conversion.convert(program_model(exported, name="net"), "onnx")
    samples = [{model.inputs[0].name: np.zeros((1, 8), np.float32)}]
    scheme = Scheme("int8", "int8", True, False)
    with pytest.raises(UnsupportedError, match="linear layer"):
        module.apply(model, Order(scheme=scheme, samples=samples))  # type: ignore[attr-defined]


def test_integers_at_the_edges_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="float32 inputs"):
        subject.apply(text(), Order(Scheme("int8", "int8", True, False, io="int8")))


def test_a_build_for_a_phone_makes_it() -> None:
    recipe = Recipe(precisions=("int8-dynamic",), runtimes=("executorch",))
    plan = make_plan(load_profile("android"), recipe)
    assert plan.artifact("executorch-int8-dynamic").pass_name == "quantize_executorch_dynamic"
