# SPDX-License-Identifier: Apache-2.0
"""How good a file is beside the float file: metric with interval, agreement, SQNR, KL, clipped outputs, coverage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from running import open_file, runtime_of

if TYPE_CHECKING:
    import numpy as np
    from models import About

    from edgeopt.evaluate.outputs import Outputs


@dataclass
class Row:
    """One file of the table; a row with an `error` has nothing else."""

    name: str
    runtime: str = ""
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
    integer_share: float | None = None
    coverage: str = ""
    p50_ns: dict[str, float] = field(default_factory=dict)
    against_float: dict[str, float] = field(default_factory=dict)
    build_s: float | None = None
    peak_bytes: int = 0
    base_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The samples that nobody calibrated with, and what the float model says of them."""

    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    about: About

    @classmethod
    def load(cls, path: Path, about: About) -> Evaluation:
        """Read the arrays of a prepared model."""
        import numpy as np

        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return cls(
            {name: array for name, array in arrays.items() if name != "labels"}, arrays.get("labels"), about
        )

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def sample(self, number: int) -> dict[str, np.ndarray]:
        """One sample, batch 1."""
        import numpy as np

        return {name: np.ascontiguousarray(array[number]) for name, array in self.arrays.items()}

    def outputs(self, file: Path) -> Outputs:
        """What a file says of every sample. Outputs are named by number: every converter has names of its own."""
        import numpy as np

        from edgeopt.evaluate.outputs import Outputs

        run = open_file(file, 1)
        found = [run(self.sample(number)) for number in range(len(self))]
        columns = zip(*found, strict=True)
        arrays = {
            f"output {number}": np.concatenate([np.asarray(row, np.float32) for row in column])
            for number, column in enumerate(columns)
        }
        return Outputs(arrays, self.labels)


def judge(row: Row, file: Path, floats: Path, given: Evaluation, baseline: Outputs) -> None:
    """Fill in everything but times."""
    from edgeopt.evaluate.fidelity import measure_fidelity
    from edgeopt.evaluate.statistics import interval
    from edgeopt.evaluate.tasks import load_task

    outputs = given.outputs(file)
    found = measure_fidelity(baseline, outputs)
    row.sqnr_db, row.agreement, row.kl = found.sqnr_db, found.agreement, found.kl
    row.clipped_share, row.size_bytes = found.clipped_share, file.stat().st_size
    if given.about.task:
        task = load_task(given.about.task, given.about.options)
        score = task.score(outputs, baseline).scores[0]
        row.metric, row.value = score.name, score.value
        around = interval(score)
        if around:
            row.low, row.high = around.low, around.high
    _cover(row, file, floats, given.sample(0))


def _cover(row: Row, file: Path, floats: Path, sample: Mapping[str, Any]) -> None:
    """What the runtime computes in integers; a file that the reader does not understand says so."""
    from edgeopt.coverage import read
    from edgeopt_wire.errors import EdgeoptError

    reference = floats if floats.suffix == file.suffix else None
    named = sample if file.suffix == ".onnx" else None
    try:
        found = read(file, runtime_of(file), reference=reference, sample=named)
    except EdgeoptError as error:
        row.coverage = f"not read: {error}"
        return
    row.integer_share, row.coverage = found.mac_share, found.sentence()
