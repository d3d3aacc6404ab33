# SPDX-License-Identifier: Apache-2.0
"""What a data set says about a sample: a class, a text, an array of any shape, or named arrays (boxes, classes).

Rules:
- A label is an int (class), a str (transcript), an array (mask, target, padded indexes) or a mapping of arrays.
- Labels of one kind become one array with the samples first; mappings stay one a sample, because samples differ in
  their number of boxes.
- In an .npz file `y` (or `labels`) is one array; `y.boxes` and `y.classes` are the parts of a mapping. Where rows
  differ in length, integers are padded with `PADDING`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from edgeopt_wire.document import canonical_bytes
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    Label: TypeAlias = int | str | np.ndarray | Mapping[str, np.ndarray]
    Annotations: TypeAlias = tuple[Mapping[str, np.ndarray], ...]

LABEL_NAMES = ("y", "labels", "label")
PADDING = -1
"""Fills integer rows up to the longest; a class or an index is never negative."""


def split(array: np.ndarray) -> list[Label]:
    """Turn one array of labels, samples first, into a label a sample: whole numbers become ints, texts str."""
    import numpy as np

    if array.ndim == 1 and array.dtype.kind in "iub":
        return [int(value) for value in array]
    if (
        array.ndim == 1
        and array.dtype.kind == "f"
        and bool(np.all(np.trunc(array) == array) & np.isfinite(array).all())
    ):
        return [int(value) for value in array]
    if array.ndim == 1 and array.dtype.kind == "U":
        return [str(value) for value in array]
    return [np.asarray(row) for row in array]


def find(arrays: Mapping[str, np.ndarray], where: str, taken: Iterable[str] = ()) -> list[Label] | None:
    """Find the labels among the arrays of a file; None where it has none. `taken` are names of inputs.

    Raises:
        RecipeError: The parts of a mapping have different numbers of samples, or labels are no numbers and no text.
    """
    free = {name: array for name, array in arrays.items() if name not in set(taken)}
    for name in LABEL_NAMES:
        if name in free:
            if free[name].ndim == 0 or free[name].dtype.kind not in "fiubU":
                raise RecipeError(
                    f"{where}, array {name!r}: expected one label a sample, numbers or text, found "
                    f"{free[name].dtype} {free[name].shape}"
                )
            return split(free[name])
    parts = {
        name.partition(".")[2]: array
        for name, array in free.items()
        if name.partition(".")[0] in LABEL_NAMES and "." in name
    }
    if not parts:
        return None
    counts = {name: len(array) for name, array in parts.items()}
    if len(set(counts.values())) != 1:
        raise RecipeError(f"{where}: expected as many samples in every part of the labels, found {counts}")
    return [
        {name: array[number] for name, array in parts.items()}
        for number in range(next(iter(counts.values())))
    ]


def tidy(label: object, where: str) -> Label:
    """Turn what a user's factory gave as a label into one of ours.

    Raises:
        RecipeError: It is neither a number, a text, an array nor a mapping of arrays.
    """
    import numpy as np

    if isinstance(label, str):
        return label
    if isinstance(label, Mapping):
        return {str(key): _numbers(value, f"{where}, label part {key!r}") for key, value in label.items()}
    array = _numbers(label, f"{where}, label")
    if array.ndim == 0:
        found = split(array.reshape(1))[0]
        return found if isinstance(found, int) else array
    return np.asarray(array)


def stack(labels: Sequence[Label | None]) -> tuple[np.ndarray | None, Annotations | None]:
    """Join the labels of all samples: (array, None), (None, one mapping a sample), or nothing where one has none.

    Raises:
        RecipeError: The samples' labels are of different kinds or shapes.
    """
    import numpy as np

    known = [label for label in labels if label is not None]
    if not known or len(known) < len(labels):
        return None, None
    if all(isinstance(label, Mapping) for label in known):
        return None, _alike(cast("Annotations", known))
    if all(isinstance(label, str) for label in known):
        return np.asarray(known), None
    if any(isinstance(label, (str, Mapping)) for label in known):
        raise RecipeError(f"expected labels of one kind, found {_kinds(known)}")
    rows = [np.asarray(label) for label in known]
    if all(isinstance(label, int) for label in known):
        return np.asarray(known, np.int64), None
    if all(row.ndim == 1 and row.dtype.kind in "iu" for row in rows):
        return np.stack(_pad(rows)), None
    if len({row.shape for row in rows}) != 1:
        shapes = sorted({row.shape for row in rows})
        raise RecipeError(
            f"expected labels of one shape, found {shapes[0]} and {shapes[-1]}; give a mapping of arrays where "
            "samples differ (boxes), or pad"
        )
    return np.stack(rows), None


def digest(labels: Sequence[Label] | None) -> bytes:
    """Bytes that stand for the labels' content in a data set's digest; empty without labels."""
    import numpy as np

    if labels is None:
        return b""
    if all(isinstance(label, (int, str)) for label in labels):
        return canonical_bytes(list(labels))
    found = hashlib.sha256()
    for label in labels:
        parts: Mapping[str, Any] = label if isinstance(label, Mapping) else {"": label}
        for name in sorted(parts):
            array = np.ascontiguousarray(parts[name])
            found.update(f"{name} {array.dtype} {array.shape} ".encode())
            found.update(array.tobytes())
    return found.digest()


def _alike(rows: Sequence[Mapping[str, np.ndarray]]) -> Annotations:
    """The rows with the same parts in every sample; an empty part takes the shape that the others have."""
    import numpy as np

    names = tuple(rows[0])
    found: list[dict[str, np.ndarray]] = [{} for _ in rows]
    for number, row in enumerate(rows):
        if set(row) != set(names):
            raise RecipeError(
                f"expected the same parts in every label, found {', '.join(names)} in sample 0 and "
                f"{', '.join(row) or 'none'} in sample {number}"
            )
    for name in names:
        arrays = [np.atleast_1d(row[name]) for row in rows]
        shapes = {array.shape[1:] for array in arrays if array.size} or {arrays[0].shape[1:]}
        if len(shapes) != 1:
            raise RecipeError(
                f"labels, part {name!r}: expected rows of one shape, found {' and '.join(map(str, sorted(shapes)))}"
            )
        shape = shapes.pop()
        for row, array in zip(found, arrays, strict=True):
            row[name] = array if array.size else array.reshape(0, *shape)
    return tuple(found)


def _pad(rows: list[np.ndarray]) -> list[np.ndarray]:
    import numpy as np

    longest = max(len(row) for row in rows)
    return [np.pad(row.astype(np.int64), (0, longest - len(row)), constant_values=PADDING) for row in rows]


def _numbers(value: object, where: str) -> np.ndarray:
    import numpy as np

    try:
        array = np.asarray(value)
    except ValueError as error:
        raise RecipeError(f"{where}: expected an array, found rows of different lengths: {error}") from error
    if array.dtype.kind not in "fiub":
        raise RecipeError(f"{where}: expected numbers, found {type(value).__name__} ({array.dtype})")
    return array


def _kinds(labels: Sequence[Label]) -> str:
    return ", ".join(sorted({type(label).__name__ for label in labels}))
