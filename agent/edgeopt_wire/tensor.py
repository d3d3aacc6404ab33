# SPDX-License-Identifier: Apache-2.0
"""What a tensor at a model's edge looks like, and how it differs between a model and a variant of it."""

from dataclasses import dataclass

DTYPES = ("float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool")


@dataclass(frozen=True)
class Affine:
    """Real value = scale * (integer - zero_point), per tensor."""

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, found {self.scale}")


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor with a static shape.

    `shape` includes the batch axis. `layout` names the axes of an image ("NCHW", "NHWC") and is empty where the
    order of axes means nothing to us. `affine` is set where `dtype` is an integer that stands for a real value.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str = ""
    affine: Affine | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"tensor {self.name!r}: dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if any(axis < 1 for axis in self.shape):
            raise ValueError(f"tensor {self.name!r}: shape {self.shape} must be static and positive")
        if self.layout and len(self.layout) != len(self.shape):
            raise ValueError(f"tensor {self.name!r}: layout {self.layout!r} does not fit shape {self.shape}")
