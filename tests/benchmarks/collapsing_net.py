# SPDX-License-Identifier: Apache-2.0
"""A small net that default int8 breaks, trained here in minutes on one core, and what each quantizer loses on it.

The net is MobileNetV3-small in little: depthwise convolutions, squeeze-and-excite with hard-sigmoid, hard-swish, ReLU
in its first half. What breaks such nets is kept, on purpose and in the open: batch normalization after the expansion
and the depthwise convolutions begins with scales of a log-normal distribution, as trained MobileNets have them (Nagel
et al. 2019, section 3.1, figure 2: channels of one depthwise layer differ a hundredfold), and training goes on from there.
Nothing is done to the net after training.

`python tests/benchmarks/collapsing_net.py --data FOLDER` wants cifar10-train-20k.zip and cifar10-test-5k.zip there
(JPEG files, a folder a class); without them it trains on scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

SIZE = 32
SPREAD = 1.2
"""Standard deviation of the logarithm of the batch normalization scales: 95 % lie within a factor of 10 of e^0."""

BATCH = 64
CALIBRATION = 256


@dataclass(frozen=True)
class Data:
    """Images (n, 3, 32, 32), float32 from -1 to 1, and class indices."""

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def load_data(folder: Path | None, limit: int | None = None) -> Data:
    """CIFAR-10 from two zips, or digits blown up to 32 x 32."""
    if folder is not None and (folder / "cifar10-train-20k.zip").is_file():
        train = _read_zip(folder / "cifar10-train-20k.zip", limit)
        test = _read_zip(folder / "cifar10-test-5k.zip", limit)
        return Data("CIFAR-10", *train, *test)
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels.reshape(-1, 1, 8, 8).astype(np.float32) / 8 - 1)
    large = nn.functional.interpolate(small, (SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1).numpy()
    order = np.random.default_rng(0).permutation(len(labels))
    large, labels = np.ascontiguousarray(large[order]), labels[order].astype(np.int64)
    return Data("digits", large[:900], labels[:900], large[900:], labels[900:])


def _read_zip(path: Path, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        if limit:
            names = names[:: max(len(names) // limit, 1)]
        classes = {name: number for number, name in enumerate(sorted({n.split("/")[1] for n in names}))}
        images = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names])
    labels = np.array([classes[name.split("/")[1]] for name in names])
    scaled = images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(scaled), labels


class Squeeze(nn.Module):
    """Squeeze-and-excite with a hard sigmoid (Howard et al. 2019, section 5.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 4, 8)
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weigh the channels of x."""
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        return x * nn.functional.hardsigmoid(self.up(nn.functional.relu(self.down(pooled))))


class Block(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excite, projection; added to its input where shapes agree."""

    def __init__(
        self, channels: int, expanded: int, out: int, *, kernel: int, stride: int, act: type[nn.Module]
    ) -> None:
        super().__init__()
        self.is_residual = stride == 1 and channels == out
        self.body = nn.Sequential(
            nn.Conv2d(channels, expanded, 1, bias=False), nn.BatchNorm2d(expanded), act(),
            nn.Conv2d(expanded, expanded, kernel, stride, kernel // 2, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded), act(), Squeeze(expanded),
            nn.Conv2d(expanded, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        found: torch.Tensor = self.body(x)
        return x + found if self.is_residual else found


class Net(nn.Module):
    """MobileNetV3-small's pattern with the widths and strides of 32 x 32 images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        swish, relu = nn.Hardswish, nn.ReLU
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), swish(),
            Block(16, 32, 16, kernel=3, stride=1, act=relu),
            Block(16, 64, 24, kernel=3, stride=2, act=relu),
            Block(24, 72, 24, kernel=3, stride=1, act=relu),
            Block(24, 96, 40, kernel=5, stride=2, act=swish),
            Block(40, 160, 40, kernel=3, stride=1, act=swish),
            Block(40, 160, 40, kernel=3, stride=1, act=swish),
            nn.Conv2d(40, 192, 1, bias=False), nn.BatchNorm2d(192), swish(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(192, 128), swish(), nn.Linear(128, classes),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the logits."""
        found: torch.Tensor = self.layers(x)
        return found


def make_net(spread: float = SPREAD) -> Net:
    """Make the net whose expansions and depthwise layers have unlike channels."""
    net = Net()
    for block in net.modules():
        if isinstance(block, Block):
            for number in (1, 4):
                nn.init.normal_(block.body[number].weight, 0.0, spread)
                block.body[number].weight.data.exp_()
    return net


def train(data: Data, *, epochs: int = 7, seed: int = 0, spread: float = SPREAD) -> Net:
    """Train on one thread; equal seeds give equal weights on one machine."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    net = make_net(spread)
    weights = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    steps = epochs * (len(data.train_x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    rng = np.random.default_rng(seed)
    net.train()
    for epoch in range(epochs):
        for rows in np.array_split(rng.permutation(len(x))[: len(x) // BATCH * BATCH], len(x) // BATCH):
            batch = _moved(x[rows], rng, is_mirrored=data.name != "digits")
            loss = nn.functional.cross_entropy(net(batch), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    return net.eval()


def _moved(x: torch.Tensor, rng: np.random.Generator, *, is_mirrored: bool) -> torch.Tensor:
    if is_mirrored and rng.random() < 0.5:
        x = x.flip(3)
    padded = nn.functional.pad(x, (3, 3, 3, 3), mode="reflect")
    top, left = rng.integers(0, 7, 2)
    return padded[:, :, top : top + SIZE, left : left + SIZE]


def accuracy(data: Data, net: nn.Module) -> float:
    with torch.no_grad():
        found = np.concatenate(
            [net(part).argmax(1).numpy() for part in torch.from_numpy(data.test_x).split(500)]
        )
    return float((found == data.test_y).mean())


@dataclass(frozen=True)
class Row:
    """One quantizer's figures on the test images; `slower` is its best run over the float file's, on 1 and 2 threads."""

    name: str
    top1: float
    lost_points: float
    agreement: float
    sqnr_db: float
    made_s: float
    slower: tuple[float, float] = (1.0, 1.0)


THREADS = (1, 2)
SUFFIXES = {"onnx": ".onnx", "litert": ".tflite"}


def main() -> None:
    """Train, quantize by everybody, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=_data_folder(), help="folder of the two zips")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spread", type=float, default=SPREAD)
    parser.add_argument("--weights", type=Path, help="keep the trained weights here, or take them from here")
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args()
    data = load_data(args.data)
    net = make_net(args.spread).eval()
    start = time.perf_counter()
    if args.weights and args.weights.is_file():
        net.load_state_dict(torch.load(args.weights))
    else:
        net = train(data, epochs=args.epochs, seed=args.seed, spread=args.spread)
        if args.weights:
            torch.save(net.state_dict(), args.weights)
    trained_s = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(data, net, Path(folder))
    print(f"{data.name}, {len(data.test_x)} test images, trained in {trained_s:.0f} s on one thread")
    print(f"{'':44s} top-1   lost  agrees   SQNR   made  time of float's, 1 and 2 threads")
    for row in rows:
        print(
            f"{row.name:44s} {100 * row.top1:5.2f} {row.lost_points:6.2f} {100 * row.agreement:7.2f} "
            f"{row.sqnr_db:6.1f} {row.made_s:5.1f}s  {row.slower[0]:.2f} {row.slower[1]:.2f}"
        )
    if args.json:
        document = {"data": data.name, "images": len(data.test_x), "trained_s": trained_s}
        args.json.write_text(json.dumps(document | {"rows": [vars(row) for row in rows]}, indent=2))


def _data_folder() -> Path | None:
    folder = os.environ.get("EDGEOPT_DATA")
    return Path(folder) / "cifar10" if folder else None


def compare(data: Data, net: Net, folder: Path) -> list[Row]:
    """Quantize by every quantizer on the same calibration images and run all on the test images."""
    from edgeopt.sources.torch_factory import TorchModel, export

    source = export(TorchModel(net, (torch.zeros(1, 3, SIZE, SIZE),)), "collapsing", "collapsing-net")
    calibration = np.random.default_rng(1).permutation(len(data.train_x))[:CALIBRATION]
    images = np.ascontiguousarray(data.train_x[calibration])
    floating, made = _ours(source, images, folder)
    files = {"float": (floating, 0.0)}
    for name, settings in _PEERS.items():
        files[name] = _peer(floating, images, folder / f"{len(files)}.onnx", settings)
    files |= made
    files |= _cured(floating, source, images, folder)
    outputs = {name: run_file(path, data.test_x) for name, (path, _) in files.items()}
    rows = []
    for name, (path, made_s) in files.items():
        reference = floating.with_suffix(path.suffix)
        slower = relative_times(reference, path, data.test_x[:1])
        rows.append(_row(name, outputs[name], outputs["float"], data.test_y, made_s=made_s, slower=slower))
    return rows


def relative_times(reference: Path, path: Path, image: np.ndarray) -> tuple[float, float]:
    """How long a file takes against the float file of its runtime, run in turn."""
    from edgeopt.side_by_side import loaded, relative_time
    from edgeopt_converters.litert_file import edges
    from edgeopt_converters.onnx_file import load_onnx

    if path.suffix == ".tflite":
        runtime, (inputs, outputs) = "litert", edges(reference.read_bytes())
        image = np.ascontiguousarray(image.transpose(0, 2, 3, 1))
    else:
        model = load_onnx(reference, name="net")
        runtime, inputs, outputs = "onnxruntime", model.inputs, model.outputs
    found = []
    for threads in THREADS:
        with (
            loaded(reference.read_bytes(), runtime, inputs, outputs, threads=threads) as first,
            loaded(path.read_bytes(), runtime, inputs, outputs, threads=threads) as second,
        ):
            found.append(relative_time(first, second, {inputs[0].name: image}))
    return found[0], found[1]


_PEERS: dict[str, dict[str, Any]] = {
    "onnxruntime, as it comes": {},
    "onnxruntime, U8S8 per channel, min-max": {"per_channel": True, "activation_type": "QUInt8"},
    "onnxruntime, U8S8 per channel, percentile": {
        "per_channel": True, "activation_type": "QUInt8", "calibrate_method": "Percentile",
    },
    "onnxruntime, U8S8 per channel, entropy": {
        "per_channel": True, "activation_type": "QUInt8", "calibrate_method": "Entropy",
    },
    "S8S8 per channel, symmetric, mean min-max": {
        "per_channel": True, "activation_type": "QInt8",
        "extra_options": {"ActivationSymmetric": True, "CalibMovingAverage": True},
    },
}  # fmt: skip
"""onnxruntime's own quantizer. The last row has NNCF's default ranges, without the bias correction that NNCF adds."""


def _peer(source: Path, images: np.ndarray, target: Path, settings: dict[str, Any]) -> tuple[Path, float]:
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.rows = iter([{name: image[None]} for image in images])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    start = time.perf_counter()
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    name = ort.InferenceSession(str(prepared)).get_inputs()[0].name
    named = dict(settings)
    for key, kind in (("activation_type", QuantType), ("calibrate_method", CalibrationMethod)):
        if key in named:
            named[key] = kind[named[key]]
    quantize_static(str(prepared), str(target), Reader(name), **named)
    return target, time.perf_counter() - start


def _ours(source: Any, images: np.ndarray, folder: Path) -> tuple[Path, dict[str, tuple[Path, float]]]:
    """The float model, and what `edgeopt build` makes by each effort."""
    from edgeopt.artifacts import tool_versions
    from edgeopt.cache import Cache
    from edgeopt.compress import make_artifacts
    from edgeopt.evaluate.samples import load_samples
    from edgeopt.plan import make_plan
    from edgeopt.progress import Progress
    from edgeopt.recipe import Recipe
    from edgeopt.workbench import Workbench
    from edgeopt_profiles.profile import load_profile

    np.savez(folder / "calibration.npz", **{source.model.inputs[0].name: images})
    samples = load_samples(str(folder / "calibration.npz"), source.model.inputs)
    found: dict[str, tuple[Path, float]] = {}
    floating = folder / "float.onnx"
    for effort in ("quick", "default", "extensive"):
        start = time.perf_counter()
        recipe = Recipe(effort=effort)
        bench = Workbench(Cache(None), folder / effort, Progress(), tool_versions())
        made = make_artifacts(make_plan(load_profile("host"), recipe), source, samples, recipe, bench)
        for entry in made.values():
            if entry.artifact.format == "onnx" and entry.artifact.precision == "fp32":
                floating.write_bytes(entry.file.read_bytes())
            elif entry.artifact.format == "litert" and entry.artifact.precision == "fp32":
                floating.with_suffix(".tflite").write_bytes(entry.file.read_bytes())
            elif entry.artifact.precision == "int8" and entry.artifact.format in SUFFIXES:
                target = folder / f"edgeopt-{effort}{SUFFIXES[entry.artifact.format]}"
                target.write_bytes(entry.file.read_bytes())
                label = f"edgeopt, {effort}, {entry.artifact.format}"
                found[label] = (target, time.perf_counter() - start)
    return floating, found


def _cured(floating: Path, source: Any, images: np.ndarray, folder: Path) -> dict[str, tuple[Path, float]]:
    """What each cure gives by itself and all together, by the passes alone: U8S8, ranges by squared error."""
    import onnx

    from edgeopt.passes import (
        Order,
        correct_bias,
        equalize_activations,
        equalize_gates,
        quantize_static,
        round_weights,
    )
    from edgeopt_converters.model import Model
    from edgeopt_profiles.profile import Scheme

    loaded = onnx.load(floating)
    name = loaded.graph.input[0].name
    model = Model("onnx", loaded, "net", source.model.inputs, source.model.outputs)
    samples = [{name: image[None]} for image in images]
    order = Order(Scheme("uint8", "int8", True, False), samples=samples)
    found: dict[str, tuple[Path, float]] = {}

    def keep(label: str, made: Model, start: float) -> None:
        path = folder / f"cured-{len(found)}.onnx"
        onnx.save(made.program, path)
        found[label] = (path, time.perf_counter() - start)

    def correct(made: Model, reference: Model, mode: str) -> Model:
        options = correct_bias.Options(mode)
        return correct_bias.apply(made, Order(samples=samples, options=options, reference=reference)).model

    prepared = {
        "as it is": lambda: model,
        "equalize_activations": lambda: equalize_activations.apply(model, Order(samples=samples)).model,
        "equalize_gates": lambda: equalize_gates.apply(model, Order(samples=samples)).model,
    }
    for label, prepare in prepared.items():
        start = time.perf_counter()
        reference = prepare()
        made = quantize_static.apply(reference, order).model
        keep(f"quantize_static, {label}", made, start)
        for mode in correct_bias.MODES:
            keep(f"  {label} + correct_bias {mode}", correct(made, reference, mode), start)
    start = time.perf_counter()
    rounded = round_weights.apply(reference, Order(samples=samples)).model
    made = quantize_static.apply(rounded, order).model
    keep("  equalize_gates + round_weights", made, start)
    keep("  equalize_gates + round_weights + full", correct(made, rounded, "full"), start)
    return found


def run_file(path: Path, images: np.ndarray) -> np.ndarray:
    """Logits of every image by the file's runtime on one thread."""
    import onnxruntime as ort

    if path.suffix == ".tflite":
        return _run_litert(path, images)

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: image[None]})[0] for image in images])


def _run_litert(path: Path, images: np.ndarray) -> np.ndarray:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    found = []
    for image in images.transpose(0, 2, 3, 1):
        interpreter.set_tensor(source, np.ascontiguousarray(image[None]))
        interpreter.invoke()
        found.append(interpreter.get_tensor(target))
    return np.concatenate(found)


def _row(
    name: str,
    found: np.ndarray,
    exact: np.ndarray,
    labels: np.ndarray,
    *,
    made_s: float,
    slower: tuple[float, float],
) -> Row:
    top1, before = (float((logits.argmax(1) == labels).mean()) for logits in (found, exact))
    noise = float(((found - exact) ** 2).sum())
    sqnr = 10 * np.log10(float((exact**2).sum()) / noise) if noise else float("inf")
    agreement = float((found.argmax(1) == exact.argmax(1)).mean())
    return Row(name, top1, 100 * (before - top1), agreement, float(sqnr), made_s, slower)


if __name__ == "__main__":
    main()
