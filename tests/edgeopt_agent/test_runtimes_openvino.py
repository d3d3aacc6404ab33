# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt_agent.runtimes import openvino as runtime
from edgeopt_wire.errors import RuntimeFailure, UnsupportedError
from edgeopt_wire.manifest import Variant
from edgeopt_wire.tensor import TensorSpec

pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")

SHAPE = (1, 3, 8, 8)
X = TensorSpec("x", SHAPE, "float32", "NCHW")
Y = TensorSpec("y", (1, 5), "float32")
VARIANT = Variant("v", "openvino", "fp32", "net.onnx", (X,), (Y,), "g", 30.0)
IMAGE = np.random.default_rng(5).normal(size=SHAPE).astype(np.float32)


def net(folder: Path, *, batch: int | str = 1, domain: str = "") -> Path:
    """A convolution, a mean over the image, and a product."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(64, 3, 3, 3)).astype(np.float32),
        "p": rng.normal(size=(64, 5)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "p"], ["y"], domain=domain),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *SHAPE[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    sets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    file = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=8), file)
    return file


def expected(file: Path, image: np.ndarray) -> np.ndarray:
    """The same in 64 bits."""
    weights = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer
    }
    windows = np.lib.stride_tricks.sliding_window_view(image.astype(np.float64), (3, 3), axis=(2, 3))
    convolved = np.einsum("nchwij,ocij->no", windows, weights["w"]) / (6 * 6)
    return convolved @ weights["p"]


def test_a_float_file_is_computed_in_32_bits_whatever_the_cpu_prefers(tmp_path: Path) -> None:
    file = net(tmp_path)
    found = runtime.load(file, VARIANT).run({"x": IMAGE})["y"]
    wanted = expected(file, IMAGE)
    # bfloat16 keeps 8 bits: its error on this net is above 1e-3 of the largest output
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_threads_and_precision_are_those_of_the_variant(tmp_path: Path) -> None:
    core = runtime.library().Core()
    compiled = core.compile_model(core.read_model(str(net(tmp_path))), "CPU", runtime.settings(2))
    asked = ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "INFERENCE_PRECISION_HINT", "ENABLE_CPU_PINNING")
    found = [compiled.get_property(name) for name in asked]
    assert found[:2] == [2, 1]
    assert found[2].to_dtype() == np.float32
    assert found[3] is False


def test_an_answer_is_not_overwritten_by_the_next_run(tmp_path: Path) -> None:
    session = runtime.load(net(tmp_path), VARIANT)
    first = session.run({"x": IMAGE})["y"]
    kept = first.copy()
    session.run({"x": -IMAGE})
    np.testing.assert_array_equal(first, kept)


def test_a_free_axis_is_fixed_to_the_variants(tmp_path: Path) -> None:
    file = net(tmp_path, batch="n")
    two = np.concatenate([IMAGE, -IMAGE])
    variant = replace(VARIANT, inputs=(replace(X, shape=(2, 3, 8, 8)),), outputs=(replace(Y, shape=(2, 5)),))
    found = runtime.load(file, variant).run({"x": two})["y"]
    np.testing.assert_allclose(found, expected(file, two), rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accelerator": "gpu"}, "'gpu'.*offers cpu"),
        ({"options": {"precision": "bf16"}}, "unknown option 'precision'"),
        ({"minimum_runtime": "2999.1"}, r"needs openvino 2999\.1 or newer"),
        ({"inputs": (replace(X, name="pixels"),)}, r"inputs \['pixels'\], the file has \['x'\]"),
        ({"outputs": (replace(Y, name="scores"),)}, r"outputs \['scores'\], the file has"),
        ({"inputs": (replace(X, shape=(1, 3, 9, 9)),)}, r"manifest says float32 \(1, 3, 9, 9\)"),
        ({"outputs": (replace(Y, dtype="float16"),)}, "manifest says float16"),
    ],
)
def test_variant_that_cannot_run_as_asked_is_refused(change: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=said):
        runtime.load(net(tmp_path), replace(VARIANT, **change))


def test_an_operator_that_openvino_does_not_know_is_said_to_be_unsupported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot load net\.onnx: .*MatMul"):
        runtime.load(net(tmp_path, domain="some.vendor"), VARIANT)


def test_a_damaged_file_is_a_runtime_failure(tmp_path: Path) -> None:
    file = net(tmp_path)
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(RuntimeFailure, match=r"cannot load net\.onnx"):
        runtime.load(file, VARIANT)


def test_wrong_inputs_are_a_runtime_failure_and_closing_twice_harmless(tmp_path: Path) -> None:
    session = runtime.load(net(tmp_path), VARIANT)
    for wrong in ({"x": IMAGE[:, :2]}, {"z": IMAGE}):
        with pytest.raises(RuntimeFailure, match="openvino failed on variant v"):
            session.run(wrong)
    session.close()
    session.close()
    with pytest.raises(RuntimeFailure, match="closed"):
        session.run({"x": IMAGE})


def test_loading_it_calls_nobody(tmp_path: Path) -> None:
    """`import openvino` alone sends an event to its vendor; an agent's process must not even look up the address."""
    file = net(tmp_path)
    code = f"""
import socket, sys
calls = []
def call(*given, **named):
    calls.append(given)
    raise OSError("no network in this test")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = call
import atexit
from pathlib import Path
from edgeopt_agent.runtimes import openvino as runtime
from edgeopt_wire.manifest import Variant
from edgeopt_wire.tensor import TensorSpec
variant = Variant("v", "openvino", "fp32", "net.onnx", (TensorSpec("x", {SHAPE}, "float32"),),
                  (TensorSpec("y", (1, 5), "float32"),), "g", 30.0)
runtime.load(Path({str(file)!r}), variant).close()
assert not [name for name in sys.modules if name.startswith("openvino_telemetry") and sys.modules[name]]
assert not calls, calls
"""
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name], "it left files in the home folder"


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnsupportedError, match=r"edgeopt-agent\[openvino\]"):
        runtime.version()
