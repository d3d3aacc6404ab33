# SPDX-License-Identifier: Apache-2.0
"""Outputs of a model over a data set, kept as one array an output: (samples, ...)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.evaluate.samples import Samples

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Outputs:
    """What a model said: name -> (samples, ...) float32; `labels` is None where the data has none."""

    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def save(self, path: Path) -> None:
        """Write to an .npz file."""
        import numpy as np

        arrays: dict[str, Any] = {f"output.{name}": array for name, array in self.arrays.items()}
        if self.labels is not None:
            arrays["labels"] = self.labels
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Outputs:
        """Read what `save` wrote."""
        import numpy as np

        with np.load(path, allow_pickle=False) as archive:
            arrays = {
                name.removeprefix("output."): archive[name]
                for name in archive.files
                if name.startswith("output.")
            }
            return cls(arrays, archive["labels"] if "labels" in archive.files else None)


def collect(
    infer: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
    samples: Samples,
    on_sample: Callable[[], None] = lambda: None,
) -> Outputs:
    """Run every sample, batch 1."""
    import numpy as np

    rows: dict[str, list[np.ndarray]] = {}
    labels: list[int | None] = []
    for sample in samples:
        for name, array in infer(sample.inputs).items():
            rows.setdefault(name, []).append(np.asarray(array, np.float32)[0])
        labels.append(sample.label)
        on_sample()
    known = None if any(label is None for label in labels) else np.asarray(labels, np.int64)
    return Outputs({name: np.stack(arrays) for name, arrays in rows.items()}, known)
