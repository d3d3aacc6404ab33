# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgeopt_agent.runtimes import onnxruntime as runtime
from edgeopt_wire.errors import RuntimeFailure, UnsupportedError
from edgeopt_wire.manifest import Variant
from edgeopt_wire.tensor import Affine, TensorSpec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

X = TensorSpec("x", (1, 4), "float32")
Y = TensorSpec("y", (1, 2), "float32")
VARIANT = Variant("v", "onnxruntime", "fp32", "m.onnx", (X,), (Y,), "g", 30.0)
WEIGHT = np.arange(8, dtype=np.float32).reshape(4, 2)


def write_linear(file: Path, operator: str = "MatMul", domain: str = "") -> Path:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["x", "w"], ["y"], domain=domain)],
        "linear",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2])],
        [onnx.numpy_helper.from_array(WEIGHT, "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 17)] + ([onnx.helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), file)
    return file


def write_quantized(file: Path) -> Path:
    """x as uint8 in, y as uint8 out, real arithmetic between: the edges of a fully quantized model."""
    scalars = {"sx": np.float32(0.05), "zx": np.uint8(128), "sy": np.float32(0.5), "zy": np.uint8(10)}
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("DequantizeLinear", ["x", "sx", "zx"], ["real"]),
            onnx.helper.make_node("MatMul", ["real", "w"], ["product"]),
            onnx.helper.make_node("QuantizeLinear", ["product", "sy", "zy"], ["y"]),
        ],
        "quantized",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [1, 4])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, [1, 2])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in scalars.items()]
        + [onnx.numpy_helper.from_array(WEIGHT, "w")],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), file
    )
    return file


def test_model_runs_on_the_cpu_with_the_threads_that_were_asked_for(tmp_path: Path) -> None:
    session = runtime.load(write_linear(tmp_path / "m.onnx"), replace(VARIANT, threads=2))
    x = np.array([[1, 2, 3, 4]], np.float32)
    np.testing.assert_array_equal(session.run({"x": x})["y"], x @ WEIGHT)
    assert session._session.get_providers() == ["CPUExecutionProvider"]
    assert session._session.get_session_options().intra_op_num_threads == 2
    assert session._session.get_session_options().inter_op_num_threads == 1


def test_integer_edges_reach_the_signature_through_the_affine(tmp_path: Path) -> None:
    from edgeopt_agent.tensors import from_variant, to_variant

    own_x = TensorSpec("x", (1, 4), "uint8", affine=Affine(0.05, 128))
    own_y = TensorSpec("y", (1, 2), "uint8", affine=Affine(0.5, 10))
    variant = replace(VARIANT, inputs=(own_x,), outputs=(own_y,))
    session = runtime.load(write_quantized(tmp_path / "m.onnx"), variant)
    x = np.array([[1, 2, 3, 0]], np.float32)
    found = from_variant([own_y], [Y], session.run(to_variant([X], [own_x], {"x": x})))
    np.testing.assert_allclose(found["y"], x @ WEIGHT, atol=0.25)  # half a step of the output


@pytest.mark.parametrize("accelerator", ["cuda", "tensorrt"])
def test_accelerator_that_is_not_here_is_refused(tmp_path: Path, accelerator: str) -> None:
    if accelerator in runtime.accelerators():
        pytest.skip(f"this machine has {accelerator}")
    with pytest.raises(UnsupportedError, match=f"'{accelerator}'.*offers cpu"):
        runtime.load(write_linear(tmp_path / "m.onnx"), replace(VARIANT, accelerator=accelerator))


def test_provider_that_the_library_silently_left_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = runtime._library()

    def offer_cuda_and_take_cpu(path: str, sess_options: object, providers: object) -> object:
        return library.InferenceSession(path, providers=["CPUExecutionProvider"])

    stripped = SimpleNamespace(
        **{name: getattr(library, name) for name in dir(library) if not name.startswith("__")}
    )
    stripped.__version__ = library.__version__
    stripped.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    stripped.InferenceSession = offer_cuda_and_take_cpu
    monkeypatch.setattr(runtime, "_library", lambda: stripped)
    with pytest.raises(UnsupportedError, match="did not take CUDAExecutionProvider"):
        runtime.load(write_linear(tmp_path / "m.onnx"), replace(VARIANT, accelerator="cuda"))


def test_tensorrt_engines_are_cached_under_the_models_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(runtime.ENGINE_CACHE_VARIABLE, str(tmp_path / "cache"))
    file = write_linear(tmp_path / "m.onnx")
    variant = replace(
        VARIANT, accelerator="tensorrt", precision="int8", options={"fp16": "on", "workspace_mib": "64"}
    )
    first = runtime._provider_options(file, variant)
    assert first["trt_int8_enable"] == first["trt_fp16_enable"] == "1"
    assert first["trt_max_workspace_size"] == str(64 * 2**20)
    assert Path(first["trt_engine_cache_path"]).is_dir()
    file.write_bytes(file.read_bytes() + b"\0")
    assert runtime._provider_options(file, variant)["trt_engine_cache_path"] != first["trt_engine_cache_path"]
    assert "trt_bf16_enable" not in first
    assert runtime._provider_options(file, replace(variant, precision="bf16"))["trt_bf16_enable"] == "1"


def test_damaged_file_is_a_runtime_failure(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(RuntimeFailure, match=r"cannot load m\.onnx"):
        runtime.load(tmp_path / "m.onnx", VARIANT)


@pytest.mark.parametrize("domain", ["", "some.vendor"])
def test_operator_that_the_library_does_not_know_is_unsupported(tmp_path: Path, domain: str) -> None:
    file = write_linear(tmp_path / "m.onnx", "NoSuchOperator", domain)
    with pytest.raises(UnsupportedError, match="NoSuchOperator"):
        runtime.load(file, VARIANT)


@pytest.mark.parametrize(
    "change", [{"ir_version": 99}, {"opset_imports": [onnx.helper.make_opsetid("", 99)]}]
)
def test_file_of_a_newer_onnx_than_the_library_knows_is_unsupported(tmp_path: Path, change: dict) -> None:
    graph = onnx.load(write_linear(tmp_path / "m.onnx")).graph
    fields = {"ir_version": 8, "opset_imports": [onnx.helper.make_opsetid("", 17)], **change}
    onnx.save(onnx.helper.make_model(graph, **fields), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match=r"cannot load m\.onnx"):
        runtime.load(tmp_path / "m.onnx", VARIANT)


def test_manifest_with_other_names_than_the_file_is_refused(tmp_path: Path) -> None:
    variant = replace(VARIANT, inputs=(replace(X, name="pixels"),))
    with pytest.raises(UnsupportedError, match=r"inputs \['pixels'\], the file has \['x'\]"):
        runtime.load(write_linear(tmp_path / "m.onnx"), variant)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimisation": "all"}, "did you mean 'optimization'"),
        ({"optimization": "most"}, "must be one of all"),
    ],
)
def test_unknown_option_or_value_is_refused(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        runtime.load(write_linear(tmp_path / "m.onnx"), replace(VARIANT, options=options))


def test_wrong_input_at_run_time_is_a_runtime_failure(tmp_path: Path) -> None:
    session = runtime.load(write_linear(tmp_path / "m.onnx"), VARIANT)
    with pytest.raises(RuntimeFailure, match="onnxruntime failed on variant v"):
        session.run({"x": np.zeros((1, 5), np.float32)})


def test_library_that_is_not_installed_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError, match=r"edgeopt-agent\[onnxruntime\]"):
        runtime.version()
