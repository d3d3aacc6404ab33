# SPDX-License-Identifier: Apache-2.0
"""What rounding loses and training gives back, counted in right answers through ONNX Runtime's integer kernels.

Digits (scikit-learn, 1,797 of 8x8) in seconds; CIFAR-10 (EDGEOPT_DATA) for the figures, marked slow: it trains a
mobile net with hard-swish and squeeze-and-excite first. Training for integers sees inputs only, never a label.
"""

import io
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeopt.calibrate import Calibration, Stream, find_ranges
from edgeopt.onnx_graphs import fold, observer
from edgeopt.passes import Order, quantize_aware_training, quantize_static
from edgeopt.passes.quantize_aware_training import Options, Trained
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

    def train(self, options: Options) -> Trained:
        return quantize_aware_training.apply(
            self.model, Order(scheme=U8S8, samples=self.samples, options=options)
        )

    def rounded(self, options: Options) -> Trained:
        """Where training begins: fitted steps, weights rounded to nearest, calibrated ranges."""
        return self.train(replace(options, steps=1, rate=1e-12, range_rate=1e-12))


def _fit(
    net: nn.Module, inputs: np.ndarray, labels: np.ndarray, *, epochs: int, rate: float, augment: bool
) -> None:
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
            images = _moved(x[chosen]) if augment else x[chosen]
            loss = functional.cross_entropy(net(images), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()


def _moved(images: torch.Tensor) -> torch.Tensor:
    images = images.flip(3) if torch.rand(()) < 0.5 else images
    size = images.shape[-1]
    down, right = torch.randint(0, 9, (2,)).tolist()
    return functional.pad(images, (4, 4, 4, 4))[:, :, down : down + size, right : right + size]


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
    _fit(net, inputs[:1200], labels[:1200], epochs=20, rate=1e-2, augment=False)
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


class Gate(nn.Module):  # type: ignore[misc]
    """Squeeze-and-excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, max(8, channels // 4), 1)
        self.excite = nn.Conv2d(max(8, channels // 4), channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = functional.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x * functional.hardsigmoid(self.excite(inner))


class Block(nn.Module):  # type: ignore[misc]
    """Inverted residual of MobileNetV3: expand, depthwise, gate, project."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle = 3 * inputs
        self.expand, self.norm1 = nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.deep = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.norm2, self.gate = nn.BatchNorm2d(middle), Gate(middle)
        self.project, self.norm3 = nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.hardswish(self.norm1(self.expand(x)))
        y = self.gate(functional.hardswish(self.norm2(self.deep(y))))
        y = self.norm3(self.project(y))
        return x + y if self.is_residual else y


class Mobile(nn.Module):  # type: ignore[misc]
    """A small MobileNetV3-like net for 32x32 photos."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        shapes = ((16, 24, 1), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 64, 2))
        self.blocks = nn.Sequential(*(Block(*shape) for shape in shapes))
        self.classes = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(functional.hardswish(self.norm(self.stem(x))))
        scores: torch.Tensor = self.classes(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return scores


def photos(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a zip of <set>/<class>/<photo>.jpg, normalized, with class indices."""
    from PIL import Image

    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        pixels = np.stack(
            [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
        )
    kinds = sorted({name.split("/")[1] for name in names})
    labels = np.asarray([kinds.index(name.split("/")[1]) for name in names])
    return ((pixels.astype(np.float32) / 255 - 0.47) / 0.25).transpose(0, 3, 1, 2).copy(), labels


def mobile_task(net: nn.Module, inputs: np.ndarray, test: tuple[np.ndarray, np.ndarray]) -> Task:
    """Every tenth training photo, without its label, is what training for integers sees."""
    program = torch.export.export(net.eval(), (torch.zeros(1, 3, 32, 32),))
    return Task(program_model(program, name="mobile"), [{"x": row[None]} for row in inputs[::10]], *test)


@pytest.mark.slow  # trains a float model for some minutes, then twice for integers
@pytest.mark.timeout(3600)
def test_four_bits_of_a_mobile_net_on_cifar10_recover_and_eight_are_not_worse() -> None:
    folder = Path(os.environ.get("EDGEOPT_DATA", "nowhere")) / "cifar10"
    if not folder.is_dir():
        pytest.skip("needs EDGEOPT_DATA with cifar10")
    inputs, labels = photos(folder / "cifar10-train-20k.zip")
    torch.manual_seed(0)
    net = Mobile()
    _fit(net, inputs, labels, epochs=8, rate=6e-3, augment=True)
    task = mobile_task(net, inputs, photos(folder / "cifar10-test-5k.zip"))
    compare(task)


def compare(task: Task) -> None:
    """Print and check the figures of both widths."""
    four = Options(steps=600, batch=32, weight_bits=4, rate=1e-3, range_rate=1e-2, save_every=100)
    exact = task.in_float()
    start, end = task.rounded(four), task.train(four)
    before = task.right(task.in_integers(start.model, start.ranges))
    after = task.right(task.in_integers(end.model, end.ranges))
    best = task.right(exact)
    print(f"4-bit weights: float {best:.4f}, rounded {before:.4f}, trained {after:.4f}; {end.notes[0]}")
    assert best - before > 0.02
    assert best - after < 0.5 * (best - before)
    eight = Options(steps=200, batch=32, rate=1e-4, save_every=50)
    plain, end = task.in_integers(task.model), task.train(eight)
    trained = task.in_integers(end.model, end.ranges)
    errors = [float(np.square(scores - exact).mean()) for scores in (plain, trained)]
    print(f"int8: rounded {task.right(plain):.4f}, trained {task.right(trained):.4f}; squared error {errors}")
    assert (
        task.right(trained) >= task.right(plain) - 0.004
    )  # one standard error of the difference on 5,000 photos
