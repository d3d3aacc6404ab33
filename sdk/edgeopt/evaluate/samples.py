# SPDX-License-Identifier: Apache-2.0
"""Data sets: a folder of images, an .npz file, texts or a Python factory, as samples with batch 1.

Rules:
- Order is by name; a limit draws a subset with a seed. The digest is of the content that is used, not of dates.
- A folder of images is labelled by its labels.csv, by boxes or masks beside them (`photo_labels`), or by class folders.
- Images are decoded when they are walked over, so that memory does not grow with the data set.
- What does not fit the model is refused before anything long begins, with the file, what was expected and found.
"""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeopt.evaluate import labels as labelling
from edgeopt.evaluate import photo_labels
from edgeopt.evaluate.preprocess import Preprocess
from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.labels import Label
    from edgeopt.evaluate.photo_labels import Pending
    from edgeopt.evaluate.texts import TextPreprocess

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
LABEL_COLUMNS = ("label", "class_index", "class", "category")
VALUE_COLUMNS = ("target", "value")
TEXT_COLUMNS = ("text", "transcript")
FILE_COLUMNS = ("file", "filename", "image", "path")


@dataclass(frozen=True)
class Sample:
    """Inputs by name, batch 1, and the label where the data has labels: a class index or what `labels` knows."""

    inputs: Mapping[str, np.ndarray]
    label: Label | None = None


class Samples(Protocol):
    """A data set that can be walked over again and again."""

    @property
    def digest(self) -> str:
        """SHA-256 of everything that is used, preprocessing included."""
        ...

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Sample]: ...


def load_samples(
    spec: str,
    inputs: tuple[TensorSpec, ...],
    preprocess: Preprocess | TextPreprocess | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
) -> Samples:
    """Open the data set that `spec` names for a model with these inputs.

    Raises:
        RecipeError: It is not there, is empty, cannot be read, or does not fit the model.
    """
    path = Path(spec)
    if path.is_dir():
        samples: Samples = _open_folder(path, inputs, preprocess, limit, seed)
    elif spec.endswith(".txt"):
        from edgeopt.evaluate.texts import open_texts

        samples = open_texts(path, inputs, preprocess, lambda lines: _subset(lines, limit, seed))
    elif spec.endswith(".npz"):
        samples = _open_npz(path, inputs, limit, seed)
    elif ":" in spec:
        samples = _open_factory(spec, inputs, limit, seed)
    else:
        raise RecipeError(
            f"cannot tell what data {spec!r} is; expected a folder of images, an .npz file, a .txt of texts, package.module:factory or "
            f"file.py:factory; looked at {path.absolute()}"
        )
    next(iter(samples))  # the first sample is read now, so that a wrong shape is said now
    return samples


@dataclass(frozen=True)
class _Photos:
    files: tuple[tuple[Path, Label | Pending | None], ...]
    spec: TensorSpec
    preprocess: Preprocess
    digest: str

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Sample]:
        for path, label in self.files:
            known = label.read(path, self.preprocess) if isinstance(label, photo_labels.Pending) else label
            yield Sample({self.spec.name: self.preprocess.photo(path, self.spec)}, known)


@dataclass(frozen=True)
class _Arrays:
    """Arrays of (samples, *the input's own shape)."""

    arrays: Mapping[str, np.ndarray]
    labels: Sequence[Label] | None
    digest: str

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __iter__(self) -> Iterator[Sample]:
        for number in range(len(self)):
            label = None if self.labels is None else self.labels[number]
            yield Sample({name: array[number] for name, array in self.arrays.items()}, label)


def random_samples(inputs: tuple[TensorSpec, ...], count: int, *, seed: int) -> Samples:
    """Standard normal inputs (zeros for integers), for a build that was given no data at all."""
    import numpy as np

    generator = np.random.default_rng(seed)
    arrays = {}
    for spec in inputs:
        shape = (count, *spec.shape)
        is_float = np.dtype(spec.dtype).kind == "f"
        arrays[spec.name] = (generator.standard_normal(shape) if is_float else np.zeros(shape)).astype(
            spec.dtype
        )
    return _Arrays(arrays, None, f"random-{count}-{seed}")


