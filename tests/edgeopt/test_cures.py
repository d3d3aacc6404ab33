# SPDX-License-Identifier: Apache-2.0
"""The attribution chooses passes for a trained net's int8 files, real files judge them, and the decisions are told."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from edgeopt import cures
from edgeopt.artifacts import Made, tool_versions
from edgeopt.cache import Cache
from edgeopt.compress import make_artifacts
from edgeopt.evaluate.samples import load_samples
from edgeopt.plan import BASELINE, Plan, make_plan
from edgeopt.progress import Progress
from edgeopt.recipe import Recipe
from edgeopt.sources import Source
from edgeopt.sources.torch_factory import TorchModel, export
from edgeopt.workbench import Workbench
from edgeopt_agent import runtimes
from edgeopt_profiles.profile import load_profile
from edgeopt_wire.manifest import Variant

QUICK = Recipe(rounding="nearest", runtimes=("onnxruntime",))


class Digits(nn.Module):  # type: ignore[misc]
    """Separable convolutions with batch normalization, whose channels differ by what training made of them."""

    def __init__(self) -> None:
        super().__init__()
        shape = ((1, 12, 3, 1), (12, 12, 3, 12), (12, 24, 1, 1), (24, 24, 3, 24), (24, 24, 1, 1))
        self.body = nn.Sequential(*(part for entry in shape for part in _block(*entry)))
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.body(x).mean((2, 3)))
        return scores


def _block(inputs: int, outputs: int, kernel: int, groups: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()


@dataclass(frozen=True)
class Trained:
    """A float net, samples that calibrate, and others that nobody has seen."""

    source: Source
    calibration: Any
    unseen: np.ndarray

    def build(self, plan: Plan, recipe: Recipe, folder: Path) -> dict[str, Made]:
        bench = Workbench(Cache(None), folder, Progress(), tool_versions())
        return make_artifacts(plan, self.source, self.calibration, recipe, bench)

    def sqnr_db(self, baseline: Made, made: Made) -> float:
        exact, found = (self._outputs(entry) for entry in (baseline, made))
        return float(10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum()))

    def _outputs(self, made: Made) -> np.ndarray:
        known = made.description
        (inputs,), (outputs,) = known.inputs, known.outputs
        variant = Variant(
            "v", made.artifact.runtime, "int8", made.file.name, known.inputs, known.outputs, "", 0.0
        )
        session = runtimes.find(made.artifact.runtime).load(made.file, variant)
        rows = [
            session.run({inputs.name: row.reshape(inputs.shape).copy()})[outputs.name].copy()
            for row in self.unseen
        ]
        session.close()
        return np.concatenate(rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))  # writers come one after another
    x, classes = (digits.images[order, None] / 8 - 1).astype(np.float32), digits.target[order]
    torch.manual_seed(0)
    net = Digits()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    inputs, labels = torch.from_numpy(x[:1024]), torch.from_numpy(classes[:1024])
    for _ in range(3):
        for chosen in torch.randperm(1024).split(64):
            loss = nn.functional.cross_entropy(net(inputs[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    source = export(TorchModel(net.eval(), (torch.zeros(1, 1, 8, 8),)), "digits", "digits")
    file = tmp_path_factory.mktemp("digits") / "calibration.npz"
    np.savez(file, **{source.model.inputs[0].name: x[:128]})
    samples = load_samples(str(file), source.model.inputs, None, limit=None, seed=0)
    return Trained(source, samples, x[1024:1224])


def _per_tensor(plan: Plan) -> Plan:
    return replace(
        plan,
        artifacts=tuple(
            replace(entry, scheme=replace(entry.scheme, per_channel=False)) if entry.scheme else entry
            for entry in plan.artifacts
        ),
    )


def _without_cures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cures, "WORTH", 2.0)


def _int8(made: dict[str, Made]) -> Made:
    return next(entry for entry in made.values() if entry.artifact.precision == "int8")


def test_weights_with_one_scale_a_tensor_are_equalized_and_unseen_samples_gain(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _per_tensor(make_plan(load_profile("host"), QUICK))
    made = trained.build(plan, QUICK, tmp_path / "cured")
    notes = " | ".join(_int8(made).description.notes)
    assert "equalize_layers kept: " in notes
    assert "weights with one scale a tensor are" in notes
    assert "held-out calibration samples" in notes
    _without_cures(monkeypatch)
    plain = trained.build(plan, QUICK, tmp_path / "plain")
    assert "no equalize_layers: weights with one scale a tensor are" in " | ".join(
        _int8(plain).description.notes
    )
    gained = [trained.sqnr_db(entry[BASELINE], _int8(entry)) for entry in (made, plain)]
    assert gained[0] > gained[1] + 1.0  # dB


def test_scales_of_channels_need_no_equalizing_and_a_small_shift_is_told(
    trained: Trained, tmp_path: Path
) -> None:
    made = trained.build(make_plan(load_profile("host"), QUICK), QUICK, tmp_path)
    notes = " | ".join(_int8(made).description.notes)
    assert "equalize_layers" not in notes
    assert "a constant shift is" in notes


def test_rounded_weights_are_left_alone(trained: Trained, tmp_path: Path) -> None:
    recipe = Recipe(runtimes=("onnxruntime",))
    made = trained.build(make_plan(load_profile("host"), recipe), recipe, tmp_path)
    notes = " | ".join(_int8(made).description.notes)
    assert "rounded by second moments" in notes
    assert "correct_bias" not in notes


def test_a_pass_that_makes_the_output_worse_is_not_kept(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The biases are moved the wrong way."""
    from edgeopt.passes import correct_bias

    real = correct_bias.shifts
    monkeypatch.setattr(
        correct_bias, "shifts", lambda *given: {name: -9 * shift for name, shift in real(*given).items()}
    )
    plan = _per_tensor(make_plan(load_profile("host"), QUICK))
    made = trained.build(plan, QUICK, tmp_path)
    notes = " | ".join(_int8(made).description.notes)
    assert "correct_bias not kept: " in notes
    assert "float biases of" not in notes


def test_litert_gets_the_corrected_biases_too(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(QUICK, runtimes=("onnxruntime", "litert"))
    plan = make_plan(load_profile("host"), recipe)
    monkeypatch.setattr(cures, "WORTH", 0.0)
    made = trained.build(plan, recipe, tmp_path / "cured")
    litert = next(
        e for e in made.values() if e.artifact.format == "litert" and e.artifact.precision == "int8"
    )
    notes = " | ".join(litert.description.notes)
    assert ("correct_bias kept: " in notes) == (litert.hub is not None)
    assert "correct_bias" in notes
    assert trained.sqnr_db(made[BASELINE], litert) > 25
