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
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "litert": ".tflite", "executorch": ".pte"}


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
    """What a prepared model is.

    `files`: format -> float file. `given`: what a reader sees -> a quantized file that the model's makers published.
    `metric` names the task's score that is shown (default: the first). `recipe` is the TOML that our build is given.
    `loops`: input -> number of the output that feeds it, frame by frame; then an evaluation sample is a recording, the
    other inputs of `steps` have a frame axis, and the first output is collected. `bits` are widths of weights that are
    tried beside int8.
    """

    description: str
    task: str
    files: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    metric: str = ""
    recipe: str = ""
    loops: dict[str, int] = field(default_factory=dict)
    steps: tuple[str, ...] = ()
    bits: tuple[int, ...] = ()
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
    write_runs(path, {name: array[:, None] for name, array in inputs.items()}, labels)


def write_runs(path: Path, inputs: dict[str, np.ndarray], labels: np.ndarray | None = None) -> None:
    """Write arrays (samples, ...) whose samples are what a file is run with, as they are; labels are classes or texts."""
    import numpy as np

    arrays: dict[str, Any] = dict(inputs)
    if labels is not None:
        arrays["labels"] = labels if labels.dtype.kind == "U" else labels.astype(np.int64)
    np.savez(path, **arrays)


def write_recipe(place: Place, text: str) -> str:
    """Write what a user would put into the recipe of this model; returns its path."""
    path = place.folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_torch(
    place: Place, module: Any, examples: tuple[Any, ...]
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Export a PyTorch module and lower it to all others: format -> file, what did not lower, the inputs' names."""
    import torch

    from edgeopt.sources.torch_factory import TorchModel, export

    model = export(TorchModel(module, examples), "benchmark", place.name).model
    program = place.folder / "model.pt2"
    torch.export.save(model.program, program)
    files, notes = _lower(place, model, ("onnx", "litert", "executorch"))
    return {"torch": str(program), **files}, notes, tuple(spec.name for spec in model.inputs)


def write_onnx(place: Place, file: Path, recipe: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Bring an ONNX file that others made to the other formats, so that every peer has something to begin with."""
    from edgeopt.recipe import load_recipe
    from edgeopt.sources import load_source

    model = load_source(str(file), load_recipe(Path(recipe))).model
    files, notes = _lower(place, model, ("torch", "litert", "executorch"))
    return {"onnx": str(file), **files}, notes


def _lower(place: Place, model: Any, formats: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    from edgeopt_converters import path as conversion
    from edgeopt_wire.errors import EdgeoptError

    files, notes = {}, []
    for name in formats:
        try:
            program = conversion.convert(model, name).program
        except EdgeoptError as error:
            notes.append(f"no {name} file: {error}")
            continue
        files[name] = str(place.folder / f"model{SUFFIXES[name]}")
        _write(program, files[name])
    return files, tuple(notes)


def _write(program: Any, path: str) -> None:
    if path.endswith(SUFFIXES["torch"]):
        import torch

        torch.export.save(program, path)
    elif path.endswith(SUFFIXES["onnx"]):
        import onnx

        onnx.save(program, path)
    else:
        Path(path).write_bytes(bytes(program))
