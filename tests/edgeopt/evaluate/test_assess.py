# SPDX-License-Identifier: Apache-2.0
"""One question for any task: what a manifest keeps, what is judged, and what is refused before a build."""

from pathlib import Path

import numpy as np
import pytest

from edgeopt.evaluate.assess import Evaluation, assess, refer
from edgeopt.evaluate.metrics import compare, judge_drop
from edgeopt.evaluate.outputs import Outputs
from edgeopt_wire import seam
from edgeopt_wire.document import from_json, to_bytes
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.manifest import Quality
from edgeopt_wire.tensor import Affine, TensorSpec

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(300, 8)).astype(np.float32)
LABELS = np.where(RNG.random(300) < 0.8, LOGITS.argmax(1), 0)
NOISY = (LOGITS + RNG.normal(scale=0.2, size=LOGITS.shape)).astype(np.float32)


def _outputs(array: np.ndarray, labels: np.ndarray | None) -> Outputs:
    return Outputs({"y": array}, labels)


def test_class_labels_mean_classification_and_say_what_the_plain_comparison_says() -> None:
    base, candidate = _outputs(LOGITS, LABELS), _outputs(NOISY, LABELS)
    found = assess(refer(base, Evaluation()), candidate, max_drop=0.05)
    assert found.quality == compare(base, candidate)
    assert found.verdict == judge_drop(base, candidate, 0.05)
    assert [figure.name for figure in found.figures] == ["top1", "top5"]
    told = found.figures[0].interval
    assert told is not None
    assert told.low < found.figures[0].value < told.high
    assert found.interval == (round(told.low, 4), round(told.high, 4))
    assert found.fidelity.kl is not None
    assert found.fidelity.kl > 0


def test_the_very_same_outputs_need_no_more_samples() -> None:
    base = _outputs(LOGITS[:12], LABELS[:12])
    same = assess(refer(base, Evaluation()), base, max_drop=0.0)
    almost = assess(refer(base, Evaluation()), _outputs(LOGITS[:12] * 1.0001, LABELS[:12]), max_drop=0.01)
    assert same.fidelity.is_equal
    assert [figure.verdict.answer for figure in same.figures] == ["met", "within noise"]
    assert almost.verdict is not None
    assert almost.verdict.answer == "cannot be told"


def test_without_labels_there_is_fidelity_only() -> None:
    base = _outputs(LOGITS, None)
    found = assess(refer(base, Evaluation()), _outputs(NOISY, None), max_drop=0.01)
    assert (found.figures, found.verdict, found.interval) == ((), None, None)
    assert found.quality == compare(base, _outputs(NOISY, None))


def test_labels_that_nobody_asked_for_are_not_guessed_at() -> None:
    targets = RNG.normal(size=300)
    assert refer(_outputs(LOGITS[:, :1], targets), Evaluation()).task is None
    assert refer(_outputs(LOGITS, targets), Evaluation()).task is None


def test_another_figure_of_the_task_can_be_the_judged_one() -> None:
    targets = LOGITS[:, :1] + RNG.normal(scale=0.3, size=(300, 1))
    reference = refer(_outputs(LOGITS[:, :1], targets), Evaluation("regression", "r2"))
    found = assess(reference, _outputs(NOISY[:, :1], targets), max_drop=0.5, relative=True)
    assert [figure.name for figure in found.figures] == ["r2", "mae", "rmse"]
    assert found.quality.metric == "r2"
    assert found.verdict is not None
    assert found.verdict.answer == "met"
    assert [figure.verdict.answer for figure in found.figures[1:]] == ["worse", "worse"]


def test_figures_that_are_no_shares_keep_their_size_in_the_manifest() -> None:
    small = 1e-5 * LOGITS[:, :1]
    reference = refer(_outputs(small, np.zeros((300, 1)) + 0.5), Evaluation("regression"))
    found = assess(reference, _outputs(small / 2, np.zeros((300, 1)) + 0.5))
    assert found.quality.value == float(f"{np.abs(small / 2 - 0.5).mean():.6g}")
    assert from_json(Quality, {"samples": 300, "value": found.quality.value}).value == found.quality.value


def test_a_candidate_without_numbers_meets_nothing_and_still_makes_a_manifest() -> None:
    targets = LOGITS[:, :1]
    broken = np.where(np.arange(300)[:, None] == 7, np.nan, NOISY[:, :1]).astype(np.float32)
    found = assess(
        refer(_outputs(LOGITS[:, :1] + 1, targets), Evaluation("regression")),
        _outputs(broken, targets),
        max_drop=100.0,
    )
    assert found.verdict is not None
    assert (found.verdict.answer, found.quality.value, found.fidelity.not_finite) == ("not met", None, 1)
    assert b'"value":null' in to_bytes(found.quality)


def test_the_scale_of_the_candidates_output_reaches_the_clipping_alarm() -> None:
    scale = 1 / 127
    clipped = (np.clip(np.rint(LOGITS / scale), -128, 127) * scale).astype(np.float32)
    spec = TensorSpec("y", (1, 8), "int8", affine=Affine(scale, 0))
    found = assess(refer(_outputs(LOGITS, None), Evaluation()), _outputs(clipped, None), specs=(spec,))
    assert found.fidelity.clipped_share > 0.5


def test_a_recipe_is_refused_before_anything_begins(tmp_path: Path) -> None:
    read = from_json(Evaluation, {"task": "detection", "options": {"form": "yolo", "suppress": 0.6}})
    assert read.options == {"form": "yolo", "suppress": 0.6}
    with pytest.raises(RecipeError, match="unknown task 'detektion'; did you mean 'detection'"):
        Evaluation("detektion")
    with pytest.raises(RecipeError, match="unknown option 'from'; did you mean 'form'"):
        Evaluation("detection", options={"from": "yolo"})
    with pytest.raises(RecipeError, match="there is no such file"):
        Evaluation(f"{tmp_path}/own.py:metric")
    with pytest.raises(RecipeError, match="belong to a task"):
        Evaluation(metric="top1")
    with pytest.raises(RecipeError, match="unknown metric 'top6'"):
        refer(_outputs(LOGITS, LABELS), Evaluation("classification", "top6"))


@pytest.mark.parametrize("name", seam.names("edgeopt.evaluate.tasks"))
def test_every_task_has_what_the_folder_promises(name: str) -> None:
    module = seam.load("edgeopt.evaluate.tasks", name)
    assert (module.__doc__ or "").strip()
    assert (module.Options.__doc__ or "").strip()
    assert module.Options.__dataclass_params__.frozen
    assert list(module.score.__annotations__)[:3] == ["outputs", "baseline", "options"]
