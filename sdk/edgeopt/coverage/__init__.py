# SPDX-License-Identifier: Apache-2.0
"""Integer coverage: what a runtime really computes in integers, read from what the runtime itself made of a file.

Rules:
- Nothing is inferred from the file's own QuantizeLinear nodes: they say what was wished. What runs is what the
  runtime's optimizer left.
- A module of this folder is called like its runtime and offers `read(file) -> Coverage`.
- Conversions between floats and integers that stay cost time and compute nothing of the model: they are counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from edgeopt_wire import seam

PRODUCTS = "convolutions and matrix products"


@dataclass(frozen=True)
class Left:
    """An operator that computes in floats though the file is quantized: why, and what would help."""

    name: str
    type: str
    macs: int
    reason: str
    help: str


@dataclass(frozen=True)
class Coverage:
    """What runs in integers. `operators` counts what computes; `conversions` are the Quantize and Dequantize that stay.

    `dynamic` counts operators whose activations' range is found in every inference. Multiply-accumulates are those of
    convolutions and matrix products; `left_out` lists operators in the order in which they run. `outside` names
    operators that the runtime's fast kernels did not take, whatever their numbers.
    """

    runtime: str
    operators: int
    integer_operators: int
    products: int
    integer_products: int
    macs: int
    integer_macs: int
    conversions: int
    dynamic: int
    left_out: tuple[Left, ...] = ()
    outside: tuple[str, ...] = ()

    @property
    def mac_share(self) -> float:
        """The share of multiply-accumulates in integers; 1 where there is none at all."""
        return self.integer_macs / self.macs if self.macs else 1.0

    @property
    def first(self) -> Left | None:
        """The first operator that is not in integers."""
        return self.left_out[0] if self.left_out else None

    def sentence(self) -> str:
        """Say it in one line."""
        text = (
            f"{self.integer_products} of {self.products} {PRODUCTS} run in integers "
            f"({100 * self.mac_share:.1f} % of the multiply-accumulates), {self.conversions} conversions stay"
        )
        if self.dynamic:
            text += f", {self.dynamic} with ranges found at run time"
        return text


class _Reader(Protocol):
    def read(self, file: Path) -> Coverage: ...


def read(file: Path, runtime: str) -> Coverage:
    """Let `runtime` load the file and tell what it made of it.

    Raises:
        RecipeError: No module knows how to read this runtime's mind.
        RuntimeFailure: The runtime cannot load the file.
    """
    return cast("_Reader", seam.load(__name__, runtime)).read(file)


def problems(found: Coverage) -> tuple[str, ...]:
    """Name what is known to make a quantized file slow or no smaller in time, each with what to do."""
    said: list[str] = []
    floats = found.products - found.integer_products
    if floats:
        first = next(left for left in found.left_out if left.macs or left.type in PRODUCT_TYPES)
        said.append(
            f"{floats} of {found.products} {PRODUCTS} run in floats, first {first.type} {first.name}: {first.reason}; "
            f"{first.help}"
        )
    if found.dynamic:
        said.append(
            f"{found.dynamic} operators look for their activations' range in every inference; for convolutions that is "
            "slower than floats, so calibrate and quantize statically"
        )
    if found.outside:
        said.append(
            f"{len(found.outside)} of {found.operators} operators run outside the runtime's fast kernels, first "
            f"{found.outside[0]}; another operator in its place would be faster"
        )
    return tuple(said)


PRODUCT_TYPES = frozenset({
    "Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "QLinearConv", "QLinearMatMul",
    "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM",
    "LSTM", "GRU", "Attention", "QAttention", "MatMulNBits", "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED",
    "TRANSPOSE_CONV", "BATCH_MATMUL", "UNIDIRECTIONAL_SEQUENCE_LSTM",
})  # fmt: skip
"""What counts as a convolution or matrix product, in each runtime's words."""
