# SPDX-License-Identifier: Apache-2.0
"""The recipe: what a user wants beyond the command line, in one TOML file.

Rules:
- Every key is known or an error that names the nearest; no option is ignored.
- A recipe has defaults for everything: without a file the command line alone decides.
- It is digested into the package's provenance, so equal recipes are equal bytes.

```toml
name = "efficientnet-lite0"           # of the package; default: the source's name
version = "1"                         # default: 12 digits of a digest of everything that went in
precisions = ["int8", "fp16"]         # default: what the device's profile lists, and what suits the model
runtimes = ["onnxruntime"]            # default: every runtime of the profile that is not optional
effort = "default"                    # or "quick", "extensive"
labels = "labels.txt"                 # one class a line, put into the package

[preprocess]                          # how a photo becomes the model's input
resize = 256
crop = 224
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]

# kind = "text"                       # or how a text does, with `vocabulary`, `lower_case`, `max_length`; docs/build.md

[postprocess]                         # what a device answers beside the outputs; docs/serving.md has the kinds
kind = "classify"
top = 5

[serving]                             # how a device serves it; docs/serving.md has the keys
max_batch = 16
max_delay_us = 2000

[calibration]
method = "mse"                        # or "minmax", "percentile", "entropy", "auto"; without any data: "batchnorm"
percentile = 99.999                   # of the percentile method
samples = 128
# input_range = [0.0, 1.0]            # of the batchnorm method alone, where [preprocess] does not say it

[quantize]
rounding = "gptq"                     # or "nearest": how weights meet the int8 grid
exclude = ["Softmax"]                 # ONNX operators, by name or type, that stay in float

[evaluate]                            # default: classification where the labels are class indexes
task = "detection"                    # or classification, segmentation, regression, embeddings, speech, frames, custom
metric = "map"                        # the figure that --max-drop is on; default: the task's first

[train]                               # train int8 files with the float model as teacher; kept only where better
data = "photos/train"                 # default: the calibration samples alone
minutes = 15

[search]                              # mixed precision; default: only where int8 does not keep --max-drop
min_sqnr_db = 26.0                    # or max_kl = 0.01: the goal in place of --max-drop
levels = ["int4"]                     # tried as well: weights of 4 bits; "int16": activations of 16 (LiteRT)
max_tries = 25

[passes.round_weights]                # options of one pass, by the names of its `Options`
samples = 64

[constants]                           # inputs of an ONNX model that never change; its branches are decided by them
sr = 16000

[[inputs]]                            # only where the model cannot say it itself
name = "x"
shape = [1, 3, 224, 224]
dtype = "float32"
layout = "NCHW"
```
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeopt.calibrate import Calibration
from edgeopt.evaluate.assess import Evaluation
from edgeopt.search import Aim
from edgeopt.training.options import Training
from edgeopt_wire import seam
from edgeopt_wire.document import canonical_bytes, from_json, to_json
from edgeopt_wire.errors import DocumentError, RecipeError
from edgeopt_wire.manifest import check_name
from edgeopt_wire.tensor import TensorSpec

EFFORTS = ("quick", "default", "extensive")
"""quick: nearest rounding, min-max ranges. default: rounding by second moments. extensive: channels
equalized and every range judged by the output's error as well, and a search where the budget is not met."""

PRECISIONS = ("int8", "int8-dynamic", "int8-weights", "int4-weights", "fp8-e4m3", "fp16", "bf16", "fp32")
ROUNDINGS = ("gptq", "nearest")
QUANTIZE_KEYS = {"exclude", "rounding"}
"""What the file keeps in its own table."""


