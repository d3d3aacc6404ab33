# SPDX-License-Identifier: Apache-2.0
"""Figures with known answers, and a verdict that says when a sample cannot tell."""

from pathlib import Path

import numpy as np
import pytest

from edgeopt.evaluate import outputs as outputs_module
from edgeopt.evaluate.metrics import SQNR_CEILING_DB, compare, judge_drop, wilson
from edgeopt.evaluate.outputs import Outputs, collect
from edgeopt.evaluate.samples import random_samples
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec


def _answers(classes: list[int], labels: list[int] | None = None, width: int = 4) -> Outputs:
    logits = np.eye(width, dtype=np.float32)[classes]
    return Outputs({"y": logits}, None if labels is None else np.array(labels))


def test_identical_outputs_agree_and_have_no_noise() -> None:
    quality = compare(_answers([0, 1, 2]), _answers([0, 1, 2]))
    assert (quality.agreement, quality.sqnr_db, quality.samples) == (1.0, SQNR_CEILING_DB, 3)


def test_sqnr_of_a_tenth_is_twenty_decibels() -> None:
    base = Outputs({"y": np.ones((5, 3), np.float32)}, None)
    assert compare(base, Outputs({"y": np.full((5, 3), 1.1, np.float32)}, None)).sqnr_db == pytest.approx(
        20, abs=0.05
    )


def test_top1_needs_labels_and_agreement_does_not() -> None:
    quality = compare(_answers([0, 1, 2, 3], [0, 1, 2, 2]), _answers([0, 1, 0, 3], [0, 1, 2, 2]))
    assert (quality.metric, quality.baseline_value, quality.value, quality.agreement) == (
        "top1",
        0.75,
        0.5,
        0.75,
    )


def test_labels_outside_of_the_classes_are_refused() -> None:
    with pytest.raises(RecipeError, match="labels run from 0 to 9, the model has the classes 0 to 3"):
        compare(_answers([0, 1], [0, 9]), _answers([0, 1], [0, 9]))


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_candidate_that_gives_no_numbers_ranks_last_and_a_baseline_that_does_is_refused(odd: float) -> None:
    good = Outputs({"y": np.ones((3, 4), np.float32)}, None)
    bad = Outputs({"y": np.full((3, 4), odd, np.float32)}, None)
    assert compare(good, bad).sqnr_db == -SQNR_CEILING_DB
    with pytest.raises(RecipeError, match="NaN or infinity in output 'y'"):
        compare(bad, good)


def test_wilson_interval_of_a_known_case() -> None:
    low, high = wilson(0.9, 20)
    assert (round(low, 3), round(high, 3)) == (0.699, 0.972)


def test_a_small_sample_cannot_tell_one_point() -> None:
    labels = [0] * 100
    verdict = judge_drop(_answers([0] * 100, labels), _answers([0] * 99 + [1], labels), 0.01)
    assert verdict is not None
    assert verdict.answer == "cannot be told"
    assert verdict.samples_needed is not None
    assert verdict.samples_needed > 100
    assert "would tell" in verdict.sentence()


def test_a_large_sample_tells_both_ways() -> None:
    n = 10_000
    labels = [0] * n
    base = _answers([0] * n, labels)
    same = judge_drop(base, _answers([0] * n, labels), 0.01)
    worse = judge_drop(base, _answers([0] * (n - 500) + [1] * 500, labels), 0.01)
    assert same is not None
    assert worse is not None
    assert (same.answer, worse.answer) == ("met", "not met")


def test_without_labels_there_is_no_verdict() -> None:
    assert judge_drop(_answers([0]), _answers([0]), 0.01) is None


def test_collected_outputs_survive_a_file(tmp_path: object) -> None:
    samples = random_samples((TensorSpec("x", (1, 4), "float32"),), 6, seed=1)
    found = collect(lambda inputs: {"double": 2 * inputs["x"]}, samples)
    path = Path(str(tmp_path)) / "outputs.npz"
    found.save(path)
    again = Outputs.load(path)
    np.testing.assert_array_equal(found.arrays["double"], again.arrays["double"])
    assert found.arrays["double"].shape == (6, 4)
    assert again.labels is None


def test_an_output_whose_first_axis_is_no_batch_is_kept_whole() -> None:
    samples = random_samples((TensorSpec("x", (1, 4), "float32"),), 3, seed=1)
    found = collect(
        lambda inputs: {"state": np.ones((2, 1, 5)), "flag": np.float32(1), "y": inputs["x"]}, samples
    )
    assert {name: array.shape for name, array in found.arrays.items()} == {
        "state": (3, 2, 1, 5),
        "flag": (3,),
        "y": (3, 4),
    }


def test_large_outputs_lie_in_files_and_give_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = random_samples((TensorSpec("x", (1, 6), "float32"),), 40, seed=2)

    def run(scale: float) -> Outputs:
        return collect(
            lambda inputs: {"y": inputs["x"], "large": scale * np.tile(inputs["x"], (1, 7))}, samples
        )

    plain = compare(run(1.0), run(1.1))
    monkeypatch.setattr(outputs_module, "IN_MEMORY_BYTES", 40 * 6 * 4)
    found = []
    for number, scale in enumerate((1.0, 1.1)):
        collected = run(scale)
        assert isinstance(collected.arrays["large"], np.memmap)
        assert not isinstance(collected.arrays["y"], np.memmap)
        collected.save(tmp_path / f"{number}.npz")
        found.append(Outputs.load(tmp_path / f"{number}.npz"))
        assert isinstance(found[-1].arrays["large"], np.memmap)
        np.testing.assert_array_equal(found[-1].arrays["large"], collected.arrays["large"])
    assert compare(*found) == plain
