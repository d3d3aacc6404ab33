# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt_agent import runtimes
from edgeopt_agent.model import open_model
from edgeopt_agent.runtimes import null
from edgeopt_wire.errors import RecipeError, RuntimeFailure, StoreError, UnsupportedError
from edgeopt_wire.manifest import Variant
from edgeopt_wire.tensor import Affine, TensorSpec

X = TensorSpec("x", (1, 7), "float32")
Y = TensorSpec("y", (1, 3), "float32")
VARIANT = Variant("v", "null", "fp32", "m.json", (X,), (Y,), "g", 30.0)


@pytest.mark.parametrize(
    "module", ["edgeopt_agent.probe", "edgeopt_agent.model", "edgeopt_agent.runtimes.null"]
)
def test_importing_the_agents_side_of_a_runtime_loads_no_numpy(module: str) -> None:
    heavy = "{'numpy', 'onnxruntime', 'ai_edge_litert', 'tflite_runtime'}"
    script = f"import sys, {module}, edgeopt_agent.runtimes.onnxruntime, edgeopt_agent.runtimes.litert; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_folder_is_the_registry() -> None:
    assert {"null", "onnxruntime", "litert"} <= set(runtimes.names())


def test_unknown_runtime_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnsupportedError, match="did you mean 'onnxruntime'"):
        runtimes.find("onnxruntim")


def test_null_model_computes_group_means_as_documented(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text('{"schema":"edgeopt.null-model/1","gain":2.0,"bias":1.0}')
    session = null.load(file, VARIANT)
    found = session.run({"x": np.arange(7, dtype=np.float32).reshape(1, 7)})["y"]
    np.testing.assert_array_equal(found, [[2 * 1 + 1, 2 * 3.5 + 1, 2 * 5.5 + 1]])  # groups 0-2, 3-4, 5-6


def test_null_model_of_integers_rounds_and_clips(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text('{"schema":"edgeopt.null-model/1","gain":100.0}')
    own = replace(VARIANT, outputs=(TensorSpec("y", (1, 3), "int8", affine=Affine(0.1, 0)),))
    assert null.load(file, own).run({"x": np.ones((1, 7), np.float32) * 2})["y"].tolist() == [[127, 127, 127]]


def test_closed_session_says_so_and_closing_twice_is_harmless(tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text('{"schema":"edgeopt.null-model/1"}')
    session = null.load(file, VARIANT)
    session.close()
    session.close()
    with pytest.raises(RuntimeFailure, match="closed"):
        session.run({"x": np.zeros((1, 7), np.float32)})


@pytest.mark.parametrize("content", ["{}", '{"schema":"edgeopt.null-model/1","latency":3}', "not json"])
def test_file_that_is_no_null_model_is_a_runtime_failure(tmp_path: Path, content: str) -> None:
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(RuntimeFailure, match=r"cannot load m\.json"):
        null.load(tmp_path / "m.json", VARIANT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"minimum_runtime": "1.1"}, "needs null 1.1 or newer"),
        ({"minimum_runtime": "2"}, "needs null 2 or newer"),
        ({"accelerator": "gpu"}, "asks for the accelerator 'gpu'.*offers cpu"),
        ({"options": {"speed": "high"}}, "unknown option 'speed'"),
    ],
)
def test_variant_that_cannot_run_as_asked_is_refused(tmp_path: Path, change: dict, said: str) -> None:
    (tmp_path / "m.json").write_text('{"schema":"edgeopt.null-model/1"}')
    with pytest.raises(UnsupportedError, match=said):
        null.load(tmp_path / "m.json", replace(VARIANT, **change))


@pytest.mark.parametrize(
    ("found", "minimum"), [("1.10.0", "1.9"), ("1.9", "1.9"), ("2.0rc1", "1.99"), ("1.20.0+cu12", "1.20")]
)
def test_versions_are_compared_by_number_not_by_text(found: str, minimum: str) -> None:
    runtimes.check_variant(
        replace(VARIANT, minimum_runtime=minimum), version=found, accelerators=("cpu",), options={}
    )


def test_version_that_is_older_in_a_later_number_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"needs null 1\.9\.1"):
        runtimes.check_variant(
            replace(VARIANT, minimum_runtime="1.9.1"), version="1.9.0", accelerators=("cpu",), options={}
        )


def test_open_model_speaks_the_signatures_names(tmp_path: Path, make_package) -> None:
    manifest = make_package(tmp_path, {"a": {}})
    image = np.random.default_rng(1).normal(size=(1, 2, 4, 4)).astype(np.float32)
    with open_model(tmp_path, manifest, "a") as model:
        found = model.infer({"image": image})
        with pytest.raises(RecipeError, match="expected the inputs"):
            model.infer({"picture": image})
    np.testing.assert_allclose(found["scores"][0], image.reshape(4, 8).mean(axis=1), rtol=1e-6)


def test_open_model_of_an_unknown_variant_lists_the_known_ones(tmp_path: Path, make_package) -> None:
    manifest = make_package(tmp_path, {"fp32-t1": {}, "fp32-t2": {}})
    with pytest.raises(RecipeError, match="did you mean 'fp32-t2' or 'fp32-t1'"):
        open_model(tmp_path, manifest, "fp32-t3")


def test_open_model_without_its_file_says_to_install_again(tmp_path: Path, make_package) -> None:
    manifest = make_package(tmp_path, {"a": {}})
    (tmp_path / "variants/a.json").unlink()
    with pytest.raises(StoreError, match="install the package again"):
        open_model(tmp_path, manifest, "a")