@dataclass(frozen=True)
class Recipe:
    """What to build. Empty values mean: decide from the model and the device's profile."""

    name: str = ""
    version: str = ""
    precisions: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    effort: str = "default"
    labels: str = ""
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    postprocess: Mapping[str, Any] = field(default_factory=dict)
    serving: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    exclude: tuple[str, ...] = ()
    rounding: str = "gptq"
    evaluate: Evaluation = field(default_factory=Evaluation)
    search: Aim = field(default_factory=Aim)
    train: Training = field(default_factory=Training)
    passes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inputs: tuple[TensorSpec, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            for what, text in (("name", self.name), ("version", self.version)):
                if text:
                    check_name(text, what)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        if self.effort not in EFFORTS:
            raise RecipeError(seam.unknown("effort", self.effort, EFFORTS))
        if self.rounding not in ROUNDINGS:
            raise RecipeError(seam.unknown("rounding", self.rounding, ROUNDINGS))
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise RecipeError(seam.unknown("precision", precision, PRECISIONS))
        for name in self.passes:
            self.options(name)

    @property
    def thorough_calibration(self) -> Calibration:
        """The calibration as the effort wants it: every range judged by the output's error, or just the ends of what is seen."""
        is_default = self.calibration.method == Calibration().method
        if self.effort == "quick" and is_default:
            return dataclasses.replace(self.calibration, method="minmax")
        if self.effort == "extensive" and is_default:
            return dataclasses.replace(self.calibration, method="auto")
        return self.calibration

    def options(self, name: str) -> object | None:
        """The options of the pass called `name`, or None where it has none.

        Raises:
            RecipeError: There is no such pass, or it has no such option or another type for it.
        """
        kind = getattr(seam.load("edgeopt.passes", name), "Options", None)
        given = self.passes.get(name, {})
        where = f"[passes.{name}]"
        if kind is None:
            if given:
                raise RecipeError(f"{where}: this pass has no options")
            return None
        _check_keys(given, {entry.name for entry in dataclasses.fields(kind)}, where)
        try:
            found: object = from_json(kind, given, where)
        except (DocumentError, ValueError) as error:
            raise RecipeError(str(error)) from error
        return found

    def digest(self) -> str:
        """SHA-256 of the recipe's values."""
        import hashlib

        return hashlib.sha256(canonical_bytes(to_json(self))).hexdigest()


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from TOML.

    Raises:
        RecipeError: The file cannot be read, is no TOML, or has an unknown key or a wrong type.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} is not TOML: {error}") from error
    return _parse(data, path)


def _parse(data: dict[str, Any], path: Path) -> Recipe:
    known = {entry.name for entry in dataclasses.fields(Recipe)} - QUANTIZE_KEYS | {"quantize"}
    _check_keys(data, known, f"{path}")
    quantize = _table(data, "quantize", path)
    _check_keys(quantize, QUANTIZE_KEYS, f"{path} [quantize]")
    _check_keys(
        _table(data, "calibration", path),
        {entry.name for entry in dataclasses.fields(Calibration)},
        f"{path} [calibration]",
    )
    _check_keys(
        _table(data, "evaluate", path),
        {entry.name for entry in dataclasses.fields(Evaluation)},
        f"{path} [evaluate]",
    )
    _check_keys(
        _table(data, "search", path), {entry.name for entry in dataclasses.fields(Aim)}, f"{path} [search]"
    )
    for spec in data.get("inputs", []):
        _check_keys(spec, {entry.name for entry in dataclasses.fields(TensorSpec)}, f"{path} [[inputs]]")
    data = {**data, **_train(data, path)}
    values = {key: value for key, value in data.items() if key != "quantize"} | dict(quantize)
    if labels := data.get("labels"):
        values["labels"] = str(path.parent / str(labels))
    try:
        return from_json(Recipe, values, str(path))
    except DocumentError as error:
        raise RecipeError(str(error)) from error


def _train(data: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """`train = true`, or the table itself, which means always; options of the pass mean that it is wanted."""
    given = data.get("train")
    if given is None and "quantize_aware_training" in _table(data, "passes", path):
        given = True
    if isinstance(given, bool):
        return {"train": {"when": "always" if given else "never"}}
    table = _table(data, "train", path)
    _check_keys(table, {entry.name for entry in dataclasses.fields(Training)}, f"{path} [train]")
    if given is None:
        return {}
    beside = path.parent / str(
        table.get("data", "")
    )  # data may also be a factory, or below the working folder
    found = {"data": str(beside)} if table.get("data") and beside.exists() else {}
    return {"train": {"when": "always", **table, **found}}


def _table(data: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    table = data.get(key, {})
    if not isinstance(table, Mapping):
        raise RecipeError(f"{path}: {key} must be a table, found {type(table).__name__}")
    return table


def _check_keys(data: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise RecipeError(f"{where}: {seam.unknown('key', key, known)}")
