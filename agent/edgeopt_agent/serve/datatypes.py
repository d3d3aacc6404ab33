# SPDX-License-Identifier: Apache-2.0
"""The protocol's datatypes and numpy's, and the bytes of each. Shared by the server and the client.

Source: Open Inference Protocol v2, "Tensor Data Types"; Triton "Binary Tensor Data Extension": little-endian, row
major; an element of BYTES is its length in four bytes, then itself.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

BYTES = "BYTES"
DATATYPES = {
    "float32": "FP32",
    "float16": "FP16",
    "float64": "FP64",
    "int8": "INT8",
    "uint8": "UINT8",
    "int16": "INT16",
    "uint16": "UINT16",
    "int32": "INT32",
    "uint32": "UINT32",
    "int64": "INT64",
    "uint64": "UINT64",
    "bool": "BOOL",
}
DTYPES = {datatype: dtype for dtype, datatype in DATATYPES.items()}
_LENGTH = struct.Struct("<I")


def array_of(content: memoryview, dtype: str, shape: Sequence[int], what: str) -> np.ndarray:
    """The tensor in `content`, without a copy where it is aligned.

    Raises:
        RecipeError: The number of bytes is not that of the shape.
    """
    import numpy as np

    kind = np.dtype(dtype)
    expected = _product(shape) * kind.itemsize
    if len(content) != expected:
        raise RecipeError(
            f"{what}: shape {list(shape)} of {kind.name} has {expected} bytes, found {len(content)}"
        )
    array: np.ndarray = np.frombuffer(content, kind).reshape(shape)
    return array if array.flags.aligned else array.copy()


def items_of(content: memoryview, what: str) -> list[bytes]:
    """The elements of a BYTES tensor.

    Raises:
        RecipeError: The lengths do not add up.
    """
    items, at, end = [], 0, len(content)
    while at < end:
        if at + _LENGTH.size > end:
            raise RecipeError(f"{what}: a BYTES element's length is cut off at byte {at}")
        (size,) = _LENGTH.unpack_from(content, at)
        at += _LENGTH.size
        if at + size > end:
            raise RecipeError(f"{what}: a BYTES element of {size} bytes at {at}, only {end - at} follow")
        items.append(bytes(content[at : at + size]))
        at += size
    return items


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of a tensor as the protocol has them; an array of objects is BYTES."""
    import numpy as np

    if array.dtype.kind == "O":
        return memoryview(join_items([bytes(item) for item in array.reshape(-1)]))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def join_items(items: Sequence[bytes]) -> bytes:
    """A BYTES tensor of these elements."""
    return b"".join(part for item in items for part in (_LENGTH.pack(len(item)), item))


def from_json(data: Any, dtype: str, shape: Sequence[int], name: str) -> np.ndarray:
    """The tensor that JSON's numbers are.

    Raises:
        RecipeError: They are none, or not as many as the shape says.
    """
    import numpy as np

    try:
        found: np.ndarray = np.asarray(data, dtype=dtype).reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise RecipeError(f"{name}: the data does not fit: {error}") from error
    return found


def to_json(array: np.ndarray) -> list[Any]:
    """A tensor as JSON has it: one flat list, of texts where it is BYTES."""
    flat: list[Any] = array.reshape(-1).tolist()
    if array.dtype.kind == "O":
        return [bytes(item).decode("utf-8", "replace") for item in flat]
    return flat


def datatype_of(array: np.ndarray) -> str:
    """The protocol's name of an array's dtype."""
    return _datatype(array.dtype)


@functools.cache
def _datatype(dtype: np.dtype[Any]) -> str:
    return BYTES if dtype.kind == "O" else DATATYPES[dtype.name]


def _product(shape: Sequence[int]) -> int:
    found = 1
    for axis in shape:
        found *= axis
    return found
