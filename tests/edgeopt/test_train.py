# SPDX-License-Identifier: Apache-2.0
"""Training as a step of a build: kept where it is better, resumed after a kill, the same integers in every format."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgeopt import cures
from edgeopt.artifacts import Made, tool_versions
from edgeopt.cache import Cache
from edgeopt.compress import make_artifacts
from edgeopt.evaluate.assess import Evaluation
from edgeopt.evaluate.samples import Samples, load_samples
from edgeopt.onnx_graphs import fold
from edgeopt.plan import BASELINE, make_plan
from edgeopt.progress import Progress
from edgeopt.recipe import Recipe, load_recipe
from edgeopt.sources import Source, load_source
from edgeopt.sources.torch_factory import TorchModel, export
from edgeopt.train import train_artifacts
from edgeopt.training.options import Training
from edgeopt.training.session import Session
from edgeopt.validate import Question
from edgeopt.wanted import Wanted
from edgeopt.workbench import Workbench
from edgeopt_profiles.profile import load_profile
from edgeopt_wire.errors import RecipeError

ID = "onnx-int8-u8s8"
SHORT = {"steps": 30, "batch": 8, "rate": 1e-3}


@pytest.fixture(autouse=True)
def _no_cures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrected biases bring this small net above 50 dB, where 30 steps of training gain nothing."""
    monkeypatch.setattr(cures, "WORTH", 2.0)


