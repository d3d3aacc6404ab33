# SPDX-License-Identifier: Apache-2.0
"""Weights of 4 bits of a trained perceptron: small in the file, near in the answers, better than what nearest gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from edgeopt.artifacts import tool_versions
from edgeopt.cache import Cache
from edgeopt.compress import make_artifacts
from edgeopt.evaluate.samples import load_samples
from edgeopt.passes import Order, quantize_weights
from edgeopt.passes.quantize_weights import Options
from edgeopt.plan import make_plan
from edgeopt.progress import Progress
from edgeopt.recipe import Recipe
from edgeopt.sources import load_source
from edgeopt.workbench import Workbench
from edgeopt_converters.model import Model
from edgeopt_profiles.profile import load_profile
from edgeopt_wire.tensor import TensorSpec

HIDDEN = 384


@dataclass(frozen=True)
class Trained:
    """A perceptron of three layers, samples that calibrate, and others that nobody has seen."""

    model: Model
    samples: list[dict[str, np.ndarray]]
    unseen: np.ndarray

    def outputs(self, program: Any) -> np.ndarray:
        session = ort.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(None, {"x": row[None]})[0] for row in self.unseen])

    def sqnr_db(self, program: Any) -> float:
        exact = self.outputs(self.model.program)
        return float(10 * np.log10(np.square(exact).sum() / np.square(self.outputs(program) - exact).sum()))

    def quantized(self, **options: Any) -> Any:
        order = Order(samples=self.samples, options=Options(**options))
        return quantize_weights.apply(self.model, order).model.program


@pytest.fixture(scope="module")
def trained() -> Trained:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    x, y = (digits.data[order] / 16).astype(np.float32), digits.target[order]
    net = MLPClassifier((HIDDEN, HIDDEN), max_iter=12, random_state=0).fit(x[:1200], y[:1200])
    tensors, nodes, value = [], [], "x"
    for number, (weight, bias) in enumerate(zip(net.coefs_, net.intercepts_, strict=True)):
        for name, values in ((f"w{number}", weight.T), (f"b{number}", bias)):
            tensors.append(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))
        last = number == len(net.coefs_) - 1
        made = "y" if last else f"g{number}"
        nodes.append(
            helper.make_node("Gemm", [value, f"w{number}", f"b{number}"], [made], f"gemm{number}", transB=1)
        )
        if not last:
            nodes.append(helper.make_node("Relu", [made], [f"r{number}"], f"relu{number}"))
            value = f"r{number}"
    graph = helper.make_graph(
        nodes, "digits", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])], tensors,
    )  # fmt: skip
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(program)
    spec = (TensorSpec("x", (1, 64), "float32"),)
    model = Model("onnx", program, "digits", spec, (TensorSpec("y", (1, 10), "float32"),))
    return Trained(model, [{"x": row[None]} for row in x[:96]], x[1200:1500])


def test_rounding_by_what_reaches_a_layer_beats_nearest_by_far(trained: Trained) -> None:
    nearest, ours = (trained.sqnr_db(trained.quantized(method=method)) for method in ("rtn", "gptq"))
    assert ours > nearest + 4  # dB
    answers = [trained.outputs(program).argmax(1) for program in (trained.model.program, trained.quantized())]
    assert (answers[0] == answers[1]).mean() > 0.98


def test_biases_take_the_mean_error(trained: Trained) -> None:
    quantized = trained.quantized(accuracy_level=1)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    floats = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in trained.model.program.graph.initializer
    }
    assert not np.array_equal(values["b0"], floats["b0"])
    session = ort.InferenceSession(_until(quantized, "g0"), providers=["CPUExecutionProvider"])
    inputs = np.concatenate([sample["x"] for sample in trained.samples])
    found = np.concatenate([session.run(None, {"x": row[None]})[0] for row in inputs]).mean(0)
    wanted = (inputs @ floats["w0"].T + floats["b0"]).mean(0)
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def _until(program: Any, name: str) -> bytes:
    part = onnx.ModelProto()
    part.CopyFrom(program)
    del part.graph.output[:]
    part.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return bytes(part.SerializeToString())


def test_all_of_the_file_is_less_than_a_sixth(trained: Trained) -> None:
    size = trained.quantized(method="rtn").ByteSize()
    assert size < 0.16 * trained.model.program.ByteSize()


def test_a_build_tries_equalized_layers_and_keeps_what_is_better(trained: Trained, tmp_path: Path) -> None:
    onnx.save(trained.model.program, tmp_path / "digits.onnx")
    recipe = Recipe(precisions=("int4-weights",), runtimes=("onnxruntime",))
    source = load_source(str(tmp_path / "digits.onnx"), recipe)
    np.savez(tmp_path / "x.npz", x=np.stack([sample["x"][0] for sample in trained.samples]))
    samples = load_samples(str(tmp_path / "x.npz"), source.model.inputs, None, limit=None, seed=0)
    bench = Workbench(Cache(None), tmp_path / "scratch", Progress(), tool_versions())
    made = make_artifacts(make_plan(load_profile("host"), recipe), source, samples, recipe, bench)
    file = made["onnx-int4-weights"]
    (said,) = [note for note in file.description.notes if note.startswith("equalize_layers ")]
    assert "2 pairs of layers" in said
    assert "24 held-out calibration samples" in said
    was_kept = said.startswith("equalize_layers kept")
    assert any("equalized in" in note for note in file.description.notes) == was_kept
    assert trained.sqnr_db(onnx.load(file.file)) > trained.sqnr_db(trained.quantized()) - 0.5
