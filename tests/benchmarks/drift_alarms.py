# SPDX-License-Identifier: Apache-2.0
"""How often drift alarms with nothing wrong, and how soon where something is: real photos, windows of 128.

    python tests/benchmarks/drift_alarms.py [--model LITE0.onnx] [--windows 2000] [--doc docs/monitoring.md]

The reference is taken from photos that no window holds. CIFAR-10 (MLPerf Tiny's ResNet8, LiteRT) gives 5,000 test photos
against references of 128, 512 and 2,000 training photos; with an ONNX file of an ImageNet classifier (input NCHW,
(x/255 - 0.498) / 0.502) the ImageNet sample as well. Data: EDGEOPT_DATA. A window is drawn without replacement; windows
of one reference share it, so that shares are means over `REFERENCES` references. Two windows in a row raise an event.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import random
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from edgeopt_agent.features import of_input, of_scores
from edgeopt_wire.drift import Reference, judge, make_reference
from edgeopt_wire.tensor import TensorSpec

Row = dict[str, float]
Photo = Image.Image

ROWS = 128
REFERENCES = 20
BEGIN, END = "<!-- drift -->", "<!-- end of drift -->"


def noisy(photo: Photo) -> Photo:
    pixels = np.asarray(photo, np.float32)
    seed = int(pixels.sum()) % 2**32
    noise = np.random.default_rng(seed).normal(0, 25, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


CHANGES: dict[str, Callable[[Photo], Photo]] = {
    "as they are": lambda photo: photo,
    "noise (deviation 25 of 255)": noisy,
    "half as bright": lambda photo: ImageEnhance.Brightness(photo).enhance(0.5),
    "20 % darker": lambda photo: ImageEnhance.Brightness(photo).enhance(0.8),
    "blurred (radius 1 % of the width)": lambda p: p.filter(
        ImageFilter.GaussianBlur(max(0.7, p.width / 100))
    ),
    "red and blue swapped": lambda photo: Image.merge("RGB", photo.split()[::-1]),
}


class Cifar:
    """ResNet8 of MLPerf Tiny in LiteRT, on photos of 32x32 pixels as they are."""

    name, sizes = "CIFAR-10, ResNet8", (128, 512, 2000)

    def __init__(self, data: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(str(data / "mlperf-tiny/pretrainedResnet.tflite"), num_threads=1)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._output = self._interpreter.get_output_details()[0]["index"]
        self.reference = list(_zipped(data / "cifar10/cifar10-train-20k.zip", 6000))
        self.service = list(_zipped(data / "cifar10/cifar10-test-5k.zip", 5000))
        self.strange = [photo.resize((32, 32)) for photo in _folder(data / "imagenet1k-sample")]

    def row(self, photo: Photo) -> Row:
        array = np.asarray(photo, np.float32)[None]
        self._interpreter.set_tensor(self._input, array)
        self._interpreter.invoke()
        found = of_input(TensorSpec("image", array.shape, "float32", "NHWC"), array)
        return found | of_scores(self._interpreter.get_tensor(self._output))


class ImageNet:
    """An ImageNet classifier in ONNX Runtime, on photos scaled to 224x224."""

    sizes = (128, 250)

    def __init__(self, data: Path, model: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.name = f"ImageNet sample, {model.stem}"
        photos = list(_folder(data / "imagenet1k-sample"))
        random.Random(0).shuffle(photos)
        self.reference, self.service = photos[:250], photos[250:]
        self.strange = list(_zipped(data / "cifar10/cifar10-test-5k.zip", 250))

    def row(self, photo: Photo) -> Row:
        pixels = np.asarray(photo.resize((224, 224), Image.Resampling.BILINEAR), np.float32)
        array = ((pixels / 255 - 0.498) / 0.502).transpose(2, 0, 1)[None]
        outputs = self._session.run(None, {self._session.get_inputs()[0].name: array})
        found = of_input(TensorSpec("image", array.shape, "float32", "NCHW"), array)
        return found | of_scores(outputs[0])


def alarms(
    reference: Reference, rows: Sequence[Row], windows: int, chance: random.Random
) -> tuple[float, float]:
    """Share of windows that alarm, and of windows that alarm after one that did (which raises an event)."""
    found = [_judged(reference, chance.sample(rows, ROWS)) for _ in range(windows)]
    pairs = [a and b for a, b in itertools.pairwise(found)]
    return sum(found) / len(found), sum(pairs) / max(1, len(pairs))


def table(case: Cifar | ImageNet, windows: int) -> Iterable[str]:
    """One line for each change, one column for each size of the reference: windows that alarm, and events."""
    heads = "".join(f" {size} photos | event |" for size in case.sizes)
    yield f"| {case.name}: windows of {ROWS} that alarm, reference of |{heads}"
    yield "|---|" + "---:|" * 2 * len(case.sizes)
    known = [case.row(photo) for photo in case.reference]
    for name, change in CHANGES.items():
        yield _line(case, name, known, [case.row(change(photo)) for photo in case.service], windows)
    yield _line(
        case, "other photos (the other data set)", known, [case.row(p) for p in case.strange], windows
    )


def _line(case: Cifar | ImageNet, name: str, known: list[Row], rows: list[Row], windows: int) -> str:
    cells = []
    for size in case.sizes:
        chance = random.Random(size)
        shares = [
            alarms(
                make_reference(chance.sample(known, size), "benchmark"), rows, windows // REFERENCES, chance
            )
            for _ in range(REFERENCES)
        ]
        cells += [f" {np.mean([share[which] for share in shares]):.4f} |" for which in (0, 1)]
    return f"| {name} |" + "".join(cells)


def _judged(reference: Reference, rows: Sequence[Row]) -> bool:
    counts = {name: [0] * len(entry.counts) for name, entry in reference.features.items()}
    for row in rows:
        for name, value in row.items():
            counts[name][reference.features[name].bin(value)] += 1
    return judge(reference, counts, {})[0].is_drift


def _zipped(path: Path, most: int) -> Iterable[Photo]:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png"))]
        random.Random(1).shuffle(names)
        for name in names[:most]:
            yield Image.open(io.BytesIO(archive.read(name))).convert("RGB")


def _folder(path: Path) -> Iterable[Photo]:
    for file in sorted(path.glob("*.jpg")):
        yield Image.open(file).convert("RGB")


def main() -> int:
    """Print the tables; with `--doc`, write them between its two marks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--windows", type=int, default=2000)
    parser.add_argument("--doc", type=Path)
    options = parser.parse_args()
    data = Path(os.environ.get("EDGEOPT_DATA", ""))
    if not (data / "cifar10").is_dir():
        print(
            "set EDGEOPT_DATA to the folder that holds cifar10, imagenet1k-sample and mlperf-tiny",
            file=sys.stderr,
        )
        return 2
    cases: list[Cifar | ImageNet] = [Cifar(data)]
    if options.model:
        cases.append(ImageNet(data, options.model))
    lines = []
    for case in cases:
        for line in table(case, options.windows):
            print(line, flush=True)
            lines.append(line)
        lines.append("")
    if options.doc:
        text = options.doc.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        tail = rest.partition(END)[2]
        body = "\n".join(lines).strip()
        options.doc.write_text(f"{head}{BEGIN}\n{body}\n{END}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
