# SPDX-License-Identifier: Apache-2.0
"""The search finds a small set, keeps the best on disk at every moment, and goes on where it was killed."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeopt import search as subject
from edgeopt_wire.document import from_bytes

ORDER = tuple(f"op{number}" for number in range(16))
NEEDED = {"op1", "op6"}


def _file(tag: str) -> bytes:
    """A real ONNX file, named after what was tried."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], tag or "none")], "net", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


def _trial(tried: list[tuple[str, ...]], needed: set[str] | None = None) -> subject.Trial:
    wanted = NEEDED if needed is None else needed

    def make(floats: tuple[str, ...]) -> bytes:
        tried.append(floats)
        return _file(",".join(floats))

    def judge(file: bytes) -> tuple[float, float]:
        floats = set(onnx.load_from_string(file).graph.node[0].name.split(","))
        return 0.01 * len(wanted - floats), 20.0 + len(wanted & floats)

    macs = {name: 100 - number for number, name in enumerate(ORDER)}

    def relative_time(file: bytes) -> float:
        return 0.5 + 0.01 * len(onnx.load_from_string(file).graph.node[0].name.split(","))

    return subject.Trial(ORDER, macs, 0.005, make, judge, relative_time)


def test_only_what_is_needed_stays_in_floats(tmp_path: Path) -> None:
    tried: list[tuple[str, ...]] = []
    found = subject.search(_trial(tried), tmp_path, "key")
    assert found.finished
    assert found.best is not None
    assert set(found.best.floats) == NEEDED
    assert len(found.points) == len(tried) <= subject.MAX_TRIES
    assert onnx.load(tmp_path / subject.BEST).graph.node[0].name == ",".join(found.best.floats)


def test_integers_everywhere_are_taken_where_they_do(tmp_path: Path) -> None:
    found = subject.search(_trial([], set()), tmp_path, "key")
    assert [point.floats for point in found.points] == [()]
    assert found.best is not None
    assert found.best.kept


def test_what_cannot_be_met_gives_the_nearest(tmp_path: Path) -> None:
    found = subject.search(_trial([], {"op1", "elsewhere"}), tmp_path, "key")
    assert found.best is not None
    assert not found.best.kept
    assert "op1" in found.best.floats
    assert found.best.drop == pytest.approx(0.01)


def test_an_interrupted_search_tries_nothing_twice(tmp_path: Path) -> None:
    tried: list[tuple[str, ...]] = []
    trial = _trial(tried)
    seen = []

    def stop(point: subject.Point) -> None:
        seen.append(point)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        subject.search(trial, tmp_path, "key", on_try=stop)
    onnx.load(tmp_path / subject.BEST)
    found = subject.search(trial, tmp_path, "key")
    assert len(tried) == len(set(tried)) == len(found.points)
    assert found.best is not None
    assert set(found.best.floats) == NEEDED


def test_another_question_begins_again(tmp_path: Path) -> None:
    tried: list[tuple[str, ...]] = []
    subject.search(_trial(tried), tmp_path, "key")
    before = len(tried)
    subject.search(_trial(tried), tmp_path, "other key")
    assert len(tried) == 2 * before


def test_a_damaged_journal_begins_again(tmp_path: Path) -> None:
    (tmp_path / subject.JOURNAL).write_bytes(b'{"schema": "edgeopt.search/1", "poi')
    assert subject.search(_trial([]), tmp_path, "key").finished


@pytest.mark.parametrize("kill_after", [1, 3, 5])
def test_killed_at_any_time_leaves_a_loadable_best_and_resumes(tmp_path: Path, kill_after: int) -> None:
    """SIGKILL in the middle of writing: the next file is half-written when the process dies."""
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import test_search as t
        from edgeopt import search as subject

        count = 0
        write = subject._replace

        def dying(path, data):
            global count
            count += 1
            if count > {kill_after}:
                path.with_suffix(path.suffix + ".half").write_bytes(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, data)

        subject._replace = dying
        subject.search(t._trial([]), Path({str(tmp_path)!r}), "key")
    """)
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr.decode()
    onnx.checker.check_model(onnx.load(tmp_path / subject.BEST))
    if (tmp_path / subject.JOURNAL).exists():
        from_bytes(subject.Journal, (tmp_path / subject.JOURNAL).read_bytes())
    found = subject.search(_trial([]), tmp_path, "key")
    assert found.best is not None
    assert set(found.best.floats) == NEEDED


def test_a_file_is_timed_against_the_float_file() -> None:
    """Forty matrix products against one: the ratio is far from 1 on any machine."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [256, 256])

    def product(count: int) -> bytes:
        nodes = [
            helper.make_node("MatMul", [f"t{n}" if n else "x", "x"], [f"t{n + 1}"]) for n in range(count)
        ]
        y = helper.make_tensor_value_info(f"t{count}", TensorProto.FLOAT, [256, 256])
        model = helper.make_model(
            helper.make_graph(nodes, "net", [x], [y]),
            opset_imports=[helper.make_opsetid("", 18)],
            ir_version=8,
        )
        return bytes(model.SerializeToString())

    assert subject.relative_time(product(1), product(40), {"x": np.zeros((256, 256), np.float32)}) > 3
