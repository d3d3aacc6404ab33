# SPDX-License-Identifier: Apache-2.0
"""Training for integers: on the grid, better than rounding, the same bits after a kill, ranges that survive lowering."""

import functools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeopt.onnx_graphs import fold, observer
from edgeopt.passes import Order, Result, quantize_aware_training
from edgeopt.passes.quantize_aware_training import Options
from edgeopt.training.spans import LearnedRange, find
from edgeopt_converters import onnx_to_torch, torch_to_onnx
from edgeopt_converters.model import Model
from edgeopt_converters.torch_program import digest, program_model
from edgeopt_profiles.profile import Scheme
from edgeopt_wire.document import from_json, to_json
from edgeopt_wire.errors import RecipeError, UnsupportedError

SHORT = Options(steps=6, batch=4, save_every=2, samples=12, held_out=0.25, rate=1e-3)
FOUR_BITS = Options(steps=150, batch=16, save_every=25, weight_bits=4, rate=3e-3)


class Net(nn.Module):  # type: ignore[misc]
    """Convolution, batch normalization, hard-swish, depthwise, squeeze-and-excite, residual sum, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False)
        self.deep_norm = nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.classes = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.hardswish(self.stem_norm(self.stem(x)))
        y = functional.relu(self.deep_norm(self.deep(x)), inplace=True)
        gate = functional.hardsigmoid(
            self.excite(functional.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        )
        x = functional.adaptive_avg_pool2d(x + y * gate, 1)
        scores: torch.Tensor = self.classes(x.reshape(x.shape[0], 8))
        return scores


def make_model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    net = Net()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(32, 3, 16, 16) * 2 + 0.3)
    net.eval()
    return program_model(torch.export.export(net, (torch.zeros(1, 3, 16, 16),)), name="net")


def make_samples(count: int = 12, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(0.3, 2, (1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]


@functools.cache
def short() -> Result:
    """What most tests look at, trained once."""
    return trained()


def trained(options: Options = SHORT, **changes: Any) -> Result:
    order = replace(Order(samples=make_samples(options.samples), options=options), **changes)
    return quantize_aware_training.apply(make_model(), order)


def weights(model: Model) -> dict[str, np.ndarray]:
    return {
        name: tensor.numpy() for name, tensor in model.program.state_dict.items() if name.endswith("weight")
    }


def run(model: Model, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    module = model.program.module(check_guards=False)
    with torch.no_grad():
        return np.concatenate([module(torch.from_numpy(sample["x"])).numpy() for sample in samples])


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_lie_on_the_grid_and_the_largest_on_its_end(bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    found = weights(trained(replace(SHORT, weight_bits=bits)).model)
    assert len(found) == 5
    for name, weight in found.items():
        rows = weight.reshape(len(weight), -1)
        step = np.abs(rows).max(1, keepdims=True) / largest
        integers = rows / step
        assert np.abs(integers - integers.round()).max() < 1e-3, name
        assert set(np.abs(integers.round()).max(1).astype(int)) == {largest}, name


def test_native_quantizer_of_the_lowered_model_finds_the_same_integers() -> None:
    import onnx

    result = short()
    program = fold(torch_to_onnx.convert(result.model).program)
    lowered = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in program.graph.initializer}
    for weight in weights(result.model).values():
        same = [values for values in lowered.values() if values.shape == weight.shape]
        assert any(np.array_equal(values, weight) for values in same)


def test_model_given_is_not_touched_and_batch_normalization_is_folded_in_the_result() -> None:
    model = make_model()
    before = digest(model.program)
    result = quantize_aware_training.apply(model, Order(samples=make_samples(), options=SHORT))
    assert digest(model.program) == before
    targets = {str(node.target) for node in result.model.program.graph.nodes}
    assert "aten.batch_norm.default" not in targets
    assert result.model.inputs == model.inputs


def test_four_bit_training_recovers_most_of_what_rounding_loses() -> None:
    """The held-out distance of training's start is that of rounding to nearest with fitted steps and ranges."""
    result = trained(replace(FOUR_BITS, samples=200))
    fresh = make_samples(64, seed=9)
    exact = run(make_model(), fresh)
    rounded = trained(replace(FOUR_BITS, samples=200, steps=1, rate=1e-12, range_rate=1e-12))
    error = np.square(run(result.model, fresh) - exact).mean()
    assert error < 0.5 * np.square(run(rounded.model, fresh) - exact).mean()


