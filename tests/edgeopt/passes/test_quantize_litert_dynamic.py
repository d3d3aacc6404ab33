# SPDX-License-Identifier: Apache-2.0
"""Int8 layers of a transformer in LiteRT: ranges found at run time, attention and norms in floats, tables small."""

import functools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from edgeopt.passes import Order
from edgeopt.passes import quantize_litert_dynamic as subject
from edgeopt.plan import make_plan
from edgeopt.recipe import Recipe
from edgeopt_converters import path as conversion
from edgeopt_converters.litert_graph import operators
from edgeopt_converters.model import Model
from edgeopt_converters.torch_program import program_model
from edgeopt_profiles.profile import Scheme, load_profile
from edgeopt_wire.errors import UnsupportedError

pytest.importorskip("ai_edge_quantizer")
pytest.importorskip("litert_torch")
torch = pytest.importorskip("torch")

from text_block import Block  # noqa: E402 - it needs torch


class Listener(torch.nn.Module):  # type: ignore[misc]
    """Convolutions in front of a layer, as in a net that hears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(1, 16, 3), torch.nn.Conv2d(16, 16, 3, groups=16)
        self.out = torch.nn.Linear(16, 4)

    def forward(self, x: Any) -> Any:
        return self.out(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


@functools.cache
def _text(*, through_onnx: bool = False) -> Model:
    exported = torch.export.export(Block().eval(), (torch.zeros((1, 8), dtype=torch.int64),))
    model = program_model(exported, name="text")
    return conversion.convert(conversion.convert(model, "onnx") if through_onnx else model, "litert")


@functools.cache
def _sound() -> Model:
    exported = torch.export.export(Listener().eval(), (torch.zeros(1, 1, 12, 12),))
    return conversion.convert(program_model(exported, name="sound"), "litert")


def _run(model: Model, values: np.ndarray) -> np.ndarray:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=model.program, num_threads=1)
    interpreter.allocate_tensors()
    rows = []
    for row in values:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], row)
        interpreter.invoke()
        rows.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).copy())
    return np.stack(rows)


def _sqnr_db(model: Model, made: Model, values: np.ndarray) -> float:
    exact = _run(model, values)
    return float(10 * np.log10(np.square(exact).sum() / np.square(_run(made, values) - exact).sum()))


def _types(model: Model, name: str) -> list[tuple[str, ...]]:
    """The types of what operators of a kind read."""
    return [
        tuple(tensor.dtype for tensor in entry.inputs[:2])
        for entry in operators(model.program)
        if entry.type == name
    ]


TOKENS = np.random.default_rng(0).integers(0, 512, (16, 1, 8)).astype(np.int32)


@pytest.mark.parametrize("through_onnx", [False, True], ids=["from PyTorch", "by way of ONNX"])
def test_layers_and_tables_are_int8_and_attention_is_not(through_onnx: bool) -> None:
    floats = _text(through_onnx=through_onnx)
    result = subject.apply(floats, Order())
    products = Counter(_types(result.model, "FULLY_CONNECTED") + _types(result.model, "BATCH_MATMUL"))
    assert products == {("float32", "int8"): 3, ("float32", "float32"): 2}
    assert [types[1] for types in _types(result.model, "EMBEDDING_LOOKUP")] == ["int8"]
    assert len(result.model.program) < 0.45 * len(floats.program)
    assert _sqnr_db(floats, result.model, TOKENS) > 35
    assert "3 fully connected layers" in result.notes[0]
    assert "left in float" in result.notes[1]


def test_a_recipe_leaves_layers_in_float() -> None:
    made = subject.apply(_text(), Order(exclude=("Gemm#0", "EMBEDDING_LOOKUP"))).model
    assert Counter(_types(made, "FULLY_CONNECTED"))["float32", "int8"] == 2
    assert [types[1] for types in _types(made, "EMBEDDING_LOOKUP")] == ["float32"]


def test_convolutions_are_small_in_the_file_where_that_is_asked_for() -> None:
    plain = subject.apply(_sound(), Order()).model
    small = subject.apply(_sound(), Order(options=subject.Options(convolutions=True)))
    assert {types[1] for types in _types(plain, "DEPTHWISE_CONV_2D")} == {"float32"}
    unpacked = [types[0] for types in _types(small.model, "DEQUANTIZE")]
    assert unpacked == ["int8", "int8"]
    images = np.random.default_rng(1).normal(size=(8, 1, 12, 12, 1)).astype(np.float32)
    assert _sqnr_db(_sound(), small.model, images) > 30
    assert any("2 convolutions" in note for note in small.notes)


def test_what_has_no_layers_is_refused_with_what_to_use() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    model = conversion.convert(
        program_model(torch.export.export(net, (torch.zeros(1, 3, 8, 8),)), name="net"), "litert"
    )
    with pytest.raises(UnsupportedError, match="use quantize_litert"):
        subject.apply(model, Order())


def test_integers_at_the_edges_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="float32 inputs"):
        subject.apply(_text(), Order(Scheme("int8", "int8", True, False, io="int8")))


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-weights"])
def test_a_build_for_a_cpu_makes_it_in_both_runtimes(precision: str) -> None:
    plan = make_plan(load_profile("raspberry-pi-5"), Recipe(precisions=(precision,)))
    assert {f"onnx-{precision}", f"litert-{precision}"} <= {artifact.id for artifact in plan.artifacts}
    assert plan.artifact(f"litert-{precision}").pass_name == "quantize_litert_dynamic"


def test_a_coral_stick_runs_integers_alone() -> None:
    offered = {artifact.precision for artifact in make_plan(load_profile("coral-usb"), Recipe()).artifacts}
    assert "int8-dynamic" not in offered
