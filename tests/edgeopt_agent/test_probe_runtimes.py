# SPDX-License-Identifier: Apache-2.0
"""One package, two real runtimes, each measured in its own process."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt_agent.model import open_model
from edgeopt_agent.probe import ProbeRequest, run_probe
from edgeopt_wire.document import to_bytes
from edgeopt_wire.manifest import Variant
from edgeopt_wire.tensor import TensorSpec

pytest.importorskip("ai_edge_litert")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TINY = Path(__file__).parent / "data/tiny.tflite"  # made by data/make_tiny_tflite.py
IMAGE = TensorSpec("image", (1, 3, 8, 8), "float32", "NCHW")
SCORES = TensorSpec("scores", (1, 5), "float32")


def write_onnx(file: Path) -> Path:
    """Mean over the image, then a linear layer: another network than TINY, with the same signature."""
    weight = np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0),
            onnx.helper.make_node("MatMul", ["m", "w"], ["y"]),
        ],
        "mean_linear",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 5])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, file)
    return file


@pytest.fixture
def package(tmp_path: Path, make_package) -> Path:
    (tmp_path / "variants").mkdir()
    write_onnx(tmp_path / "variants/m.onnx")
    shutil.copy(TINY, tmp_path / "variants/m.tflite")
    onnx_variant = Variant(
        "ort",
        "onnxruntime",
        "fp32",
        "variants/m.onnx",
        (replace(IMAGE, name="x"),),
        (replace(SCORES, name="y"),),
        "",
        40.0,
    )
    litert_variant = Variant(
        "litert",
        "litert",
        "fp32",
        "variants/m.tflite",
        (TensorSpec("args_0", (1, 8, 8, 3), "float32", "NHWC"),),
        (replace(SCORES, name="output_0"),),
        "",
        40.0,
        threads=2,
    )
    made = make_package(tmp_path, {}, variants=[onnx_variant, litert_variant])
    images = np.random.default_rng(4).normal(size=(4, 3, 8, 8)).astype(np.float16)
    np.save(tmp_path / "golden/inputs/0.npy", images)
    named = []
    for variant in made.variants:
        manifest = replace(made, signature_inputs=(IMAGE,), signature_outputs=(SCORES,))
        with open_model(tmp_path, manifest, variant.id) as model:
            outputs = [model.infer({"image": image[None].astype(np.float32)})["scores"] for image in images]
        folder = tmp_path / f"golden/outputs/{variant.id}"
        folder.mkdir(parents=True)
        np.save(folder / "0.npy", np.concatenate(outputs))
        named.append(replace(variant, golden=f"golden/outputs/{variant.id}"))
    manifest = replace(made, signature_inputs=(IMAGE,), signature_outputs=(SCORES,), variants=tuple(named))
    (tmp_path / "manifest.json").write_bytes(to_bytes(manifest))
    return tmp_path


@pytest.mark.parametrize(
    ("variant", "runtime", "threads"), [("ort", "onnxruntime", 1), ("litert", "litert", 2)]
)
def test_real_runtime_reproduces_its_golden_outputs_in_a_process_of_its_own(
    package: Path, variant: str, runtime: str, threads: int
) -> None:
    request = ProbeRequest(
        str(package), variant, "c" * 64, "device-1", "host", warmup_ns=0, minimum_runs=100, minimum_ns=0
    )
    found = run_probe(request)
    assert found.error == ""
    assert found.golden_ok
    assert found.golden_exact
    assert found.timing is not None
    assert found.timing.p99_ns is not None
    assert (found.conditions.runtime, found.conditions.threads) == (runtime, threads)
    assert found.conditions.runtime_version[0].isdigit()
    assert found.extra["golden_samples"] == 4


def test_variant_with_another_models_golden_outputs_is_found_out(package: Path) -> None:
    for file in (package / "golden/outputs/litert").iterdir():
        shutil.copy(file, package / "golden/outputs/ort" / file.name)
    found = run_probe(
        ProbeRequest(str(package), "ort", "c" * 64, "device-1", "host", warmup_ns=0, minimum_ns=0)
    )
    assert not found.golden_ok
    assert found.golden_sqnr_db is not None
    assert found.golden_sqnr_db < 40.0