class Net(nn.Module):  # type: ignore[misc]
    """Convolution, depthwise, pointwise, residual sum, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.deep = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.classes = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.stem(x))
        x = x + self.point(nn.functional.relu(self.deep(x)))
        scores: torch.Tensor = self.classes(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return scores


def make_source() -> Source:
    torch.manual_seed(0)
    return export(TorchModel(Net().eval(), (torch.zeros(1, 3, 16, 16),)), "net", "net")


def make_data(folder: Path, name: str, count: int, seed: int, *, labelled: bool = False) -> Samples:
    rng = np.random.default_rng(seed)
    arrays = {"x": rng.normal(0.3, 2, (count, 3, 16, 16)).astype(np.float32)}
    if labelled:
        arrays["y"] = rng.integers(0, 10, count)
    np.savez(folder / f"{name}.npz", **arrays)
    return load_samples(str(folder / f"{name}.npz"), make_source().model.inputs)


def wanted(
    folder: Path, recipe: Recipe, source: Source | None = None, **changes: Any
) -> tuple[Wanted, Workbench]:
    """A build up to where training begins, for ONNX Runtime."""
    recipe = replace(recipe, runtimes=("onnxruntime",))
    source = source or make_source()
    calibration = make_data(folder, "calibration", 48, 1, labelled=True)
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    bench = Workbench(Cache(folder / "cache"), scratch, Progress(), tool_versions())
    plan = make_plan(load_profile("host"), recipe)
    made = make_artifacts(plan, source, calibration, recipe, bench)
    found = Wanted(
        plan,
        made,
        source,
        calibration,
        make_data(folder, "evaluation", 40, 2),
        None,
        recipe,
        Question(Evaluation()),
    )
    return replace(found, **changes), bench


def always(**options: Any) -> Recipe:
    return Recipe(train=Training("always"), passes={"quantize_aware_training": {**SHORT, **options}})


def integers(made: Made) -> dict[str, np.ndarray]:
    """The int8 weights of a QDQ file."""
    program = onnx.load(made.file)
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in program.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    }


def test_a_better_trained_file_is_kept_and_the_notes_say_by_how_much(tmp_path: Path) -> None:
    asked, bench = wanted(tmp_path, always())
    found = train_artifacts(asked, bench)
    said = " ".join(found[ID].description.notes)
    assert "training kept" in said, said
    assert "on 40 evaluation samples" in said
    assert "tensors as they were learned" in said
    assert found[BASELINE] is asked.made[BASELINE]


def test_the_integers_of_the_file_are_those_that_were_trained(tmp_path: Path) -> None:
    asked, bench = wanted(tmp_path, always())
    made = train_artifacts(asked, bench)[ID]
    assert made.base is not None
    trained = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in fold(onnx.load(made.base)).graph.initializer
    }
    found = integers(made)
    assert len(found) == 4
    for name, weight in found.items():
        rows = trained[name.removesuffix("_quantized")]
        step = np.abs(rows.reshape(len(rows), -1)).max(1).reshape(-1, *[1] * (rows.ndim - 1)) / 127
        np.testing.assert_array_equal(np.rint(rows / step), weight)
        assert np.abs(rows / step - weight).max() < 1e-3


def test_the_graph_and_its_names_stay_those_of_the_model(tmp_path: Path) -> None:
    asked, bench = wanted(tmp_path, always())
    made = train_artifacts(asked, bench)[ID]
    before = asked.made[ID]
    assert before.base is not None
    assert made.base is not None
    names = [[node.name for node in fold(onnx.load(base)).graph.node] for base in (before.base, made.base)]
    assert names[0] == names[1]
    assert made.origin == before.origin


def test_a_trained_file_that_is_no_better_is_not_kept_and_the_note_says_why(tmp_path: Path) -> None:
    asked, bench = wanted(tmp_path, always(rate=10.0, range_rate=10.0, steps=4))
    found = train_artifacts(asked, bench)[ID]
    assert found.file == asked.made[ID].file
    assert "training not kept" in found.description.notes[-1]
    assert "dB" in found.description.notes[-1]


def test_without_evaluation_data_samples_that_never_taught_are_the_judges(tmp_path: Path) -> None:
    asked, bench = wanted(tmp_path, always(), evaluation=None)
    said = " ".join(train_artifacts(asked, bench)[ID].description.notes)
    assert "on 7 samples that were held out" in said


def test_more_data_is_taught_beside_the_calibration_samples(tmp_path: Path) -> None:
    asked, bench = wanted(tmp_path, always(), evaluation=None, more=make_data(tmp_path, "more", 52, 3))
    said = " ".join(train_artifacts(asked, bench)[ID].description.notes)
    assert "on 15 samples that were held out" in said


def test_an_onnx_file_is_trained_with_what_its_recipe_excludes_left_in_float(tmp_path: Path) -> None:
    asked, _ = wanted(tmp_path, Recipe())
    target = tmp_path / "net.onnx"
    target.write_bytes(asked.made[BASELINE].file.read_bytes())
    recipe = replace(always(), exclude=("role:classifier",))
    asked, bench = wanted(tmp_path, recipe, load_source(str(target), recipe))
    made = train_artifacts(asked, bench)[ID]
    assert len(integers(made)) == 3
    assert "excluded by the recipe" in " ".join(made.description.notes)


def test_an_operator_that_pytorch_has_not_leaves_the_file_as_it_was_and_is_named(tmp_path: Path) -> None:
    asked, bench = wanted(tmp_path, always())
    baseline = asked.made[BASELINE]
    program = onnx.load(baseline.file)
    last = program.graph.node[-1]
    name, last.output[0] = last.output[0], "before"
    program.graph.node.append(onnx.helper.make_node("Hardmax", ["before"], [name], "odd"))
    odd = tmp_path / "odd.onnx"
    onnx.save(program, odd)
    made = {**asked.made, BASELINE: replace(baseline, file=odd)}
    found = train_artifacts(replace(asked, made=made), bench)[ID]
    assert found.file == asked.made[ID].file
    assert "not trained" in found.description.notes[-1]
    assert "Hardmax" in found.description.notes[-1]


def test_labels_are_taught_where_the_recipe_gives_them_weight_and_asked_for_where_they_are_missing(
    tmp_path: Path,
) -> None:
    recipe = replace(always(), train=Training("always", label_weight=0.5))
    asked, bench = wanted(tmp_path, recipe)
    before = asked.made[ID]
    assert "trained for" in " ".join(train_artifacts(asked, bench)[ID].description.notes)
    unlabelled = make_data(tmp_path, "unlabelled", 40, 4)
    with pytest.raises(RecipeError, match="label_weight needs class labels, and 40 of 40"):
        train_artifacts(replace(asked, calibration=unlabelled, made={**asked.made, ID: before}), bench)


def test_nothing_is_trained_unless_asked_for_or_the_extensive_effort_missed_its_drop(tmp_path: Path) -> None:
    asked, bench = wanted(
        tmp_path, Recipe(effort="extensive"), calibration=make_data(tmp_path, "many", 64, 5)
    )
    assert train_artifacts(asked, bench) == dict(asked.made)
    easy = replace(asked, question=Question(Evaluation(), max_drop=1.0))
    assert train_artifacts(easy, bench) == dict(asked.made)
    short = replace(asked.recipe, passes={"quantize_aware_training": SHORT})
    hard = replace(asked, recipe=short, question=Question(Evaluation(), max_drop=-1.0))
    assert "train" in " ".join(train_artifacts(hard, bench)[ID].description.notes)
    never = replace(hard, recipe=replace(short, train=Training("never")))
    assert train_artifacts(never, bench) == dict(asked.made)


def test_training_that_is_asked_for_where_no_file_is_int8_is_an_error(tmp_path: Path) -> None:
    asked, bench = wanted(tmp_path, replace(always(), precisions=("fp32",)))
    with pytest.raises(RecipeError, match="makes none"):
        train_artifacts(asked, bench)


def test_fewer_bits_than_a_build_stores_are_refused(tmp_path: Path) -> None:
    asked, bench = wanted(tmp_path, always(weight_bits=4))
    with pytest.raises(RecipeError, match="weight_bits = 4"):
        train_artifacts(asked, bench)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Training()),
        ("train = true", Training("always")),
        ("train = false", Training("never")),
        ("[train]\nminutes = 3", Training("always", minutes=3)),
        ("[train]\nwhen = 'auto'", Training("auto")),
        ("[passes.quantize_aware_training]\nsteps = 5", Training("always")),
        ("train = false\n[passes.quantize_aware_training]\nsteps = 5", Training("never")),
    ],
)
def test_a_recipe_says_whether_to_train(text: str, expected: Training, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    assert load_recipe(tmp_path / "recipe.toml").train == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nminuts = 3", "minutes"),
        ("[train]\nwhen = 'alway'", "always"),
        ("[train]\nminutes = 0", "positive"),
        ("train = 3", "table"),
    ],
)
def test_a_mistake_in_the_table_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "recipe.toml")


def test_data_beside_the_recipe_is_found(tmp_path: Path) -> None:
    make_data(tmp_path, "more", 4, 1)
    (tmp_path / "recipe.toml").write_text("[train]\ndata = 'more.npz'")
    assert load_recipe(tmp_path / "recipe.toml").train.data == str(tmp_path / "more.npz")


def test_training_that_is_killed_goes_on_behind_its_last_step_and_ends_with_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL before step 21 of 60, every step saved: 40 steps are left, not 60."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    script = (
        "import importlib.util, sys, pathlib\n"
        "spec = importlib.util.spec_from_file_location('story', sys.argv[1])\n"
        "story = importlib.util.module_from_spec(spec); spec.loader.exec_module(story)\n"
        "story.train_until_killed(pathlib.Path(sys.argv[2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, __file__, str(killed)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    steps: list[int] = []
    learn = Session._learn
    monkeypatch.setattr(Session, "_learn", lambda session: (steps.append(1), learn(session))[1])
    resumed = train_slowly(killed)
    assert len(steps) == 40
    assert resumed.read_bytes() == train_slowly(whole).read_bytes()
    assert len(steps) == 40 + 60
    assert not any((killed / "cache").glob("v*/.half-*.npz"))


def train_slowly(folder: Path) -> Path:
    """Train with every step saved."""
    asked, bench = wanted(folder, always(steps=60, save_seconds=1e-6))
    return train_artifacts(asked, bench)[ID].file


def train_until_killed(folder: Path) -> None:
    """Run in a process of its own, which ends itself before step 21."""
    cures.WORTH = 2.0
    learn = Session._learn

    def learn_or_die(session: Session) -> bool:
        if session._step == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return learn(session)

    Session._learn = learn_or_die  # type: ignore[method-assign]
    train_slowly(folder)


def test_what_is_written_into_the_program_must_have_its_shape() -> None:
    from edgeopt.training.writing import with_weights
    from edgeopt_wire.errors import RuntimeFailure

    tensor = onnx.numpy_helper.from_array(np.zeros((2, 3), np.float32), "w")
    program = onnx.helper.make_model(onnx.helper.make_graph([], "net", [], [], [tensor]))
    found = with_weights(program, {"w_w": torch.ones(2, 3)}, {"w": "w_w"})
    assert onnx.numpy_helper.to_array(found.graph.initializer[0]).sum() == 6
    assert onnx.numpy_helper.to_array(program.graph.initializer[0]).sum() == 0
    with pytest.raises(RuntimeFailure, match="shape"):
        with_weights(program, {"w_w": torch.ones(3, 2)}, {"w": "w_w"})
