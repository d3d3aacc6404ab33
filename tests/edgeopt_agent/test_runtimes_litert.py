# SPDX-License-Identifier: Apache-2.0
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt_agent.runtimes import litert as runtime
from edgeopt_wire.errors import RuntimeFailure, UnsupportedError
from edgeopt_wire.manifest import Variant
from edgeopt_wire.tensor import Affine, TensorSpec

pytest.importorskip("ai_edge_litert")

TINY = Path(__file__).parent / "data/tiny.tflite"  # made by data/make_tiny_tflite.py
X = TensorSpec("args_0", (1, 8, 8, 3), "float32", "NHWC")
Y = TensorSpec("output_0", (1, 5), "float32")
VARIANT = Variant("v", "litert", "fp32", "tiny.tflite", (X,), (Y,), "g", 30.0)
IMAGE = np.random.default_rng(5).normal(size=X.shape).astype(np.float32)


def test_model_runs_by_the_names_of_its_signature() -> None:
    session = runtime.load(TINY, VARIANT)
    first = session.run({"args_0": IMAGE})["output_0"]
    assert first.shape == (1, 5)
    assert np.isfinite(first).all()
    assert not np.array_equal(first, session.run({"args_0": -IMAGE})["output_0"])


def test_model_runs_by_the_names_of_its_tensors() -> None:
    by_tensor = replace(
        VARIANT,
        inputs=(replace(X, name="serving_default_args_0"),),
        outputs=(replace(Y, name="serving_default_output_0_output"),),
    )
    found = runtime.load(TINY, by_tensor).run({"serving_default_args_0": IMAGE})
    expected = runtime.load(TINY, VARIANT).run({"args_0": IMAGE})
    np.testing.assert_array_equal(found["serving_default_output_0_output"], expected["output_0"])


def test_an_answer_is_not_overwritten_by_the_next_run() -> None:
    session = runtime.load(TINY, VARIANT)
    first = session.run({"args_0": IMAGE})["output_0"]
    kept = first.copy()
    session.run({"args_0": -IMAGE})
    np.testing.assert_array_equal(first, kept)


def test_kernels_with_and_without_xnnpack_agree() -> None:
    plain = runtime.load(TINY, replace(VARIANT, options={"xnnpack": "off"})).run({"args_0": IMAGE})
    fast = runtime.load(TINY, replace(VARIANT, threads=2)).run({"args_0": IMAGE})
    np.testing.assert_allclose(
        plain["output_0"], fast["output_0"], atol=1e-5
    )  # float32 sums in another order


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accelerator": "edgetpu"}, "edgetpu"),
        ({"accelerator": "cuda"}, "'cuda'.*offers cpu"),
        ({"options": {"delegate": "gpu"}}, "unknown option 'delegate'"),
        ({"options": {"xnnpack": "yes"}}, "must be one of on, off"),
        ({"minimum_runtime": "99.0"}, "needs litert 99.0 or newer"),
        ({"inputs": (replace(X, name="pixels"),)}, r"inputs \['pixels'\], the file has"),
        (
            {"inputs": (replace(X, shape=(1, 3, 8, 8), layout="NCHW"),)},
            r"manifest says float32 \(1, 3, 8, 8\)",
        ),
        ({"outputs": (replace(Y, dtype="int8", affine=Affine(0.1, 0)),)}, "manifest says int8"),
    ],
)
def test_variant_that_cannot_run_as_asked_is_refused(change: dict, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        runtime.load(TINY, replace(VARIANT, **change))


def test_file_not_compiled_for_the_edge_tpu_is_refused_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "accelerators", lambda: ("cpu", "edgetpu"))
    with pytest.raises(UnsupportedError, match="compile it with edgetpu_compiler"):
        runtime.load(TINY, replace(VARIANT, accelerator="edgetpu"))


def test_damaged_file_is_a_runtime_failure(tmp_path: Path) -> None:
    (tmp_path / "m.tflite").write_bytes(b"\x1c\0\0\0TFL3" + b"\0" * 64)
    with pytest.raises(RuntimeFailure, match=r"cannot load m\.tflite"):
        runtime.load(tmp_path / "m.tflite", VARIANT)


def test_wrong_input_at_run_time_is_a_runtime_failure_and_closing_twice_harmless() -> None:
    session = runtime.load(TINY, VARIANT)
    with pytest.raises(RuntimeFailure, match="LiteRT failed on variant v"):
        session.run({"args_0": IMAGE.astype(np.int8)})
    session.close()
    session.close()
    with pytest.raises(RuntimeFailure, match="closed"):
        session.run({"args_0": IMAGE})


def test_neither_library_installed_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", None)
    with pytest.raises(UnsupportedError, match=r"edgeopt-agent\[litert\]"):
        runtime.version()


@pytest.mark.skipif("EDGEOPT_DATA" not in os.environ, reason="EDGEOPT_DATA names no data")
def test_mlperf_tiny_resnet_in_int8_answers_as_in_float() -> None:
    folder = Path(os.environ["EDGEOPT_DATA"]) / "mlperf-tiny"
    x8 = TensorSpec("input_1_int8", (1, 32, 32, 3), "int8", "NHWC", Affine(1.0, -128))
    y8 = TensorSpec("Identity_int8", (1, 10), "int8", affine=Affine(1 / 256, -128))
    quantized = runtime.load(
        folder / "pretrainedResnet_quant.tflite", replace(VARIANT, inputs=(x8,), outputs=(y8,))
    )
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3))
    found = quantized.run({"input_1_int8": (pixels - 128).astype(np.int8)})["Identity_int8"]
    probabilities = (found.astype(np.float32) + 128) / 256
    assert abs(probabilities.sum() - 1) < 0.05  # a softmax, rounded to 1/256 ten times
