# SPDX-License-Identifier: Apache-2.0
"""Outputs of a model over a data set, kept as one array an output: (samples, ...), with the labels beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeopt.evaluate import labels as labelling
from edgeopt.evaluate.samples import Samples

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.labels import Annotations, Label


@dataclass(frozen=True)
class Outputs:
    """What a model said: name -> (samples, ...) float32.

    `labels` is one array, samples first: int64 (samples,) for classes, text, masks, targets. `annotations` is one
    mapping of arrays a sample (boxes). Both are None where the data has no labels.
    """

    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    annotations: Annotations | None = None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def save(self, path: Path) -> None:
        """Write to an .npz file."""
        import numpy as np

        arrays: dict[str, Any] = {f"output.{name}": array for name, array in self.arrays.items()}
        if self.labels is not None:
            arrays["labels"] = self.labels
        if self.annotations is not None:
            for name in self.annotations[0]:
                rows = [np.atleast_1d(row[name]) for row in self.annotations]
                arrays[f"label.{name}"] = np.concatenate(rows)
                arrays[f"count.{name}"] = np.asarray([len(row) for row in rows], np.int64)
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Outputs:
        """Read what `save` wrote."""
        import numpy as np

        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
        arrays = {
            name.removeprefix("output."): array for name, array in found.items() if name.startswith("output.")
        }
        parts = {
            name.removeprefix("label."): np.split(array, np.cumsum(found[f"count.{name[6:]}"])[:-1])
            for name, array in found.items()
            if name.startswith("label.")
        }
        rows = zip(*parts.values(), strict=True)
        annotations = tuple(dict(zip(parts, row, strict=True)) for row in rows) if parts else None
        return cls(arrays, found.get("labels"), annotations)


def collect(
    infer: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
    samples: Samples,
    on_sample: Callable[[], None] = lambda: None,
) -> Outputs:
    """Run every sample, batch 1; an output whose first axis is no batch (a recurrent state) is kept whole."""
    import numpy as np

    arrays: dict[str, np.ndarray] = {}
    labels: list[Label | None] = []
    for number, sample in enumerate(samples):
        for name, array in infer(sample.inputs).items():
            row = np.asarray(array, np.float32)
            row = row[0] if row.shape[:1] == (1,) else row
            if (
                name not in arrays
            ):  # the whole array at once: joining rows at the end would hold everything twice
                arrays[name] = np.empty((len(samples), *row.shape), np.float32)
            arrays[name][number] = row
        labels.append(sample.label)
        on_sample()
    found, annotations = labelling.stack(labels)
    return Outputs(arrays, found, annotations)
