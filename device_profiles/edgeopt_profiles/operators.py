# SPDX-License-Identifier: Apache-2.0
"""What the rules of a runtime and the graph of a model share: operators and their tensors, as plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tensor:
    """A tensor by name. An axis that is not known is -1; `dtype` is in lower case, e.g. "float32" or "int8"."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Operator:
    """One step of a model. `type` is the format's own word for it, e.g. "Conv" (ONNX) or "CONV_2D" (LiteRT).

    `macs` are multiply-accumulates of one inference, `weight_bytes` the constants that it reads (each constant of a
    model is counted once), `dtype` the numbers that it computes in ("int8" where it really computes in integers).
    """

    name: str
    type: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    macs: int
    weight_bytes: int
    dtype: str
