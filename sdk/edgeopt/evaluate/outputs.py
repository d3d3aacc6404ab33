# SPDX-License-Identifier: Apache-2.0
"""Outputs of a model over a data set, kept as one array an output: (samples, ...), with the labels beside them.

Masks and detectors' candidates are megabytes a sample, and a build holds the outputs of every artifact. So an array of
more than `IN_MEMORY_BYTES` lies in a file: in a temporary one while samples run, later in the .npz file itself, which
is not compressed. What looks at outputs goes through them a sample at a time.
"""

from __future__ import annotations

import math
import struct
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeopt.evaluate import labels as labelling
from edgeopt.evaluate.samples import Samples

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.labels import Annotations, Label


IN_MEMORY_BYTES = 64 * 2**20
"""Class scores of 16,000 samples; above this a mapped file costs nothing that a reader would notice."""
_ZIP_HEADER = struct.Struct("<26xHH")
"""The fixed part of a member's local header; it ends with the lengths of its name and of its extra field."""


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
        """Read what `save` wrote; large arrays are mapped, read-only, so the file must stay as it is."""
        import numpy as np

        mapped = _map(path)
        with np.load(path, allow_pickle=False) as archive:
            found = {name: mapped[name] if name in mapped else archive[name] for name in archive.files}
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
            if name not in arrays:
                arrays[name] = _room((len(samples), *row.shape))
            arrays[name][number] = row
        labels.append(sample.label)
        on_sample()
    found, annotations = labelling.stack(labels)
    return Outputs(arrays, found, annotations)


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """An array of float32 to be filled, in a temporary file that ends with it where it is large.

    All at once: joining rows when all samples ran would hold everything twice.
    """
    import numpy as np

    if 4 * math.prod(shape) <= IN_MEMORY_BYTES:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(prefix="edgeopt-outputs-") as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def _map(path: Path) -> dict[str, np.ndarray]:
    """The large arrays of an uncompressed .npz file, mapped where they lie."""
    import numpy as np

    found: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size <= IN_MEMORY_BYTES:
                continue
            file.seek(info.header_offset)
            file.seek(sum(_ZIP_HEADER.unpack(file.read(_ZIP_HEADER.size))), 1)
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, by_column, dtype = read(file)
            order: Literal["F", "C"] = "F" if by_column else "C"
            name = info.filename.removesuffix(".npy")
            found[name] = np.memmap(path, dtype, "r", offset=file.tell(), shape=shape, order=order)
    return found
