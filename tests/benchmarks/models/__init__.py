# SPDX-License-Identifier: Apache-2.0
"""Real models to quantize, one module a family.

A module offers `NAMES` and `prepare(place) -> About`, which writes the float model in every format that it has, samples
that calibrate (`calibration.npz`) and others that evaluate (`evaluation.npz`, with `labels` where there are any) into
`place.folder`. A model that cannot be had raises `Unavailable`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from work import Unavailable

if TYPE_CHECKING:
    import numpy as np

CALIBRATION, EVALUATION, ABOUT = "calibration.npz", "evaluation.npz", "about.json"


@dataclass(frozen=True)
class Place:
    """Where a model is prepared: its name, its folder, the folder of everything that is kept between runs."""

    name: str
    folder: Path
    cache: Path

    def data(self, name: str) -> Path:
        """A file of the folder that EDGEOPT_DATA names.

        Raises:
            Unavailable: It is not there.
        """
        path = Path(os.environ.get("EDGEOPT_DATA", "")) / name
        if not os.environ.get("EDGEOPT_DATA") or not path.exists():
            raise Unavailable(f"{name} is needed; set EDGEOPT_DATA to a folder that holds it")
        return path


@dataclass(frozen=True)
class About:
    """`files`: format -> float file. `given`: what a reader sees -> a quantized file that the model's makers published."""

    description: str
    task: str
    files: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        """Write as JSON; it is written last, so a folder that has it is whole."""
        (folder / ABOUT).write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> About:
        """Read what `save` wrote."""
        return cls(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))


def write_samples(path: Path, inputs: dict[str, np.ndarray], labels: np.ndarray | None = None) -> None:
    """Write arrays (samples, ...) without batch axis as (samples, 1, ...), which is what every file is run with."""
    import numpy as np

    arrays: dict[str, Any] = {name: array[:, None] for name, array in inputs.items()}
    if labels is not None:
        arrays["labels"] = labels.astype(np.int64)
    np.savez(path, **arrays)


def write_torch(place: Place, module: Any, example: Any) -> tuple[dict[str, str], tuple[str, ...], str]:
    """Export a PyTorch module and lower it to ONNX and LiteRT: format -> file, what did not lower, the input's name."""
    import onnx
    import torch

    from edgeopt.sources.torch_factory import TorchModel, export
    from edgeopt_converters import path as conversion
    from edgeopt_wire.errors import EdgeoptError

    source = export(TorchModel(module, (example,)), "benchmark", place.name)
    program = place.folder / "model.pt2"
    torch.export.save(source.model.program, program)
    made = place.folder / "model.onnx"
    onnx.save(conversion.convert(source.model, "onnx").program, made)
    files, notes = {"torch": str(program), "onnx": str(made)}, []
    try:
        lowered = conversion.convert(source.model, "litert").program
        (place.folder / "model.tflite").write_bytes(bytes(lowered))
        files["litert"] = str(place.folder / "model.tflite")
    except EdgeoptError as error:
        notes.append(f"no LiteRT file: {error}")
    return files, tuple(notes), source.model.inputs[0].name
