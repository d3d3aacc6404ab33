# SPDX-License-Identifier: Apache-2.0
"""What a child process is asked to do, and what it answers: read by peers in their own environments.

Rules:
- Standard library only at import, because a peer's environment does not hold this project.
- Files travel by path; arrays as .npz, samples first, every sample with its batch axis: (samples, 1, ...).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray]


NOT_APPLICABLE = "does not apply"
"""What the error of a peer that does not take a model begins with."""


class Unavailable(Exception):
    """A model cannot be had on this machine, or a peer does not take it; the message says why."""


@dataclass(frozen=True)
class Work:
    """One quantizer, one variant of it, one model. `files` holds the float model: format -> path."""

    peer: str
    variant: str
    files: dict[str, str]
    calibration: str
    target: str
    recipe: str = ""

    def source(self, name: str) -> Path:
        """The float model in a format.

        Raises:
            Unavailable: The model does not exist in it.
        """
        if name not in self.files:
            raise Unavailable(f"the model has no {name} file")
        return Path(self.files[name])

    def output(self, name: str) -> Path:
        """Where the quantized file goes."""
        return Path(self.target) / name

    def samples(self) -> Iterator[Arrays]:
        """Calibration samples by the names of the ONNX file's inputs, one after another."""
        import numpy as np

        with np.load(self.calibration, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        for number in range(len(next(iter(arrays.values())))):
            yield {name: np.asarray(array[number], order="C") for name, array in arrays.items()}


@dataclass(frozen=True)
class Outcome:
    """What became of it: a file, or an error.

    `seconds` is the quantization itself, after imports; `process_s` the whole process, `cpu_s` what it and its own
    children had of the processors; `stages` what ours says of its parts. `base_bytes` is the process's peak before it
    began, imports included. `kept` says that it was made by an earlier run.
    """

    file: str = ""
    error: str = ""
    seconds: float = 0.0
    process_s: float = 0.0
    cpu_s: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    base_bytes: int = 0
    peak_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    kept: bool = False

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def layout_for(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Give an NCHW array as NHWC where a file's input has that shape; everything else as it is."""
    import numpy as np

    if array.ndim == 4 and array.shape != shape and array.transpose(0, 2, 3, 1).shape == shape:
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1))
    return array
