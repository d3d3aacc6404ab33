# SPDX-License-Identifier: Apache-2.0
"""Integer coverage: what a runtime really computes in integers, read from what the runtime itself made of a file.

Rules:
- Nothing is inferred from the file's own QuantizeLinear nodes: they say what was wished. What runs is what the
  runtime's optimizer left.
- A module of this folder is called like its runtime and offers `read(file, *, reference, sample) -> Coverage`.
- Conversions between floats and integers that stay cost time and compute nothing of the model: they are counted apart.
  What only moves values (reshapes, slices, pads) is not counted at all.
- A product of integers whose activations are quantized in every inference is one in integers, and is counted as dynamic
  too: it saves memory always, and time where quantizing costs less than multiplying (matrices yes, convolutions no).
- What multiplies floats by integers that it unpacks first computes in floats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from edgeopt.coverage._problems import PRODUCTS, problems
from edgeopt_wire import seam

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Arithmetic", "Coverage", "Left", "Step", "problems", "read", "tally"]


class Arithmetic(Enum):
    """What an operator computes with."""

    INTEGER = "integer"  # 8 bits in, 8 bits out (or 32, where a model ends)
    DYNAMIC = "dynamic"  # products of integers; the activations' range is found in every inference
    WIDE = "wide"  # 16-bit activations: more exact and seldom fast
    FLOAT = "float"


@dataclass(frozen=True)
class Left:
    """An operator that computes in floats: why, and what would help, in a sentence each; `cause` is alike for all of a kind."""

    name: str
    type: str
    macs: int
    reason: str
    help: str
    cause: str = ""


@dataclass(frozen=True)
class Step:
    """One operator as the runtime runs it; `left` says why where it does so in floats.

    `macs` is None where no shape could be told. `is_outside` marks what the runtime's fast kernels did not take,
    `is_wrong` what it is known to compute wrongly.
    """

    name: str
    type: str
    arithmetic: Arithmetic
    macs: int | None
    is_product: bool
    left: Left | None = None
    is_outside: bool = False
    is_wrong: bool = False


@dataclass(frozen=True)
class Coverage:
    """What runs in integers. `operators` counts what computes; `conversions` are the Quantize and Dequantize that stay.

    `dynamic` counts operators whose activations' range is found in every inference (`dynamic_types` says which types),
    `wide` those with 16-bit activations; both are among the integer ones. Multiply-accumulates are those of convolutions
    and matrix products; `uncounted` names products whose shapes could not be told. `left_out` lists operators in the
    order in which they run. `outside` names operators that the runtime's fast kernels did not take, whatever their
    numbers; `failure` says what could not be read, and why; `wrong` names those that it is known to compute otherwise than the file says.
    """

    runtime: str
    version: str
    operators: int
    integer_operators: int
    products: int
    integer_products: int
    macs: int
    integer_macs: int
    conversions: int
    dynamic: int
    dynamic_macs: int = 0
    dynamic_types: tuple[str, ...] = ()
    wide: int = 0
    left_out: tuple[Left, ...] = ()
    left_out_products: tuple[Left, ...] = ()
    wrong: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    outside_products: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()
    failure: str = ""

    @property
    def float_operators(self) -> int:
        """How many operators compute in floats."""
        return self.operators - self.integer_operators

    @property
    def product_share(self) -> float:
        """The share of convolutions and matrix products in integers; 1 where there is none at all."""
        return self.integer_products / self.products if self.products else 1.0

    @property
    def mac_share(self) -> float:
        """The share of multiply-accumulates in integers; by number of products where none could be counted."""
        return self.integer_macs / self.macs if self.macs else self.product_share

    @property
    def static_share(self) -> float:
        """The share of multiply-accumulates in integers whose ranges were fixed when the file was made."""
        if not self.macs:
            return self.product_share
        return (self.integer_macs - self.dynamic_macs) / self.macs

    @property
    def first(self) -> Left | None:
        """The first operator that is not in integers."""
        return self.left_out[0] if self.left_out else None

    def sentence(self) -> str:
        """Say it in one line."""
        share = f"{100 * self.mac_share:.1f} %" if self.macs or not self.products else "an unknown share"
        text = (
            f"{self.integer_products} of {self.products} {PRODUCTS} run in integers "
            f"({share} of the multiply-accumulates), {self.conversions} conversions stay"
        )
        if self.dynamic:
            text += f", {self.dynamic} with ranges found at run time"
        if self.wide:
            text += f", {self.wide} with 16-bit activations"
        return text


class _Reader(Protocol):
    def read(
        self, file: Path, *, reference: Path | None, sample: Mapping[str, np.ndarray] | None
    ) -> Coverage: ...


def read(
    file: Path,
    runtime: str,
    *,
    reference: Path | None = None,
    sample: Mapping[str, np.ndarray] | None = None,
) -> Coverage:
    """Let `runtime` load the file and tell what it made of it.

    `reference` is the model that this file was made of, in the same format: operators then have the names that they have
    there, as far as tensors kept theirs. `sample` (arrays by the names of inputs) gives free axes a length and takes the
    branches that real inputs take; without it one run is done on zeros, with free axes 1 long.

    Raises:
        RecipeError: No module knows how to read this runtime's mind.
        RuntimeFailure: The runtime cannot load the file, or cannot run the sample.
    """
    return cast("_Reader", seam.load(__name__, runtime)).read(file, reference=reference, sample=sample)


def tally(
    runtime: str, version: str, steps: Sequence[Step], *, conversions: int, failure: str = ""
) -> Coverage:
    """Count what a runtime's operators compute with; `steps` are in the order in which they run."""
    products = [step for step in steps if step.is_product]
    dynamic = [step for step in steps if step.arithmetic is Arithmetic.DYNAMIC]
    return Coverage(
        runtime=runtime,
        version=version,
        operators=len(steps),
        integer_operators=len(_integers(steps)),
        products=len(products),
        integer_products=len(_integers(products)),
        macs=_macs(products),
        integer_macs=_macs(_integers(products)),
        conversions=conversions,
        dynamic=len(dynamic),
        dynamic_macs=_macs(dynamic),
        dynamic_types=tuple(dict.fromkeys(step.type for step in dynamic)),
        wide=sum(step.arithmetic is Arithmetic.WIDE for step in steps),
        left_out=tuple(step.left for step in steps if step.left is not None),
        left_out_products=tuple(step.left for step in products if step.left is not None),
        wrong=tuple(step.name for step in steps if step.is_wrong),
        outside=tuple(step.name for step in steps if step.is_outside),
        outside_products=tuple(step.name for step in products if step.is_outside),
        uncounted=tuple(step.name for step in products if step.macs is None),
        failure=failure,
    )


def _integers(steps: Iterable[Step]) -> list[Step]:
    return [step for step in steps if step.arithmetic is not Arithmetic.FLOAT]


def _macs(steps: Iterable[Step]) -> int:
    return sum(step.macs or 0 for step in steps)