def _open_folder(
    folder: Path, inputs: tuple[TensorSpec, ...], preprocess: object, limit: int | None, seed: int
) -> _Photos:
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        found = ", ".join(f"{spec.name} {spec.shape}" for spec in inputs)
        raise RecipeError(
            f"a folder of images fits a model with one 4-axis input, this one has {found}; use an .npz file"
        )
    spec = inputs[0]
    if not isinstance(preprocess, Preprocess):
        side = spec.shape[1] if spec.layout == "NHWC" else spec.shape[2]
        raise RecipeError(
            "nothing says how a photo becomes this model's input, and guessing would spoil every figure; put "
            f"[preprocess] with resize, crop = {side}, mean and std into the recipe"
        )
    labels = folder / "labels.csv"
    files: list[tuple[Path, Label | Pending | None]]
    if labels.is_file():
        files = [*_listed(labels)]
    else:
        beside = photo_labels.find(folder)
        files = [*(beside if beside is not None else _class_folders(folder) or _flat(folder))]
    if not files:
        raise RecipeError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    chosen = tuple(_subset(files, limit, seed))
    digest = hashlib.sha256(canonical_bytes(preprocess.as_mapping()))
    for path, label in chosen:
        digest.update(_label_digest(label))
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise RecipeError(f"cannot read the image {path}: {error.strerror}") from error
    return _Photos(chosen, spec, preprocess, digest.hexdigest())


def _label_digest(label: Label | Pending | None) -> bytes:
    if label is None or isinstance(label, int):
        return f"{label} ".encode()
    return label.digest() if isinstance(label, photo_labels.Pending) else labelling.digest([label])


def _listed(table: Path) -> list[tuple[Path, Label]]:
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"cannot read {table}: {error}") from error
    columns = list(rows[0]) if rows else []
    file_column = next((name for name in FILE_COLUMNS if name in columns), None)
    known = (*LABEL_COLUMNS, *VALUE_COLUMNS, *TEXT_COLUMNS)
    label_column = next((name for name in known if name in columns), None)
    if file_column is None or label_column is None:
        raise RecipeError(
            f"{table}: expected a column for the file ({', '.join(FILE_COLUMNS)}) and one for the class index "
            f"({', '.join(LABEL_COLUMNS)}), a number ({', '.join(VALUE_COLUMNS)}) or a text "
            f"({', '.join(TEXT_COLUMNS)}), found {', '.join(columns) or 'nothing'}"
        )
    labels = _column([row[label_column] for row in rows], label_column, table)
    found = [(table.parent / row[file_column], label) for row, label in zip(rows, labels, strict=True)]
    return sorted(found, key=lambda pair: pair[0])


def _column(texts: list[str], name: str, table: Path) -> list[Label]:
    import numpy as np

    if name in TEXT_COLUMNS:
        return [*texts]
    kind, what = (int, "class index") if name in LABEL_COLUMNS else (float, "number")
    found = []
    for number, text in enumerate(texts, start=2):
        try:
            found.append(kind(text))
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{table}, line {number}: {text!r} is no {what}") from error
    return labelling.split(np.asarray(found))


def _class_folders(folder: Path) -> list[tuple[Path, int | None]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [(path, index) for index, name in enumerate(classes) for path in _images(name)]


def _flat(folder: Path) -> list[tuple[Path, int | None]]:
    return [(path, None) for path in _images(folder)]


def _images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def _open_npz(path: Path, inputs: tuple[TensorSpec, ...], limit: int | None, seed: int) -> _Arrays:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise RecipeError(f"the data {path} is not a file here; looked at {path.absolute()}") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise RecipeError(
            f"cannot read {path}: {error}; save it with numpy.savez and plain arrays"
        ) from error
    return _of_arrays(arrays, str(path), inputs, limit, seed)


def _open_factory(spec: str, inputs: tuple[TensorSpec, ...], limit: int | None, seed: int) -> _Arrays:
    import numpy as np

    from edgeopt.factory import call_factory

    made = call_factory(spec)
    if isinstance(made, Mapping):
        try:
            arrays = {str(key): np.asarray(value) for key, value in made.items()}
        except ValueError as error:
            raise RecipeError(
                f"{spec}() returned a mapping with rows of different lengths: {error}; pad them, or return pairs of "
                "inputs and label"
            ) from error
        return _of_arrays(arrays, spec, inputs, limit, seed)
    if isinstance(made, np.ndarray):
        return _of_arrays({"x": made}, spec, inputs, limit, seed)
    try:
        pairs = [entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None) for entry in made]
    except TypeError as error:
        raise RecipeError(
            f"{spec}() must return an array, a mapping of arrays, or an iterable of inputs or (inputs, label); "
            f"found {type(made).__name__}"
        ) from error
    if not pairs:
        raise RecipeError(f"{spec}() returned no sample")
    rows = [dict(x) if isinstance(x, Mapping) else {inputs[0].name: x} for x, _ in pairs]
    arrays = {
        name: np.concatenate([_batched(np.asarray(row[name]), name, inputs) for row in rows])
        for name in rows[0]
    }
    labels = None
    if all(label is not None for _, label in pairs):
        labels = [labelling.tidy(label, spec) for _, label in pairs]
    return _of_arrays(arrays, spec, inputs, limit, seed, labels=labels)


