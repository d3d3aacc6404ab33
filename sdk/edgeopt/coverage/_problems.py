# SPDX-License-Identifier: Apache-2.0
"""Patterns that are known to make a quantized file slow or inexact, each with what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeopt.coverage import Coverage

FEW_CONVERSIONS = 4
"""A model with float edges needs one for each input and output; the share below is asked for above this many."""
MANY_OUTSIDE = 1 / 4
"""Operators outside the fast kernels that are worth a word; a pooling or a softmax at the end is none."""
LONGEST_NAME = 60
"""LiteRT's names are those of every layer that was merged, up to a thousand letters; their end tells them apart."""
MANY_CONVERSIONS = 1 / 4
"""Conversions an operator. ONNX Runtime's default int8 EfficientNet-Lite0 has 1.7 and is slower than floats; ours 0.03."""

PRODUCTS = "convolutions and matrix products"

_DYNAMIC_CONVOLUTIONS = ("ConvInteger", "CONV_2D", "DEPTHWISE_CONV_2D", "CONV_3D", "TRANSPOSE_CONV")


def problems(found: Coverage) -> tuple[str, ...]:
    """Name every such pattern that a coverage shows; an empty tuple is a file that runs as well as it can."""
    return (
        *_wrong(found),
        *_floats(found),
        *_conversions(found),
        *_dynamic(found),
        *_wide(found),
        *_outside(found),
        *_uncounted(found),
    )


def _wrong(found: Coverage) -> Iterator[str]:
    if found.wrong:
        yield (
            f"{len(found.wrong)} of {found.products} {PRODUCTS} give wrong results in this runtime, first "
            f"{_short(found.wrong[0])}: the scales of its weights lie along another axis than its outputs, and the runtime "
            "takes them for those of its outputs; quantize weights along the outputs"
        )


def _floats(found: Coverage) -> Iterator[str]:
    """One sentence for each cause that keeps convolutions or matrix products in floats."""
    causes = Counter(left.cause for left in found.left_out_products)
    for cause, count in causes.most_common():
        first = next(left for left in found.left_out_products if left.cause == cause)
        yield (
            f"{count} of {found.products} {PRODUCTS} run in floats, first {first.type} {_short(first.name)}: {first.reason}; "
            f"{first.help}"
        )


def _conversions(found: Coverage) -> Iterator[str]:
    """Quantize and Dequantize that were not fused: each walks over a whole tensor."""
    if not found.integer_operators or found.conversions <= max(
        FEW_CONVERSIONS, MANY_CONVERSIONS * found.operators
    ):
        return
    first = found.first
    where = (
        f"first at {first.type} {_short(first.name)}" if first else "none of them at an operator in floats"
    )
    yield (
        f"{found.conversions} conversions between integers and floats stay beside {found.operators} operators, {where}; "
        "each walks over a whole tensor: bring the operators between them into integers, or leave the whole stretch in "
        "floats"
    )


def _dynamic(found: Coverage) -> Iterator[str]:
    """Convolutions pay for finding ranges at run time and are slower than floats; large matrices gain from it."""
    slow = [name for name in found.dynamic_types if name in _DYNAMIC_CONVOLUTIONS]
    if slow:
        yield (
            f"{found.dynamic} operators look for their activations' range in every inference, {' and '.join(slow)} among "
            "them; for convolutions that is slower than floats: calibrate and quantize statically"
        )


def _wide(found: Coverage) -> Iterator[str]:
    if found.wide:
        yield (
            f"{found.wide} operators have 16-bit activations, for which CPUs have no fast kernels; keep them for the few "
            "layers that lose too much with 8 bits"
        )


def _outside(found: Coverage) -> Iterator[str]:
    if found.outside_products or len(found.outside) > MANY_OUTSIDE * found.operators:
        first = (*found.outside_products, *found.outside)[0]
        yield (
            f"{len(found.outside)} of {found.operators} operators run outside the runtime's fast kernels, "
            f"{len(found.outside_products)} of them {PRODUCTS}, first {_short(first)}; another operator in its place, or "
            "8-bit types, would be faster"
        )


def _uncounted(found: Coverage) -> Iterator[str]:
    if found.failure:
        yield found.failure
    elif found.uncounted:
        yield (
            f"the multiply-accumulates of {len(found.uncounted)} of {found.products} products could not be counted, first "
            f"{_short(found.uncounted[0])}: they stand in a branch that was not taken; give a sample that takes it"
        )


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"...{name[3 - LONGEST_NAME :]}"
