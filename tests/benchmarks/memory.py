# SPDX-License-Identifier: Apache-2.0
"""What static quantization of EfficientNet-Lite0 needs in memory, with every range method, at 32 and at 512 images.

Each figure is the peak of a process of its own above what it held once its libraries were imported. It must be at most
`LIMIT_MIB`, and flat within `FLAT` from 32 to 512 images: the exit status says so. Photos are read one at a time; when
all were read, they come again mirrored.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

COUNTS = (32, 512)
LIMIT_MIB = 600
FLAT = 0.10
SIZE = 224


def main() -> None:
    """Measure each in a child, print a line a method, fail beyond the limits."""
    import registry

    from edgeopt.calibrate import METHODS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--cache", type=Path, default=Path(__file__).parents[2] / ".bench")
    parser.add_argument("--child", nargs=3, metavar=("METHOD", "COUNT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        method, count, where = args.child
        print(json.dumps(_measure(method, int(count), Path(where))))
        return
    folder, _ = registry.prepared("efficientnet-lite0", args.cache.absolute())
    bad: list[str] = []
    for method in args.methods.split(","):
        few, many = (_child(method, count, folder) for count in COUNTS)
        print(f"{method:12} {few:6.0f} MiB at {COUNTS[0]} images, {many:6.0f} MiB at {COUNTS[1]}", flush=True)
        if max(few, many) > LIMIT_MIB or abs(many - few) > FLAT * few:
            bad.append(method)
    if bad:
        sys.exit(f"more than {LIMIT_MIB} MiB, or not flat within {FLAT:.0%}: {', '.join(bad)}")


def _child(method: str, count: int, folder: Path) -> float:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", method, str(count), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{method}, {count} images: {done.stderr.strip()[-500:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def _measure(method: str, count: int, folder: Path) -> float:
    import onnx  # noqa: F401 - imported before the base is taken
    import onnxruntime  # noqa: F401
    from PIL import Image  # noqa: F401

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
    photos = Photos(folder / "photos" / "evaluation", model.inputs[0].name, count)
    apply(model, Order(scheme, Calibration(method, samples=count), photos))
    return _peak_mib() - base


class Photos:
    """So many photos by the name of the model's input, read when they are asked for."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self.folder, self.name, self.count = folder, name, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        import numpy as np
        from PIL import Image

        files = sorted(path for path in self.folder.iterdir() if path.suffix in {".jpg", ".jpeg", ".png"})
        for number in range(self.count):
            turn, index = divmod(number, len(files))
            photo = Image.open(files[index]).convert("RGB").resize((SIZE, SIZE))
            pixels = np.asarray(photo, np.float32).transpose(2, 0, 1)[None] / 255
            pixels = pixels[..., ::-1] if turn % 2 else pixels
            yield {self.name: np.ascontiguousarray((pixels - 0.498) / 0.502, np.float32)}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
