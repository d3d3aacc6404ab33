# SPDX-License-Identifier: Apache-2.0
"""The samples that nobody calibrated with, and what a file says of each.

Rules:
- Outputs are named by number: every converter has names of its own.
- A recurrent model hears each recording from its beginning, with the state that the file itself made (closed loop); only
  its first output is kept, (recordings, frames).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from running import Run, open_file

if TYPE_CHECKING:
    import numpy as np
    from models import About

    from edgeopt.evaluate.outputs import Outputs


@dataclass(frozen=True)
class Evaluation:
    """Arrays by the names of the float file's inputs, samples first, and labels where there are any."""

    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    about: About

    @classmethod
    def load(cls, path: Path, about: About, limit: int | None = None) -> Evaluation:
        """Read the arrays of a prepared model, or `limit` samples that are spread evenly over them."""
        import numpy as np

        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        count = len(next(iter(arrays.values())))
        if limit is not None and limit < count:
            chosen = np.linspace(0, count - 1, limit).round().astype(int)
            arrays = {name: array[chosen] for name, array in arrays.items()}
        labels = arrays.pop("labels", None)
        return cls(arrays, labels, about)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def sample(self, number: int, frame: int = 0) -> dict[str, np.ndarray]:
        """What one inference is fed: a sample, or one frame of a recording with the state of its beginning."""
        import numpy as np

        rows = {name: array[number] for name, array in self.arrays.items()}
        rows |= {name: rows[name][frame] for name in self.about.steps}
        return {name: np.asarray(row, order="C") for name, row in rows.items()}

    def outputs(self, file: Path, runtime: str = "") -> Outputs:
        """What a file says of every sample, on one thread of its runtime, or of the one that is named."""
        import numpy as np

        from edgeopt.evaluate.outputs import Outputs

        run = open_file(file, 1, runtime)
        arrays: dict[str, np.ndarray] = {}
        for number in range(len(self)):
            found = [self._recording(run, number)] if self.about.loops else run(self.sample(number))
            for place, array in enumerate(found):
                name, row = (
                    f"output {place}",
                    array.reshape(array.shape[1:] if array.shape[:1] == (1,) else array.shape),
                )
                if name not in arrays:
                    arrays[name] = np.empty((len(self), *row.shape), np.float32)
                arrays[name][number] = row
        return Outputs(arrays, self.labels)

    def _recording(self, run: Run, number: int) -> np.ndarray:
        """The first output of every frame, (1, frames)."""
        import numpy as np

        loops = self.about.loops
        state: dict[str, np.ndarray] = {}
        said = []
        for frame in range(self.arrays[self.about.steps[0]].shape[1]):
            found = run({**self.sample(number, frame), **state})
            said.append(float(found[0].reshape(-1)[0]))
            state = {name: found[place] for name, place in loops.items()}
        return np.asarray([said], np.float32)
