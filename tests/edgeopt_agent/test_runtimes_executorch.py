# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt_agent.runtimes import executorch as runtime
from edgeopt_wire.errors import RuntimeFailure, StoreError, UnsupportedError
from edgeopt_wire.manifest import Variant
from edgeopt_wire.tensor import TensorSpec

pytest.importorskip("executorch")

TINY = Path(__file__).parent / "data/tiny.pte"  # made by data/make_tiny_pte.py
X = TensorSpec("args_0", (1, 3, 8, 8), "float32", "NCHW")
Y = TensorSpec("linear", (1, 5), "float32")
VARIANT = Variant("v", "executorch", "fp32", "tiny.pte", (X,), (Y,), "g", 30.0)
IMAGE = np.random.default_rng(5).normal(size=X.shape).astype(np.float32)


def test_model_says_what_pytorch_says() -> None:
    torch = pytest.importorskip("torch")
    sys.path.insert(0, str(TINY.parent))
    from make_tiny_pte import network

    found = runtime.load(TINY, VARIANT).run({"args_0": IMAGE})["linear"]
    with torch.no_grad():
        expected = network()(torch.from_numpy(IMAGE)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)  # float32 sums in another order


def test_an_answer_is_not_overwritten_by_the_next_run() -> None:
    session = runtime.load(TINY, VARIANT)
    first = session.run({"args_0": IMAGE})["linear"]
    kept = first.copy()
    session.run({"args_0": -IMAGE})
    np.testing.assert_array_equal(first, kept)


def test_an_array_that_cannot_be_written_or_is_strided_is_taken() -> None:
    session = runtime.load(TINY, VARIANT)
    strided = np.asfortranarray(IMAGE)
    strided.flags.writeable = False
    np.testing.assert_array_equal(
        session.run({"args_0": strided})["linear"], session.run({"args_0": IMAGE})["linear"]
    )


def test_sessions_of_other_threads_take_turns_and_each_gets_its_own() -> None:
    counts = []
    sessions = [runtime.load(TINY, replace(VARIANT, id=f"t{n}", threads=n)) for n in (1, 2)]
    for session in (*sessions, *sessions):
        session.run({"args_0": IMAGE})
        counts.append(runtime._library()._threadpool_get_thread_count())
    assert counts == [1, 2, 1, 2]


def test_runs_from_several_threads_of_python_agree() -> None:
    sessions = [runtime.load(TINY, replace(VARIANT, id=f"t{n}", threads=n)) for n in (1, 2)]
    expected = sessions[0].run({"args_0": IMAGE})["linear"]
    found: list[np.ndarray] = []

    def work(session: object) -> None:
        found.extend(session.run({"args_0": IMAGE})["linear"] for _ in range(20))  # type: ignore[attr-defined]

    workers = [threading.Thread(target=work, args=(session,)) for session in (*sessions, *sessions)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 80
    for outputs in found:
        np.testing.assert_allclose(outputs, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accelerator": "npu"}, "asks for the accelerator 'npu'.*offers cpu"),
        ({"options": {"xnnpack": "off"}}, "unknown option 'xnnpack'"),
        ({"minimum_runtime": "99.0"}, "needs executorch 99.0 or newer"),
        ({"inputs": (replace(X, shape=(1, 3, 9, 8)),)}, r"'args_0'.*\(1, 3, 9, 8\).*the file has float32"),
        ({"outputs": (replace(Y, dtype="int8"),)}, "'linear': the manifest says int8.*has float32"),
        ({"inputs": (X, replace(X, name="more"))}, "says 2 inputs, the file has 1"),
    ],
)
def test_variant_that_the_file_or_library_does_not_fit_is_refused(change: dict, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        runtime.load(TINY, replace(VARIANT, **change))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no .pte program"),
        (b"PK" * 200, "is no .pte program"),
        (TINY.read_bytes()[:-100], "it is cut off"),
        (TINY.read_bytes()[:64] + b"\xff" * (TINY.stat().st_size - 64), "cannot load bad.pte"),
    ],
)
def test_damaged_file_is_a_runtime_failure(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "bad.pte").write_bytes(content)
    with pytest.raises(RuntimeFailure, match=said):
        runtime.load(tmp_path / "bad.pte", VARIANT)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none\.pte"):
        runtime.load(tmp_path / "none.pte", VARIANT)


def test_closed_session_says_so_and_closing_twice_is_harmless() -> None:
    session = runtime.load(TINY, VARIANT)
    session.close()
    session.close()
    with pytest.raises(RuntimeFailure, match="closed"):
        session.run({"args_0": IMAGE})


def test_without_its_library_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['executorch.extension.pybindings._C'] = None\n"
        "from edgeopt_agent.runtimes import executorch\n"
        "try:\n    executorch.version()\nexcept Exception as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "install edgeopt-agent[executorch]" in done.stdout


def test_the_library_brings_no_exporter_along_and_writes_nothing() -> None:
    code = (
        "import sys\n"
        "from dataclasses import replace\n"
        "from edgeopt_agent.runtimes import executorch\n"
        "assert 'torch' not in sys.modules\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_runtimes_executorch import IMAGE, TINY, VARIANT\n"
        "for threads in (1, 2):\n"
        "    executorch.load(TINY, replace(VARIANT, threads=threads)).run({'args_0': IMAGE})\n"
        "print('executorch.exir' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert done.stderr == ""