def test_statistics_learn_for_a_share_of_the_steps_and_the_result_is_still_close() -> None:
    result = trained(replace(SHORT, learn_statistics=0.5, steps=8, samples=40, batch=16))
    fresh = make_samples(16, seed=5)
    exact = run(make_model(), fresh)
    assert np.square(run(result.model, fresh) - exact).mean() < 0.05 * exact.var()


def test_result_of_a_ruinous_rate_is_where_training_began() -> None:
    wild = trained(replace(SHORT, rate=10.0))
    assert "after step 0, which is kept" in wild.notes[0]


def test_checkpointed_segments_learn_the_same() -> None:
    plain, segmented = short(), trained(replace(SHORT, segments=3))
    for name, weight in weights(plain.model).items():
        np.testing.assert_allclose(weights(segmented.model)[name], weight, atol=1e-6)


def test_batch_that_the_graph_cannot_take_is_learned_sample_by_sample() -> None:
    class Fixed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.arange(10.0).expand(1, 10).reshape(-1)[:10] * x.reshape(-1)[0]

    torch.manual_seed(0)
    program = torch.export.export(Fixed().eval(), (torch.zeros(1, 3, 16, 16),))
    result = quantize_aware_training.apply(
        program_model(program, name="fixed"), Order(samples=make_samples(), options=SHORT)
    )
    assert "6 steps" in result.notes[0]


def test_model_from_onnx_is_trained_too() -> None:
    model = onnx_to_torch.convert(torch_to_onnx.convert(make_model()))
    samples = [{model.inputs[0].name: sample["x"]} for sample in make_samples()]
    result = quantize_aware_training.apply(model, Order(samples=samples, options=SHORT))
    assert len(weights(result.model)) == 5
    assert result.model.inputs == model.inputs


def test_learned_ranges_find_their_tensors_in_onnx() -> None:
    result = short()
    program = fold(torch_to_onnx.convert(result.model).program)
    found = find(result.ranges, observer(program)(make_samples()[0]))
    assert found.lost == ()
    writers = {node.output[0]: node.op_type for node in program.graph.node}
    kinds = [writers.get(name, "input") for name in found.ranges]
    assert {"input", "Conv", "Relu", "Add", "GlobalAveragePool"} <= set(kinds)


def test_a_learned_range_survives_json_and_refuses_one_without_zero() -> None:
    span = short().ranges[0]
    assert from_json(LearnedRange, to_json(span), "range") == span
    with pytest.raises(ValueError, match="must hold zero"):
        replace(span, low=0.5)


def test_symmetric_scheme_gives_symmetric_ranges() -> None:
    scheme = Scheme("int8", "int8", per_channel=True, symmetric_activations=True)
    assert all(span.low == -span.high for span in trained(scheme=scheme).ranges)


def test_scheme_of_other_types_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="int8"):
        trained(scheme=Scheme("float16", "float16", per_channel=True, symmetric_activations=False))


def test_excluded_layer_keeps_its_weights_off_the_grid_and_an_unknown_one_is_named() -> None:
    result = trained(exclude=("linear",))
    assert "linear (excluded by the recipe)" in " ".join(result.notes)
    rows = weights(result.model)["classes.weight"]
    integers = rows / (np.abs(rows).max(1, keepdims=True) / 127)
    assert np.abs(integers - integers.round()).max() > 0.05
    with pytest.raises(RecipeError, match="nonsense"):
        trained(exclude=("nonsense",))


def test_program_in_training_mode_is_refused_with_what_to_do() -> None:
    program = torch.export.export(Net().train(), (torch.zeros(1, 3, 16, 16),))
    with pytest.raises(RecipeError, match=r"model\.eval\(\)"):
        quantize_aware_training.apply(
            program_model(program, name="net"), Order(samples=make_samples(), options=SHORT)
        )


