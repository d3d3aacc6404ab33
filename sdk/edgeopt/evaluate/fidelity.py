# SPDX-License-Identifier: Apache-2.0
"""How near a candidate's outputs are to the baseline's, without any label.

Rules:
- SQNR is 10 log10(sum of squares of the baseline / sum of squares of the difference).
- Cosine is per sample over all values of an output, then averaged; a sample that is zero in both counts as 1, in one as
  0. An output of one value has none: its cosine would be the sign.
- Agreement and KL are told of outputs that look like classes: (samples, classes), at least two. KL is the mean over
  samples of KL(baseline || candidate) = sum p log(p / q), in nats, of softmax at temperature 1; where all of the
  baseline's rows are probabilities already (not negative, sum 1), of the rows themselves, nothing below
  `PROBABILITY_FLOOR`, so that an integer softmax that says zero costs much but not infinity.
- A sample is clipped where a value of the candidate stands at the end of its range while the baseline is beyond that by
  more than one step. The range is known where the output is quantized; else an end is found as the largest (smallest)
  value of all, given exactly by at least `SHARED_SAMPLES` samples and one in a hundred.
- Sums run in float64, a sample at a time, so that memory does not double.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import Affine, TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.outputs import Outputs

SQNR_CEILING_DB = 200.0
"""Identical outputs have no noise; they are reported as this, above what float32 can tell."""
PROBABILITY_FLOOR = 1e-6
"""Far below the step of an int8 probability (2^-8); a class that is wrongly called impossible costs 13.8 nats at most."""
SUM_TOLERANCE = 1e-3
"""Rows that sum to 1 within this are probabilities; float16 softmax of 1,000 classes stays within."""
SHARED_SAMPLES = 3
"""So many samples with exactly the same largest value are no accident of float arithmetic."""
INT8_STEPS = 255
"""Steps of the coarsest range that an undeclared quantized output has."""


@dataclass(frozen=True)
class OutputFidelity:
    """One output. `largest_error` is absolute, at `largest_at` = (sample, index, ...); None where there is no number."""

    name: str
    sqnr_db: float
    cosine: float | None
    largest_error: float | None
    largest_at: tuple[int, ...]
    clipped_share: float
    not_finite: int = 0
    agreement: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """All outputs: SQNR over all, cosine averaged, the share of samples with any clipped output.

    Agreement and KL are the first output's. `not_finite` counts values of NaN or infinity; SQNR is then
    `-SQNR_CEILING_DB`.
    """

    samples: int
    sqnr_db: float
    cosine: float | None
    clipped_share: float
    agreement: float | None
    kl: float | None
    outputs: tuple[OutputFidelity, ...]

    @property
    def not_finite(self) -> int:
        """How many values of the candidate are NaN or infinity."""
        return sum(output.not_finite for output in self.outputs)

    @property
    def is_equal(self) -> bool:
        """Whether every value of every output is the very same."""
        return all(output.largest_error == 0 for output in self.outputs)


def measure_fidelity(baseline: Outputs, candidate: Outputs, specs: tuple[TensorSpec, ...] = ()) -> Fidelity:
    """Compare a candidate with the baseline on the same samples.

    `specs` are the candidate's own outputs, in the order of the baseline's; where one is quantized, its `affine` says
    what can be represented. Shares are rounded to 1e-4, KL and cosine to 1e-5, decibels to 0.1, so that a signed
    manifest does not depend on the last bit.

    Raises:
        RecipeError: The outputs differ in names or shapes, or the baseline gives NaN or infinity.
    """
    import numpy as np

    found: list[OutputFidelity] = []
    signal = noise = 0.0
    clipped = np.zeros(len(baseline), bool)
    for number, (name, exact) in enumerate(baseline.arrays.items()):
        other = _matching(candidate, name, exact)
        limits = ends(other, specs[number] if number < len(specs) else None)
        hit = _clipped(exact, other, limits)
        one = _errors(name, exact, other)
        signal, noise, clipped = signal + one.signal, noise + one.noise, clipped | hit
        classes = exact.ndim == 2 and exact.shape[1] >= 2
        found.append(
            OutputFidelity(
                name,
                sqnr(one.signal, one.noise),
                one.cosine,
                one.largest,
                one.largest_at,
                round(float(hit.mean()), 4),
                one.not_finite,
                round(float((exact.argmax(1) == other.argmax(1)).mean()), 4) if classes else None,
                round(divergence(exact, other), 5) if classes and not one.not_finite else None,
            )
        )
    cosines = [output.cosine for output in found if output.cosine is not None]
    broken = any(output.not_finite for output in found)
    return Fidelity(
        samples=len(baseline),
        sqnr_db=sqnr(signal, noise),
        cosine=round(math.fsum(cosines) / len(cosines), 5) if cosines and not broken else None,
        clipped_share=round(float(clipped.mean()), 4),
        agreement=found[0].agreement,
        kl=found[0].kl,
        outputs=tuple(found),
    )


def sqnr(signal: float, noise: float) -> float:
    """Decibels from two sums of squares, rounded to 0.1, between `-SQNR_CEILING_DB` and `SQNR_CEILING_DB`."""
    if noise == 0:
        return SQNR_CEILING_DB
    if signal > 0 and math.isfinite(noise):
        return round(max(-SQNR_CEILING_DB, min(10 * math.log10(signal / noise), SQNR_CEILING_DB)), 1)
    return -SQNR_CEILING_DB


def divergence(baseline: np.ndarray, candidate: np.ndarray) -> float:
    """Mean KL(baseline || candidate) in nats of two (samples, classes), by the rule at the top."""
    import numpy as np

    exact, other = baseline.astype(np.float64), candidate.astype(np.float64)
    if (exact >= 0).all() and np.abs(exact.sum(1) - 1).max() <= SUM_TOLERANCE:
        p, q = (np.maximum(rows, PROBABILITY_FLOOR) for rows in (exact, other))
        log_p, log_q = (np.log(rows / rows.sum(1, keepdims=True)) for rows in (p, q))
    else:
        log_p, log_q = (_log_softmax(rows) for rows in (exact, other))
    each = (np.exp(log_p) * (log_p - log_q)).sum(1)
    return max(0.0, float(each.mean()))


@dataclass(frozen=True)
class Ends:
    """The smallest and largest value that an output can give, and its step; infinite where none is known."""

    low: float
    high: float
    low_step: float
    high_step: float


def ends(candidate: np.ndarray, spec: TensorSpec | None = None) -> Ends:
    """The ends of what the candidate can say: declared by `spec`, or found by the rule at the top."""
    if spec is not None and spec.affine is not None:
        return _declared(spec.dtype, spec.affine)
    high, high_step = _plateau(candidate, 1)
    low, low_step = _plateau(candidate, -1)
    return Ends(-low, high, low_step, high_step)


def _declared(dtype: str, affine: Affine) -> Ends:
    import numpy as np

    limits = np.iinfo(dtype)
    low, high = (affine.scale * (int(end) - affine.zero_point) for end in (limits.min, limits.max))
    return Ends(low, high, affine.scale, affine.scale)


def _plateau(values: np.ndarray, sign: int) -> tuple[float, float]:
    """The largest `sign` * value, if enough samples give exactly it, and the distance to the next (an int8 step at most).

    A sample at a time, so that no copy of all values is made.
    """
    import numpy as np

    tops = np.asarray([(sign * row).max() for row in values])
    if not np.isfinite(tops).all():
        return math.inf, 0.0
    top = tops.max()
    if int((tops == top).sum()) < max(SHARED_SAMPLES, len(values) / 100):
        return math.inf, 0.0
    below, bottom = -math.inf, math.inf
    for row in values:
        signed = sign * row
        below = max(below, float(signed.max(where=signed < top, initial=-math.inf)))
        bottom = min(bottom, float(signed.min()))
    if below == -math.inf:
        return math.inf, 0.0
    return float(top), min(float(top) - below, (float(top) - bottom) / INT8_STEPS)


def _clipped(baseline: np.ndarray, candidate: np.ndarray, limits: Ends) -> np.ndarray:
    """Which samples have a clipped value. Half a step of room is for the dequantized end's own rounding."""
    import numpy as np

    found = np.zeros(len(candidate), bool)
    for number, (exact, other) in enumerate(zip(baseline, candidate, strict=True)):
        above = (other >= limits.high - limits.high_step / 2) & (exact > limits.high + limits.high_step)
        below = (other <= limits.low + limits.low_step / 2) & (exact < limits.low - limits.low_step)
        found[number] = np.any(above | below)
    return found


