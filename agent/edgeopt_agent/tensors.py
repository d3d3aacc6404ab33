# SPDX-License-Identifier: Apache-2.0
"""Tensors of a model's signature to those of a variant, and back.

Rules:
- Specs are matched by position, arrays by name.
- A layout that differs is a transposition; an integer with an `affine` stands for a real value.
- Quantization is `clip(rint(real / scale) + zero_point)` in float32 with ties to even, as ONNX's QuantizeLinear
  (opset 13) defines it, so that host and device agree to the last bit.
- A float becomes an integer only through an affine; anything else would guess a scale and is refused.
- What is already as it should be is passed on without a copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgeopt_wire.errors import RecipeError, RuntimeFailure, UnsupportedError
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

_FLOATS = ("float32", "float16")


def to_variant(
    signature: Sequence[TensorSpec], variant: Sequence[TensorSpec], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Turn inputs by signature name into the variant's inputs by its own names.

    Raises:
        RecipeError: An input is missing, unknown, or has another shape or kind of dtype than the signature.
        UnsupportedError: The two specs cannot be converted into each other.
    """
    return Conversion(signature, variant).given(arrays)


def from_variant(
    variant: Sequence[TensorSpec], signature: Sequence[TensorSpec], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Turn a variant's outputs by its own names into outputs by signature name.

    Raises:
        RuntimeFailure: The runtime gave another tensor than the manifest says.
        UnsupportedError: The two specs cannot be converted into each other.
    """
    return Conversion(variant, signature).found(arrays)


class Conversion:
    """The way from one side's tensors to the other's, checked once and then used for every request."""

    def __init__(self, sources: Sequence[TensorSpec], targets: Sequence[TensorSpec]) -> None:
        import numpy as np

        check_convertible(sources, targets)
        pairs = zip(sources, targets, strict=True)
        self._pairs = tuple((s, t, _is_same(s, t), np.dtype(s.dtype)) for s, t in pairs)
        self._names = frozenset(spec.name for spec in sources)

    def given(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Convert what a caller gave.

        Raises:
            RecipeError: An array is missing, unknown, or not as its spec says.
        """
        if arrays.keys() != self._names:
            raise RecipeError(f"expected the inputs {sorted(self._names)}, found {sorted(arrays)}")
        found = {}
        for source, target, is_same, dtype in self._pairs:
            array = arrays[source.name]
            if array.dtype != dtype or array.shape != source.shape:
                array = _checked(array, source)
            found[target.name] = array if is_same else convert(array, source, target)
        return found

    def found(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Convert what a runtime gave.

        Raises:
            RuntimeFailure: It gave another tensor than its spec says.
        """
        found = {}
        for source, target, is_same, dtype in self._pairs:
            array = arrays.get(source.name)
            if array is None or array.shape != source.shape or array.dtype != dtype:
                raise RuntimeFailure(
                    f"output {source.name!r}: expected {_say(source)}, found "
                    + ("none" if array is None else f"{array.dtype.name} {array.shape}")
                )
            found[target.name] = array if is_same else convert(array, source, target)
        return found


def check_convertible(sources: Sequence[TensorSpec], targets: Sequence[TensorSpec]) -> None:
    """Refuse specs that `convert` cannot bring together.

    Raises:
        UnsupportedError: Their number, shapes, layouts or dtypes do not fit; the message names the tensor.
    """
    if len(sources) != len(targets):
        raise UnsupportedError(
            f"expected {len(sources)} tensors, found {len(targets)}; build the package again"
        )
    for source, target in zip(sources, targets, strict=True):
        where = f"tensors {source.name!r} ({_say(source)}) and {target.name!r} ({_say(target)})"
        if sorted(source.layout) != sorted(target.layout) and source.layout and target.layout:
            raise UnsupportedError(f"{where}: these layouts have different axes")
        if tuple(source.shape[axis] for axis in _order(source, target)) != target.shape:
            raise UnsupportedError(
                f"{where}: the shapes do not fit; say both layouts if the axes are permuted"
            )
        if _is_real(source) and not _is_real(target):
            raise UnsupportedError(f"{where}: a real value becomes an integer only through an affine")


def convert(array: np.ndarray, source: TensorSpec, target: TensorSpec) -> np.ndarray:
    """Convert an array that is as `source` says into one that is as `target` says (`check_convertible` holds)."""
    import numpy as np

    order = _order(source, target)
    if order != tuple(range(len(order))):
        array = np.ascontiguousarray(array.transpose(order))
    if source.affine == target.affine:
        return array.astype(target.dtype, copy=False)
    if source.affine is not None:
        shifted = array.astype(np.float32) - np.float32(source.affine.zero_point)
        array = shifted * np.float32(source.affine.scale)
    if target.affine is None:
        return array.astype(target.dtype, copy=False)
    limits = np.iinfo(target.dtype)
    integers = np.rint(array.astype(np.float32, copy=False) / np.float32(target.affine.scale))
    found: np.ndarray = np.clip(integers + target.affine.zero_point, limits.min, limits.max)
    return found.astype(target.dtype)


def _checked(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    import numpy as np

    if array.shape != spec.shape:
        raise RecipeError(f"input {spec.name!r}: expected shape {spec.shape}, found {array.shape}")
    if not np.can_cast(array.dtype, spec.dtype, "same_kind"):
        raise RecipeError(f"input {spec.name!r}: expected {spec.dtype}, found {array.dtype.name}")
    return array.astype(spec.dtype, copy=False)


def _order(source: TensorSpec, target: TensorSpec) -> tuple[int, ...]:
    if not source.layout or not target.layout:
        return tuple(range(len(source.shape)))
    return tuple(source.layout.index(axis) for axis in target.layout)


def _is_same(source: TensorSpec, target: TensorSpec) -> bool:
    order = _order(source, target)
    is_straight = order == tuple(range(len(order)))
    return is_straight and source.affine == target.affine and source.dtype == target.dtype


def _is_real(spec: TensorSpec) -> bool:
    return spec.dtype in _FLOATS or spec.affine is not None


def _say(spec: TensorSpec) -> str:
    return f"{spec.dtype} {spec.shape}" + (f" {spec.layout}" if spec.layout else "")
