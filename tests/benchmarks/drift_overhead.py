# SPDX-License-Identifier: Apache-2.0
"""What watching for drift costs in service: the same requests with and without it, in turns.

    python tests/benchmarks/drift_overhead.py [--rounds 2000] [--doc docs/monitoring.md]

In process, through everything that a request passes, on a vision net of about 4 ms and a photo of 224x224; ratios of
p50, of p90, and what one look takes. `every_s` 0 looks as often as the bound on its cost lets it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from serve_overhead import make_photo_net, put, timed

from edgeopt_agent.drift import Drift, DriftOptions
from edgeopt_agent.features import features_of
from edgeopt_agent.machine import Installed
from edgeopt_agent.serve.models import Models
from edgeopt_agent.service import Service
from edgeopt_agent.store import Store
from edgeopt_wire.manifest import Manifest
from edgeopt_wire.tensor import TensorSpec

IMAGE = TensorSpec("image", (1, 224, 224, 3), "uint8", "NHWC")
SCORES = TensorSpec("scores", (1, 1000), "float32")
LOOKS = 300
BEGIN, END = "<!-- drift overhead -->", "<!-- end of drift overhead -->"


def make(folder: Path, options: DriftOptions | None) -> Models:
    """The net in service, watched as `options` say, or not at all."""
    store = Store(folder)
    if not store.slot("photo", "A").exists():
        make_photo_net(folder / "net.onnx")
        put(store, "photo", folder / "net.onnx", {}, edges=(IMAGE, SCORES))
    drift = Drift(options) if options is not None else None
    models = Models(store, service=Service(lambda: datetime.now(UTC), drift=drift))
    models.activate("photo", Installed("A", "1", "0" * 64, "a"))
    return models


def look_us(manifest: Manifest, photo: np.ndarray, scores: np.ndarray) -> float:
    """Median microseconds of one look."""
    found = []
    for _ in range(LOOKS):
        began = time.perf_counter_ns()
        features_of(manifest, {"image": photo}, {"scores": scores})
        found.append(time.perf_counter_ns() - began)
    return float(np.median(found)) / 1000


def main() -> int:
    """Print the table; with `--doc`, write it between its two marks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--doc", type=Path)
    options = parser.parse_args()
    photo = np.random.default_rng(1).integers(0, 255, IMAGE.shape).astype(np.uint8)
    with tempfile.TemporaryDirectory() as name:
        ways = {
            "not watched": make(Path(name), None),
            "watched, `every_s` 1 (default)": make(Path(name), DriftOptions()),
            "watched, `every_s` 0": make(Path(name), DriftOptions(every_s=0)),
        }
        took = timed(
            {
                way: (lambda models=models: models.infer("photo", {"image": photo}))
                for way, models in ways.items()
            },
            options.rounds,
        )
        manifest = ways["not watched"].describe("photo").manifest
        scores = ways["not watched"].infer("photo", {"image": photo})[1]["scores"]
        look = look_us(manifest, photo, scores)
    bare = took["not watched"]
    lines = ["| request | p50 ms | p50 ratio | p90 ratio |", "|---|---:|---:|---:|"]
    for way, found in took.items():
        p50 = np.median(found)
        ratios = f"{p50 / np.median(bare):.4f} | {np.percentile(found, 90) / np.percentile(bare, 90):.4f}"
        lines.append(f"| {way} | {p50 / 1e6:.3f} | {ratios} |")
    lines += [
        "",
        f"One look at a photo takes {look:.0f} microseconds; load average {os.getloadavg()[0]:.1f}.",
    ]
    print("\n".join(lines))
    if options.doc:
        head, _, rest = options.doc.read_text(encoding="utf-8").partition(BEGIN)
        tail = rest.partition(END)[2]
        options.doc.write_text(f"{head}{BEGIN}\n{chr(10).join(lines)}\n{END}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
