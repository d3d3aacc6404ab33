# SPDX-License-Identifier: Apache-2.0
"""How good a file is beside the float file: metric with interval, agreement, SQNR, KL, clipped outputs, coverage.

`python judging.py REQUEST.json` judges one file in a process of its own, so that one that its runtime cannot run ends
nothing else; what it found lies beside the request.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation import Evaluation
from figures import agreement, divergence
from models import About
from running import onnx_feed, size_of

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.outputs import Outputs
    from edgeopt.evaluate.scores import Score

FLOAT = "onnxruntime"
"""Whose float file says what is right."""

BASELINE = "baseline.npz"
"""Beside the folders of the files that are judged: what that one says, kept for one run."""

LIMIT_S = 600
"""Loading a file and running all samples; more is a fault."""


@dataclass
class Row:
    """One file of the table; what an `error` left undone is not there.

    `peer` is empty for files that nobody made here, `bits` are those of the weights.
    """

    name: str
    runtime: str = ""
    peer: str = ""
    error: str = ""
    bits: int = 8
    metric: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    kl: float | None = None
    clipped_share: float | None = None
    size_bytes: int = 0
    of_float: float | None = None
    integer_share: float | None = None
    coverage: str = ""
    p50_ns: dict[str, float] = field(default_factory=dict)
    min_ns: dict[str, float] = field(default_factory=dict)
    against_float: dict[str, float] = field(default_factory=dict)
    best_against_float: dict[str, float] = field(default_factory=dict)
    build_s: float | None = None
    process_s: float | None = None
    cpu_s: float | None = None
    kept: bool = False
    stages: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    base_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)


def judge_apart(row: Row, file: Path, floats: Path, model: Path, limit: int | None, folder: Path) -> None:
    """Fill in everything but times, in a process of its own; what goes wrong is the row's error.

    `floats` is the float file of the same format, `model` the folder of the prepared model; `folder` takes what is said
    between the two. Judge one file before others at once: it leaves what the float file says beside `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    request, answer = folder / "request.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    asked = {
        "row": asdict(row),
        "file": str(file),
        "floats": str(floats),
        "model": str(model),
        "limit": limit,
    }
    request.write_text(json.dumps(asked), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).resolve()), str(request)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        row.error = f"{row.runtime} did not run all samples within {LIMIT_S} s"
        return
    if answer.is_file():
        vars(row).update(json.loads(answer.read_text(encoding="utf-8")))
        return
    said = (done.stderr.strip().splitlines() or [""])[-1]
    row.error = f"{row.runtime} does not run it (exit {done.returncode}): {said}"[:300]


def judge(row: Row, file: Path, floats: Path, given: Evaluation, baseline: Outputs) -> None:
    """Fill in everything but times; `baseline` is what the float file says in ONNX Runtime."""
    from edgeopt.evaluate.fidelity import measure_fidelity
    from edgeopt.evaluate.statistics import interval
    from edgeopt.evaluate.tasks import load_task

    row.size_bytes = size_of(file)
    row.of_float = row.size_bytes / size_of(floats)
    outputs = given.outputs(file, row.runtime)
    found = measure_fidelity(baseline, outputs)
    row.sqnr_db, row.clipped_share = found.sqnr_db, found.clipped_share
    task = load_task(given.about.task, given.about.options)
    score = _chosen(task.score(outputs, baseline).scores, given.about.metric)
    row.metric, row.value = score.name, score.value
    around = interval(score)
    if around:
        row.low, row.high = around.low, around.high
    row.agreement = agreement(task, outputs, baseline)
    row.kl = None if found.not_finite else divergence(task.name, outputs, baseline)
    _cover(row, file, floats, given.sample(0))


def _baseline(given: Evaluation, kept: Path) -> Outputs:
    """What the float file says, computed by the first who asks."""
    import numpy as np

    from edgeopt.evaluate.outputs import Outputs

    if kept.is_file():
        with np.load(kept, allow_pickle=False) as archive:
            return Outputs({name: archive[name] for name in archive.files}, given.labels)
    outputs = given.outputs(Path(given.about.files["onnx"]), FLOAT)
    np.savez(kept, **outputs.arrays)
    return outputs


def _chosen(scores: tuple[Score, ...], name: str) -> Score:
    return next((score for score in scores if score.name == name), scores[0])


def _cover(row: Row, file: Path, floats: Path, sample: Mapping[str, np.ndarray]) -> None:
    """What the runtime computes in integers; a file that the reader does not understand says so."""
    from edgeopt.coverage import read
    from edgeopt_wire.errors import EdgeoptError

    if file.suffix == ".xml":
        row.coverage = "not read: OpenVINO's own form of a model"
        return
    reference = floats if floats.suffix == file.suffix else None
    named = onnx_feed(file, sample) if file.suffix == ".onnx" else None
    try:
        found = read(file, row.runtime, reference=reference, sample=named)
    except EdgeoptError as error:
        row.coverage = f"not read: {error}"
        return
    row.integer_share, row.coverage = found.mac_share, found.sentence()


def main() -> None:
    """Judge one file."""
    from models import EVALUATION

    request = Path(sys.argv[1])
    asked = json.loads(request.read_text(encoding="utf-8"))
    row, model = Row(**asked["row"]), Path(asked["model"])
    given = Evaluation.load(model / EVALUATION, About.load(model), asked["limit"])
    baseline = _baseline(given, request.parent.parent / BASELINE)
    judge(row, Path(asked["file"]), Path(asked["floats"]), given, baseline)
    (request.parent / "answer.json").write_text(json.dumps(asdict(row)), encoding="utf-8")


if __name__ == "__main__":
    main()
