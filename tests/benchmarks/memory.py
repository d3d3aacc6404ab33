# SPDX-License-Identifier: Apache-2.0
"""What static quantization of EfficientNet-Lite0 needs in memory, with every range method, at 32 and at 512 images.

Each figure is the peak of a process of its own above what it held once its libraries were imported; both sides read the
same images one by one from a file. Ours must be at most `LIMIT_MIB`, and flat within `FLAT` from 32 to 512 images: the
exit status says so. The peer is ONNX Runtime's quantizer as its documentation calls it, which is stopped at `PEER_GIB`
of address space so that it cannot take the machine down. When all photos were read, they come again mirrored.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

COUNTS = (32, 512)
LIMIT_MIB = 600
FLAT = 0.10
PEER_GIB = 6
SHAPE = (1, 3, 224, 224)
MODEL = "efficientnet-lite0"
PEER, PEER_METHODS = "onnxruntime", ("minmax", "percentile", "entropy")
IMAGES = "images.f32"


@dataclass(frozen=True)
class Peak:
    """Mebibytes at each of `COUNTS`, or what was said instead."""

    who: str
    method: str
    found: tuple[float | str, ...]

    @property
    def is_good(self) -> bool:
        """Whether it keeps to the limits."""
        few, many = self.found
        if isinstance(few, str) or isinstance(many, str):
            return False
        return max(few, many) <= LIMIT_MIB and abs(many - few) <= FLAT * few

    @property
    def cells(self) -> tuple[str, ...]:
        """As a line of a table."""
        shown = (peak if isinstance(peak, str) else f"{peak:.0f}" for peak in self.found)
        return (self.who, self.method, *shown)


def main() -> None:
    """Measure each in a child, print a line each, fail beyond the limits."""
    args = _arguments()
    if args.child:
        who, method, count, folder = args.child
        measure = _ours if who == "ours" else _theirs
        print(json.dumps(measure(method, Images(Path(folder) / IMAGES, int(count)), Path(folder))))
        return
    import registry
    from environments import python_of
    from table import write_between

    cache = args.cache.absolute()
    folder, _ = registry.prepared(MODEL, cache)
    _write_images(folder)
    asked = [("ours", method, sys.executable) for method in args.methods.split(",")]
    if not args.ours:
        asked += [(PEER, method, str(python_of(PEER, cache))) for method in PEER_METHODS]
    peaks = []
    for who, method, python in asked:
        peaks.append(Peak(who, method, tuple(_child(python, who, method, count, folder) for count in COUNTS)))
        print(" ".join(f"{cell:>12}" for cell in peaks[-1].cells), flush=True)
    if args.markdown:
        write_between(args.markdown, _table(peaks), "memory")
    bad = [peak.method for peak in peaks if peak.who == "ours" and not peak.is_good]
    if bad:
        sys.exit(f"more than {LIMIT_MIB} MiB, or not flat within {FLAT:.0%}: {', '.join(bad)}")


def _arguments() -> argparse.Namespace:
    from_here = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="mse,minmax,percentile,entropy,auto", help="of ours, by comma")
    parser.add_argument("--ours", action="store_true", help="leave the peer out")
    parser.add_argument("--markdown", type=Path, help="also write the table here, between the page's marks")
    parser.add_argument("--cache", type=Path, default=from_here / ".bench")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def _table(peaks: list[Peak]) -> str:
    heads = ("", "ranges", *(f"MiB at {count} images" for count in COUNTS))
    rows = [heads, ("---", "---", *("---:" for _ in COUNTS)), *(peak.cells for peak in peaks)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _child(python: str, who: str, method: str, count: int, folder: Path) -> float | str:
    command = [python, str(Path(__file__).resolve()), "--child", who, method, str(count), str(folder)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 0:
        return float(json.loads(done.stdout.splitlines()[-1]))
    said = (done.stderr.strip().splitlines() or [""])[-1]
    if who == "ours":
        sys.exit(f"{method}, {count} images: {said[:300]}")
    return f"ends above {PEER_GIB} GiB" if _is_memory(said, done.returncode) else f"fails: {said[:200]}"


def _is_memory(said: str, code: int) -> bool:
    words = ("memoryerror", "bad_alloc", "allocat")
    return code < 0 or any(word in said.lower() for word in words)


def _ours(method: str, images: Images, folder: Path) -> float:
    import onnx  # noqa: F401 - imported before the base is taken
    import onnxruntime  # noqa: F401

    from edgeopt.calibrate import Calibration
    from edgeopt.passes import Order
    from edgeopt.passes.quantize_static import apply
    from edgeopt.plan import make_plan
    from edgeopt.recipe import Recipe
    from edgeopt.sources import load_source
    from edgeopt_profiles.profile import load_profile

    base = _peak_mib()
    model = load_source(str(folder / "model.onnx"), Recipe()).model
    wanted = [a for a in make_plan(load_profile("host"), Recipe()).artifacts if a.precision == "int8"]
    scheme = next(artifact.scheme for artifact in wanted if artifact.format == "onnx")
    images.name = model.inputs[0].name
    apply(model, Order(scheme, Calibration(method, samples=len(images)), images))
    return _peak_mib() - base


def _theirs(method: str, images: Images, folder: Path) -> float:
    import tempfile

    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    base = _peak_mib()
    resource.setrlimit(resource.RLIMIT_AS, (PEER_GIB * 2**30, PEER_GIB * 2**30))
    images.name = onnx.load(folder / "model.onnx", load_external_data=False).graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.rows = iter(images)

        def get_next(self) -> Any:
            return next(self.rows, None)

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
    with tempfile.TemporaryDirectory() as place:
        source, target = f"{place}/source.onnx", f"{place}/target.onnx"
        quant_pre_process(str(folder / "model.onnx"), source, skip_symbolic_shape=True)
        quantize_static(
            source, target, Reader(), per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, calibrate_method=methods[method],
        )  # fmt: skip
    return _peak_mib() - base


class Images:
    """So many images by the name of the model's input, read from the file when they are asked for."""

    def __init__(self, file: Path, count: int) -> None:
        self.file, self.count, self.name = file, count, ""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        import math

        import numpy as np

        values = math.prod(SHAPE)
        for number in range(self.count):
            row = np.fromfile(self.file, np.float32, values, offset=number * values * 4)
            yield {self.name: row.reshape(SHAPE)}


def _write_images(folder: Path) -> None:
    """The largest number of images as floats, which no child needs a decoder for."""
    import math

    import numpy as np
    from PIL import Image

    target, size = folder / IMAGES, SHAPE[-1]
    if target.is_file() and target.stat().st_size == max(COUNTS) * math.prod(SHAPE) * 4:
        return
    photos = sorted((folder / "photos" / "evaluation").iterdir())
    photos = [path for path in photos if path.suffix in {".jpg", ".jpeg", ".png"}]
    with target.open("wb") as file:
        for number in range(max(COUNTS)):
            turn, index = divmod(number, len(photos))
            photo = Image.open(photos[index]).convert("RGB").resize((size, size))
            pixels = np.asarray(photo, np.float32).transpose(2, 0, 1) / 255
            pixels = pixels[..., ::-1] if turn % 2 else pixels
            file.write(np.ascontiguousarray((pixels - 0.498) / 0.502, np.float32).tobytes())


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