def test_labels_teach_where_they_are_given_and_must_be_enough() -> None:
    """Every sample is said to be of class 3, which the float model says of few."""
    labelled = replace(SHORT, labels=(3,) * 12, label_weight=1.0, steps=30, rate=3e-2)
    fresh = make_samples(16, seed=7)
    assert (run(trained(labelled).model, fresh).argmax(1) == 3).all()
    assert (run(make_model(), fresh).argmax(1) == 3).mean() < 0.5
    with pytest.raises(RecipeError, match="3 labels for 12 samples"):
        trained(replace(labelled, labels=(1, 2, 3)))


def test_no_samples_are_refused() -> None:
    with pytest.raises(RecipeError, match="at least 2 samples, found 0"):
        trained(samples=())


def test_progress_is_told_as_often_as_promised() -> None:
    ticks: list[int] = []
    order = Order(samples=make_samples(), options=SHORT, on_sample=lambda: ticks.append(1))
    quantize_aware_training.apply(make_model(), order)
    assert len(ticks) == quantize_aware_training.walks(order, 12) == 18


def test_time_limit_shortens_the_schedule_to_what_fits_and_keeps_the_best() -> None:
    result = trained(replace(SHORT, steps=100000, max_seconds=1.0))
    assert "of 100000 steps, so many fit into 1 s" in result.notes[0] or "the time was up" in result.notes[0]
    assert "trained for 100000 steps" not in result.notes[0]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"weight_bits": 1}, {"loss": "nonsense"}, {"held_out": 1.0}])
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        replace(SHORT, **wrong)


def test_kill_between_two_saves_and_going_on_gives_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL after step 5 with a save every 2: steps 5 and 6 are made again, from the save after step 4."""
    kept = tmp_path / "training.checkpoint"
    script = (
        "import importlib.util, os, signal, sys\n"
        "spec = importlib.util.spec_from_file_location('story', sys.argv[1])\n"
        "story = importlib.util.module_from_spec(spec); spec.loader.exec_module(story)\n"
        "story.train_until_killed(sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, __file__, str(kept)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert kept.is_file()
    steps: list[int] = []
    resumed = trained(KILLED, checkpoint=kept, on_sample=lambda: steps.append(1))
    whole = trained(KILLED)
    for name, weight in whole.model.program.state_dict.items():
        assert torch.equal(resumed.model.program.state_dict[name], weight), name
    assert resumed.ranges == whole.ranges
    assert not kept.exists()
    assert len(steps) == 12 + KILLED.steps


KILLED = replace(SHORT, learn_statistics=0.5, steps=8)


def train_until_killed(path: str) -> None:
    """Run in a process of its own: 12 samples, then 5 steps, then SIGKILL."""
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 12 + 5:
            os.kill(os.getpid(), signal.SIGKILL)

    trained(KILLED, checkpoint=Path(path), on_sample=tick)


def test_checkpoint_that_is_broken_or_another_runs_starts_afresh(tmp_path: Path) -> None:
    kept = tmp_path / "training.checkpoint"
    kept.write_bytes(b"half a file")
    broken = trained(checkpoint=kept)
    assert broken.ranges == short().ranges


@pytest.mark.slow  # lowers to LiteRT, which takes longer than all the other tests here
def test_learned_ranges_find_their_tensors_in_litert_whose_images_are_channels_last() -> None:
    """Only the tensor whose offset LiteRT folds into a bias (x + 3 of the hard sigmoid) is lost, and named."""
    from edgeopt.passes import quantize_litert
    from edgeopt_converters import torch_to_litert

    result = short()
    lowered = torch_to_litert.convert(result.model)
    sample = {lowered.inputs[0].name: make_samples()[0]["x"].transpose(0, 2, 3, 1).copy()}
    found = find(result.ranges, quantize_litert._observer(lowered)(sample))
    assert set(found.lost) <= {"conv2d_3"}
    assert len(found.ranges) >= 10
