# SPDX-License-Identifier: Apache-2.0
"""How good a file is beside the float file: metric with interval, agreement, SQNR, KL, clipped outputs, coverage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation import Evaluation
from figures import agreement, divergence
from running import onnx_feed, runtime_of

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.outputs import Outputs
    from edgeopt.evaluate.scores import Score


@dataclass
class Row:
    """One file of the table; what an `error` left undone is not there. `peer` is empty for files that nobody made here."""

    name: str
    runtime: str = ""
    peer: str = ""
    error: str = ""
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
    stages: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    base_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)


def judge(row: Row, file: Path, floats: Path, given: Evaluation, baseline: Outputs) -> None:
    """Fill in everything but times. `floats` is the float file in the same runtime."""
    from edgeopt.evaluate.fidelity import measure_fidelity
    from edgeopt.evaluate.statistics import interval
    from edgeopt.evaluate.tasks import load_task

    row.size_bytes = file.stat().st_size
    row.of_float = row.size_bytes / floats.stat().st_size
    outputs = given.outputs(file)
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


def _chosen(scores: tuple[Score, ...], name: str) -> Score:
    return next((score for score in scores if score.name == name), scores[0])


def _cover(row: Row, file: Path, floats: Path, sample: Mapping[str, np.ndarray]) -> None:
    """What the runtime computes in integers; a file that the reader does not understand says so."""
    from edgeopt.coverage import read
    from edgeopt_wire.errors import EdgeoptError

    reference = floats if floats.suffix == file.suffix else None
    named = onnx_feed(file, sample) if file.suffix == ".onnx" else None
    try:
        found = read(file, runtime_of(file), reference=reference, sample=named)
    except EdgeoptError as error:
        row.coverage = f"not read: {error}"
        return
    row.integer_share, row.coverage = found.mac_share, found.sentence()
