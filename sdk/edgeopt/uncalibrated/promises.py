# SPDX-License-Identifier: Apache-2.0
"""Ranges that were promised before any sample ran, and how a quantizer finds their tensors in its own form of a model.

Names do not survive lowering, values do: each promised range is kept with the fingerprint of its tensor on one sample of
noise (`edgeopt.training.spans`). What was only moved or padded has the same ends as what it came from, and takes its
range. What is found in neither way gets the ends that it had on noise, and `alarms` names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.calibrate import Calibration, Observe, Stream
from edgeopt.ranges import Range
from edgeopt.training.spans import TOLERANCE, Fingerprint, LearnedRange
from edgeopt.uncalibrated import METHOD
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

FOUND, MADE_UP = "batchnorm", "noise"
"""How a range came to be, as `Range.method` says it."""


@dataclass(frozen=True)
class Promised(Calibration):
    """The calibration of a build without data: ranges that are known, and the fingerprints of their tensors."""

    method: str = METHOD
    known: tuple[LearnedRange, ...] = ()


def find_promised(observe: Observe, stream: Stream, known: Sequence[LearnedRange]) -> dict[str, Range]:
    """Give every tensor that `observe` shows its promised range, or the ends that it has on the stream's noise."""
    ranges: dict[str, Range] = {}
    made_up: dict[str, tuple[float, float]] = {}
    for number, sample in enumerate(stream.samples):
        if number == 0 or made_up:
            for name, values in observe(sample):
                span = _match(known, values) if number == 0 else None
                if span is not None:
                    ranges[name] = span
                elif name not in ranges:
                    made_up[name] = _wider(made_up.get(name, (0.0, 0.0)), values)
        stream.on_sample()
    return ranges | {name: Range(low, high, MADE_UP) for name, (low, high) in made_up.items()}


def fingerprint(
    spans: Mapping[str, tuple[float, float]], tensors: Iterable[tuple[str, np.ndarray]]
) -> tuple[LearnedRange, ...]:
    """Keep the ranges of tensors by name with the fingerprints that these tensors have on one sample."""
    return tuple(
        LearnedRange(name, *spans[name], Fingerprint.of(values))
        for name, values in tensors
        if name in spans and values.size
    )


def promised(calibration: Calibration) -> tuple[LearnedRange, ...]:
    """The ranges that a calibration without data holds.

    Raises:
        RecipeError: It holds none: whoever asked has not read the model's statistics.
    """
    if not isinstance(calibration, Promised) or not calibration.known:
        raise RecipeError(
            f'calibration method "{METHOD}" makes static int8 files of a build only; give --calibration DATA for this'
        )
    return calibration.known


def _match(known: Sequence[LearnedRange], values: np.ndarray) -> Range | None:
    """The range of the tensor with the same fingerprint, else of one with the same ends."""
    if values.size == 0 or not known:
        return None
    seen = Fingerprint.of(values)
    distance, number = min((span.print.distance(seen), number) for number, span in enumerate(known))
    if distance > TOLERANCE:
        distance, number = min((_ends_apart(span.print, seen), number) for number, span in enumerate(known))
    return Range(known[number].low, known[number].high, FOUND) if distance <= TOLERANCE else None


def _ends_apart(mine: Fingerprint, its: Fingerprint) -> float:
    """How far the ends are apart, zero included on both sides, as a share of the wider one's width."""
    low, high = min(mine.low, 0.0), max(mine.high, 0.0)
    apart = max(abs(low - min(its.low, 0.0)), abs(high - max(its.high, 0.0)))
    return apart / max(high - low, 1e-12)


def _wider(ends: tuple[float, float], values: np.ndarray) -> tuple[float, float]:
    return min(ends[0], float(values.min(initial=0.0))), max(ends[1], float(values.max(initial=0.0)))