@dataclass(frozen=True)
class _Errors:
    signal: float
    noise: float
    cosine: float | None
    largest: float | None
    largest_at: tuple[int, ...]
    not_finite: int


def _errors(name: str, baseline: np.ndarray, candidate: np.ndarray) -> _Errors:
    import numpy as np

    signal = noise = cosine = 0.0
    largest, at = -1.0, 0
    not_finite = 0
    for number, (exact, other) in enumerate(_pairs(baseline, candidate)):
        if not np.isfinite(exact).all():
            raise RecipeError(
                f"the unmodified model gives NaN or infinity in output {name!r}; check preprocessing and data"
            )
        bad = int((~np.isfinite(other)).sum())
        not_finite += bad
        if bad:
            continue
        difference = np.abs(exact - other)
        signal += float(exact @ exact)
        noise += float(difference @ difference)
        cosine += _cosine(exact, other)
        place = int(difference.argmax())
        if difference[place] > largest:
            largest, at = float(difference[place]), number * difference.size + place
    if not_finite:
        return _Errors(signal, math.inf, None, None, (), not_finite)
    where = tuple(int(index) for index in np.unravel_index(at, baseline.shape))
    mean = round(cosine / len(baseline), 5) if baseline[0].size > 1 else None
    return _Errors(signal, noise, mean, largest, where, 0)


def _pairs(baseline: np.ndarray, candidate: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    import numpy as np

    for exact, other in zip(baseline, candidate, strict=True):
        yield np.ravel(exact).astype(np.float64), np.ravel(other).astype(np.float64)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    norms = math.sqrt(float(one @ one)) * math.sqrt(float(other @ other))
    if norms == 0:
        return float(not one.any() and not other.any())
    return float(one @ other) / norms


def _log_softmax(rows: np.ndarray) -> np.ndarray:
    import numpy as np

    shifted = rows - rows.max(1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found


def _matching(candidate: Outputs, name: str, exact: np.ndarray) -> np.ndarray:
    other = candidate.arrays.get(name)
    if other is None or other.shape != exact.shape:
        found = "none" if other is None else str(other.shape)
        raise RecipeError(f"output {name!r}: expected the baseline's shape {exact.shape}, found {found}")
    return other
