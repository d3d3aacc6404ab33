# SPDX-License-Identifier: Apache-2.0
"""The search finds a small set, keeps the best on disk at every moment, and goes on where it was killed."""

from pathlib import Path
from typing import Any

import killed_search
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeopt import search as subject
from edgeopt.side_by_side import loaded, relative_time
from edgeopt_wire.document import from_bytes
from edgeopt_wire.errors import RecipeError, RuntimeFailure
from edgeopt_wire.tensor import TensorSpec

ORDER = tuple(f"op{number}" for number in range(16))
NEEDED = {"op1", "op6"}


def _file(tag: str) -> bytes:
    """A real ONNX file, named after what was tried; as large as its levels make it."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], tag or "none")], "net", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    model.doc_string = " " * (
        2000 + 200 * tag.count("fp32") + 100 * tag.count("fp16") - 100 * tag.count("int4")
    )
    return bytes(model.SerializeToString())


def _trial(
    tried: list[subject.Changes],
    needed: set[str] | None = None,
    knobs: dict[str, dict[str, tuple[str, ...]]] | None = None,
) -> subject.Trial:
    """A float costs a hundredth of time and of bytes; the drop is a hundredth for each needed operator in integers."""
    wanted = NEEDED if needed is None else needed

    def make(changes: subject.Changes) -> bytes:
        tried.append(changes)
        if any(change.level == "refused" for change in changes):
            raise RuntimeFailure("no such kernel")
        return _file(",".join(f"{change.operator}={change.level}" for change in changes))

    def levels(file: bytes) -> dict[str, str]:
        name = onnx.load_from_string(file).graph.node[0].name
        return dict(part.split("=") for part in name.split(",")) if name != "none" else {}

    def judge(file: bytes) -> subject.Judged:
        raised = {name for name, level in levels(file).items() if level != "int4"}
        lowered = sum(level == "int4" and name != "op9" for name, level in levels(file).items())
        return subject.Judged(0.01 * len(wanted - raised) + 0.01 * lowered, 20.0 + len(wanted & raised))

    def relative_time(file: bytes) -> tuple[float, bool]:
        cost = {"fp32": 0.04, "int16": 0.5, "fp16": 0.01, "int4": 0.0, "refused": 0.0}
        return 0.5 + sum(cost[level] for level in levels(file).values()), False

    of = knobs or {}
    return subject.Trial(
        tuple(subject.Knob(name, macs=100 - n, bytes=n, **of.get(name, {})) for n, name in enumerate(ORDER)),
        subject.Goal("drop", 0.005),
        make,
        judge,
        relative_time,
    )


def _names(point: subject.Point | None) -> set[str]:
    assert point is not None
    return {change.operator for change in point.changes}


def _levels(point: subject.Point | None) -> dict[str, str]:
    assert point is not None
    return {change.operator: change.level for change in point.changes}


def test_only_what_is_needed_stays_in_floats(tmp_path: Path) -> None:
    tried: list[subject.Changes] = []
    found = subject.search(_trial(tried), tmp_path, "key")
    assert found.finished
    assert _names(found.best) == NEEDED
    assert len(found.points) == len(tried) <= subject.MAX_TRIES
    best = onnx.load(tmp_path / subject.BEST).graph.node[0].name
    assert {part.split("=")[0] for part in best.split(",")} == NEEDED


def test_integers_everywhere_are_taken_where_they_do(tmp_path: Path) -> None:
    found = subject.search(_trial([], set()), tmp_path, "key")
    assert [point.changes for point in found.points] == [()]
    assert found.best is not None
    assert found.best.kept


def test_what_cannot_be_met_gives_the_nearest(tmp_path: Path) -> None:
    found = subject.search(_trial([], {"op1", "elsewhere"}), tmp_path, "key")
    assert found.best is not None
    assert not found.best.kept
    assert "op1" in _names(found.best)
    assert found.best.judged.drop == pytest.approx(0.01)


def test_a_cheaper_level_between_is_taken_and_a_slow_one_is_not(tmp_path: Path) -> None:
    above = {name: {"above": ("int16", "fp16", "fp32")} for name in ORDER}
    found = subject.search(_trial([], knobs=above), tmp_path, "key", max_tries=60)
    assert _levels(found.best) == dict.fromkeys(NEEDED, "fp16")


def test_a_level_that_was_no_better_twice_is_not_tried_again(tmp_path: Path) -> None:
    above = {name: {"above": ("int16", "fp32")} for name in ORDER}
    tried: list[subject.Changes] = []
    subject.search(_trial(tried, needed=set(ORDER[:6]), knobs=above), tmp_path, "key", max_tries=60)
    slow = [changes for changes in tried if any(change.level == "int16" for change in changes)]
    assert len(slow) == subject.REFUSED


def test_four_bits_are_taken_where_the_goal_is_still_kept(tmp_path: Path) -> None:
    """Of three operators that could have them, one bears it."""
    below = {name: {"below": ("int4",)} for name in ("op8", "op9", "op10")}
    found = subject.search(_trial([], set(), below), tmp_path, "key")
    assert _levels(found.best) == {"op9": "int4"}
    assert onnx.load(tmp_path / subject.BEST).graph.node[0].name == "op9=int4"


def test_a_combination_that_is_refused_does_not_end_the_search(tmp_path: Path) -> None:
    above = {name: {"above": ("refused", "fp32")} for name in ORDER}
    found = subject.search(_trial([], knobs=above), tmp_path, "key", max_tries=60)
    assert found.finished
    assert _levels(found.best) == dict.fromkeys(NEEDED, "fp32")


def test_an_interrupted_search_tries_nothing_twice(tmp_path: Path) -> None:
    tried: list[subject.Changes] = []
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
    assert _names(found.best) == NEEDED


@pytest.mark.parametrize(
    ("goal", "loss"),
    [
        (subject.Goal("sqnr_db", 26.0), 2.5),
        (subject.Goal("drop", 0.01), 0.02),
        (subject.Goal("kl", 0.1), 0.4),
    ],
)
def test_a_goal_is_missed_by_its_own_unit(goal: subject.Goal, loss: float) -> None:
    assert goal.loss(subject.Judged(0.03, 23.5, 0.5)) == pytest.approx(loss)


def test_a_goal_without_its_figure_is_never_kept() -> None:
    assert subject.Goal("kl", 1.0).loss(subject.Judged(0.0, 90.0)) > 0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"min_sqnr_db": 26.0, "max_kl": 0.1}, "not both"),
        ({"levels": ("int5",)}, "int4"),
        ({"max_tries": 0}, "at least 1"),
    ],
)
def test_a_search_that_means_nothing_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        subject.Aim(**values)


def test_another_question_begins_again(tmp_path: Path) -> None:
    tried: list[subject.Changes] = []
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
    killed_search.run(Path(__file__), tmp_path, kill_after, "t._trial([])")
    onnx.checker.check_model(onnx.load(tmp_path / subject.BEST))
    if (tmp_path / subject.JOURNAL).exists():
        from_bytes(subject.Journal, (tmp_path / subject.JOURNAL).read_bytes())
    found = subject.search(_trial([]), tmp_path, "key")
    assert _names(found.best) == NEEDED


def test_a_file_is_timed_against_the_float_file() -> None:
    """Forty matrix products against one: the ratio is far from 1 on any machine."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [256, 256])

    def product(count: int) -> bytes:
        names = ["x", *(f"t{n}" for n in range(1, count)), "y"]
        nodes = [helper.make_node("MatMul", [names[n], "x"], [names[n + 1]]) for n in range(count)]
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [256, 256])
        model = helper.make_model(
            helper.make_graph(nodes, "net", [x], [y]),
            opset_imports=[helper.make_opsetid("", 18)],
            ir_version=8,
        )
        return bytes(model.SerializeToString())

    edges = ((TensorSpec("x", (256, 256), "float32"),), (TensorSpec("y", (256, 256), "float32"),))
    sample = {"x": np.zeros((256, 256), np.float32)}
    with (
        loaded(product(1), "onnxruntime", *edges) as one,
        loaded(product(40), "onnxruntime", *edges) as forty,
    ):
        assert relative_time(one, forty, sample) > 3
