# SPDX-License-Identifier: Apache-2.0
"""What tasks ask of outputs and labels, each with an answer that says what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.labels import Annotations
    from edgeopt.evaluate.outputs import Outputs


def output(outputs: Outputs, name: str = "") -> np.ndarray:
    """The output called `name`, the first without a name.

    Raises:
        RecipeError: The model has no such output.
    """
    if not name:
        return next(iter(outputs.arrays.values()))
    if name not in outputs.arrays:
        raise RecipeError(seam.unknown("output", name, outputs.arrays))
    return outputs.arrays[name]


def rows(outputs: Outputs, name: str, what: str) -> np.ndarray:
    """The output as (samples, n); axes of length 1 do not count.

    Raises:
        RecipeError: It has more axes.
    """
    found = output(outputs, name)
    shape = tuple(axis for axis in found.shape[1:] if axis != 1)
    if len(shape) > 1:
        raise RecipeError(
            f"expected {what} as one row a sample, found an output of shape {found.shape}; name another with `output`"
        )
    return found.reshape(len(found), -1)


def labels(outputs: Outputs, what: str) -> np.ndarray:
    """The labels as one array, samples first.

    Raises:
        RecipeError: The data has none, or mappings.
    """
    if outputs.labels is None:
        found = (
            "none" if outputs.annotations is None else f"named parts ({', '.join(outputs.annotations[0])})"
        )
        raise RecipeError(f"expected {what} as labels, the data has {found}; give them as y in the .npz file")
    return outputs.labels


def parts(outputs: Outputs, wanted: tuple[str, ...], what: str) -> Annotations:
    """The labels as mappings that have the parts `wanted`.

    Raises:
        RecipeError: The data has none, one array, or lacks a part.
    """
    found = outputs.annotations
    has = tuple(found[0]) if found else () if outputs.labels is None else ("one array",)
    if found is None or not set(wanted) <= set(has):
        raise RecipeError(
            f"expected {what} as labels with the parts {', '.join(wanted)} (in an .npz file: "
            f"{', '.join(f'y.{part}' for part in wanted)}), found {', '.join(has) or 'none'}"
        )
    return found


def classes(outputs: Outputs, count: int, *, offset: int = 0) -> np.ndarray:
    """The labels plus `offset` as class indexes below `count`, one a sample.

    Raises:
        RecipeError: They are not.
    """
    found = labels(outputs, "class indexes")
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise RecipeError(f"expected one class index a sample as labels, found {found.dtype} {found.shape}")
    check_classes(found + offset, count)
    return found + offset


def check_classes(found: np.ndarray, count: int) -> None:
    """Refuse class indexes outside of 0 to `count` - 1.

    Raises:
        RecipeError: There are some.
    """
    if found.size and (found.min() < 0 or found.max() >= count):
        raise RecipeError(
            f"labels run from {found.min()} to {found.max()}, the model has the classes 0 to {count - 1}; "
            "check labels.csv, or the order of the class folders"
        )
