# SPDX-License-Identifier: Apache-2.0
"""What rounding loses and training gives back, counted in right answers through ONNX Runtime's integer kernels.

Digits (scikit-learn, 1,797 of 8x8). Training for integers sees inputs only, never a label.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeopt.calibrate import Calibration, Stream, find_ranges
from edgeopt.onnx_graphs import fold, observer
from edgeopt.passes import Order, Result, quantize_aware_training, quantize_static
from edgeopt.passes.quantize_aware_training import Options
from edgeopt.training.spans import LearnedRange, find
from edgeopt_converters import torch_to_onnx
from edgeopt_converters.model import Model
from edgeopt_converters.torch_program import program_model
from edgeopt_profiles.profile import Scheme

U8S8 = Scheme("uint8", "int8", per_channel=True, symmetric_activations=False)


@dataclass(frozen=True)
class Task:
    """A float model, unlabelled inputs to train with, and labelled ones to count right answers on."""

    model: Model
    samples: list[dict[str, np.ndarray]]
    inputs: np.ndarray
    labels: np.ndarray

    def scores(self, program: Any) -> np.ndarray:
        """Run an ONNX model on every labelled input, one by one as exported."""
        session = ort.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return np.concatenate([session.run(None, {name: row[None]})[0] for row in self.inputs])

    def right(self, scores: np.ndarray) -> float:
        """Share of right answers."""
        return float((scores.argmax(1) == self.labels).mean())

    def in_float(self) -> np.ndarray:
        return self.scores(torch_to_onnx.convert(self.model).program)

    def in_integers(self, model: Model, learned: tuple[LearnedRange, ...] = ()) -> np.ndarray:
        """Quantize natively, with the learned ranges where a tensor has one, and run."""
        folded = fold(torch_to_onnx.convert(model).program)
        name = folded.graph.input[0].name
        samples = [{name: sample["x"]} for sample in self.samples[:100]]
        outputs = frozenset(output.name for output in folded.graph.output)
        ranges = find_ranges(observer(folded), Stream(samples), Calibration(), keep_full=outputs)
        ranges |= find(learned, observer(folded)(samples[0])).ranges
        return self.scores(quantize_static.with_ranges(folded, U8S8, ranges, ()))

    def train(self, options: Options) -> Result:
        return quantize_aware_training.apply(
            self.model, Order(scheme=U8S8, samples=self.samples, options=options)
        )

    def rounded(self, options: Options) -> Result:
        """Where training begins: fitted steps, weights rounded to nearest, calibrated ranges."""
        return self.train(replace(options, steps=1, rate=1e-12, range_rate=1e-12))


def _fit(net: nn.Module, inputs: np.ndarray, labels: np.ndarray, *, epochs: int, rate: float) -> None:
    torch.manual_seed(0)
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.02)
    size = 64
    steps = epochs * (len(x) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for start in range(0, len(x) - size + 1, size):
            chosen = order[start : start + size]
            loss = functional.cross_entropy(net(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()


class Digits(nn.Module):  # type: ignore[misc]
    """Convolution, depthwise, pointwise, all with batch normalization, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.deep_norm = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point, self.point_norm = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.classes = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.hardswish(self.first_norm(self.first(x)))
        x = functional.relu(self.deep_norm(self.deep(x)))
        x = functional.relu(self.point_norm(self.point(x)))
        scores: torch.Tensor = self.classes(functional.max_pool2d(x, 2).flatten(1))
        return scores


@pytest.fixture(scope="module")
def digits() -> Task:
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    inputs = (data.images[:, None] / 8 - 1).astype(np.float32)
    labels = data.target.astype(np.int64)
    torch.manual_seed(0)
    net = Digits()
    _fit(net, inputs[:1200], labels[:1200], epochs=20, rate=1e-2)
    program = torch.export.export(net, (torch.zeros(1, 1, 8, 8),))
    samples = [{"x": row[None]} for row in inputs[:1200]]
    return Task(program_model(program, name="digits"), samples, inputs[1200:], labels[1200:])


def test_three_bit_weights_lose_answers_that_training_without_labels_gives_back(digits: Task) -> None:
    options = Options(steps=250, batch=32, weight_bits=3, rate=3e-3, range_rate=1e-2, save_every=50)
    exact = digits.right(digits.in_float())
    start, end = digits.rounded(options), digits.train(options)
    before = digits.right(digits.in_integers(start.model, start.ranges))
    after = digits.right(digits.in_integers(end.model, end.ranges))
    print(f"digits, 3-bit weights: float {exact:.4f}, rounded {before:.4f}, trained {after:.4f}")
    assert exact - before > 0.02
    assert exact - after < 0.5 * (exact - before)


def test_eight_bits_trained_are_nearer_to_float_than_rounded(digits: Task) -> None:
    """597 digits cannot tell int8 models apart by answers (four of them are one standard error); scores can."""
    options = Options(steps=60, batch=32, rate=1e-4, save_every=20)
    exact, plain = digits.in_float(), digits.in_integers(digits.model)
    end = digits.train(options)
    trained = digits.in_integers(end.model, end.ranges)
    errors = [float(np.square(scores - exact).mean()) for scores in (plain, trained)]
    print(
        f"digits, int8: right {digits.right(plain):.4f}, {digits.right(trained):.4f}; squared error {errors}"
    )
    assert errors[1] <= errors[0]