def _batched(array: np.ndarray, name: str, inputs: tuple[TensorSpec, ...]) -> np.ndarray:
    spec = next((entry for entry in inputs if entry.name == name), inputs[0])
    has_samples = array.ndim == len(spec.shape) and spec.shape[0] == 1
    return array if has_samples else array[None]


def _of_arrays(
    arrays: Mapping[str, Any],
    where: str,
    inputs: tuple[TensorSpec, ...],
    limit: int | None,
    seed: int,
    *,
    labels: list[Label] | None = None,
) -> _Arrays:
    chosen: dict[str, Any] = {}
    for spec in inputs:
        name = spec.name if spec.name in arrays else "x" if len(inputs) == 1 and "x" in arrays else ""
        if not name:
            raise RecipeError(
                f"{where} has the arrays {', '.join(arrays) or 'none'}; the model's inputs are "
                f"{', '.join(s.name for s in inputs)} (one input may be called x, labels y or y.<part>)"
            )
        chosen[spec.name] = _fitting(arrays[name], spec, f"{where}, array {name!r}")
    counts = {name: len(array) for name, array in chosen.items()}
    labels = labels if labels is not None else labelling.find(arrays, where, chosen)
    if labels is not None:
        counts["labels"] = len(labels)
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise RecipeError(
            f"{where}: expected as many samples in every array and at least one, found {counts}"
        )
    order = _subset(list(range(next(iter(counts.values())))), limit, seed)
    digest = hashlib.sha256()
    for name in sorted(chosen):
        chosen[name] = chosen[name] if len(order) == len(chosen[name]) else chosen[name][order]
        digest.update(f"{name} {chosen[name].dtype} {chosen[name].shape} ".encode())
        digest.update(chosen[name].reshape(-1).view("u1"))
    if labels is not None:
        labels = [labels[number] for number in order]
        digest.update(labelling.digest(labels))
    return _Arrays(chosen, labels, digest.hexdigest())


def _fitting(array: Any, spec: TensorSpec, where: str) -> Any:
    import numpy as np

    own = (
        spec.shape[1:] if spec.shape[0] == 1 else spec.shape
    )  # what does not begin with a batch axis comes whole
    if array.shape[1:] not in (own, spec.shape):
        raise RecipeError(
            f"{where}: expected samples of shape {own} for the input {spec.name!r} (an array of shape "
            f"(n, {', '.join(map(str, own))})), found {array.shape}"
        )
    array = array.reshape(len(array), *spec.shape)
    if array.dtype.kind not in "fiub" or (np.dtype(spec.dtype).kind != "f" and array.dtype.kind == "f"):
        raise RecipeError(f"{where}: expected {spec.dtype} for the input {spec.name!r}, found {array.dtype}")
    return np.ascontiguousarray(array.astype(spec.dtype, copy=False))


def _subset(entries: list[Any], limit: int | None, seed: int) -> list[Any]:
    """A seeded draw in the entries' own order, so that it does not depend on how the folder is listed."""
    if limit is None or limit >= len(entries):
        return entries
    numbers = sorted(random.Random(seed).sample(range(len(entries)), limit))
    return [entries[number] for number in numbers]
