# SPDX-License-Identifier: Apache-2.0
"""Activation ranges from calibration samples, as a stream: one sample's tensors are in memory at a time.

Rules:
- One walk over the samples. A tensor's histogram grows by doubling its range, which merges bins in pairs and loses
  nothing; so memory is a fixed number of counters a tensor, however many samples there are.
- Ends are exact. Once a million values of a tensor are counted, every n-th counts n times, from another place each
  sample, and each sample's own two ends besides: rare peaks weigh in, and a photo costs a tenth of counting all.
- A range always holds zero, because padding and ReLU produce it and integers must say it exactly.
- A model's outputs keep their full range: a clipped logit changes the answer.
- A walk that was cut off goes on where it was, from a file that is replaced whole every few samples.

Why not the runtimes' own calibrators? ONNX Runtime's keep every activation of every sample (2.4 GB for 32 photos of
EfficientNet-Lite0), LiteRT's quantizer smooths the maximum over samples, which clips the outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.ranges import HALF, Distribution, Range, choose
from edgeopt_wire import seam
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

METHODS = ("minmax", "percentile", "mse", "entropy", "auto", "batchnorm")
CANDIDATES = ("minmax", "percentile", "mse", "entropy")
"""What `auto` chooses from, for every tensor by itself."""

SAVE_EVERY = 16
"""Samples between two saves of a walk that can be resumed."""

WHOLE, KEPT = 1 << 20, 1 << 13
"""Every value of a tensor is counted until `WHOLE` are; from then a sample adds `KEPT` or fewer, thinned evenly."""

FEW = 16
"""Up to so many values are added one by one: a count over all bins takes as long as thousands."""

Observe = Callable[["Mapping[str, np.ndarray]"], "Iterable[tuple[str, np.ndarray]]"]
"""Run one sample and give every (tensor name, values) of interest."""

Judge = Callable[[Mapping[str, Sequence[Range]]], Mapping[str, Range]]
"""Given candidates for every tensor, choose one for each."""


@dataclass(frozen=True)
class Calibration:
    """How ranges are chosen. `percentile` is the share of values, in percent, that is kept on both sides together.

    `auto` tries every method on every tensor and keeps the one with which the model's output changes least. `batchnorm`
    takes no samples but the statistics of batch normalization (`edgeopt.uncalibrated`), and what the model's inputs take:
    `input_range`, (low, high), which preprocessing says where there is some.
    """

    method: str = "mse"
    percentile: float = 99.999
    samples: int = 128
    input_range: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(seam.unknown("calibration method", self.method, METHODS))
        if not 90 <= self.percentile <= 100:
            raise RecipeError(f"calibration percentile must be 90 to 100, found {self.percentile}")
        if self.samples < 1:
            raise RecipeError(f"calibration needs at least one sample, found {self.samples}")
        if self.input_range and (len(self.input_range) != 2 or self.input_range[0] >= self.input_range[1]):
            raise RecipeError(f"calibration input_range must be [low, high], found {list(self.input_range)}")
        if self.input_range and self.method != "batchnorm":
            raise RecipeError(
                f'calibration input_range is for method = "batchnorm", found method {self.method!r}'
            )

    def sentence(self) -> str:
        """Say it in a few words."""
        if self.method == "percentile":
            return f"percentile {self.percentile}"
        return {
            "minmax": "min and max",
            "mse": "least squared error",
            "entropy": "least lost information",
            "batchnorm": "statistics of batch normalization, uncalibrated",
        }.get(self.method, "the method that changes the output least, tensor by tensor")


@dataclass(frozen=True)
class Stream:
    """The samples of a walk, where it saves itself, and who is told of every sample."""

    samples: Iterable[Mapping[str, np.ndarray]]
    checkpoint: Path | None = None
    on_sample: Callable[[], None] = lambda: None


def find_ranges(
    observe: Observe,
    stream: Stream,
    calibration: Calibration,
    *,
    keep_full: frozenset[str] = frozenset(),
    symmetric: bool = False,
    judge: Judge | None = None,
) -> dict[str, Range]:
    """Choose a range for every observed tensor.

    `keep_full` names tensors (the model's outputs) that take their full range with every method. `judge` chooses for
    `auto`; without one the expected squared error of each tensor by itself does. Promised ranges are only looked up.

    Raises:
        RecipeError: There is no sample, or a tensor holds NaN or infinity for one.
    """
    if calibration.method == "batchnorm":
        from edgeopt.uncalibrated.promises import find_promised, promised

        return find_promised(observe, stream, promised(calibration))
    found = observe_distributions(observe, stream)
    chosen: dict[str, Range] = {}
    candidates: dict[str, tuple[Range, ...]] = {}
    for name, distribution in found.items():
        if name in keep_full:
            chosen[name] = choose(distribution, "minmax")
        elif calibration.method == "auto":
            candidates[name] = _candidates(distribution, calibration, symmetric=symmetric)
        else:
            chosen[name] = choose(
                distribution, calibration.method, percentile=calibration.percentile, symmetric=symmetric
            )
    if candidates:
        chosen |= judge(candidates) if judge else _quietest(candidates, found, symmetric=symmetric)
    return {name: chosen[name] for name in found}


def alarms(ranges: Mapping[str, Range], outputs: frozenset[str]) -> tuple[str, ...]:
    """Say which tensors clip more than they round: outputs by name, others counted with the worst named."""
    made_up = sorted(name for name, span in ranges.items() if span.method == "noise")
    if made_up:
        more = f" and {len(made_up) - 3} more" if len(made_up) > 3 else ""
        said = (
            f"no statistics tell the ranges of {len(made_up)} of {len(ranges)} tensors ({', '.join(made_up[:3])}{more}): "
            "they have the ends that they took on noise"
        )
        return (said,)
    dominant = {name: span for name, span in ranges.items() if span.is_clipping_dominant}
    found = [
        f"output {name!r} is clipped: {100 * dominant[name].clipped:.3f} % of its values"
        for name in sorted(outputs & dominant.keys())
    ]
    inner = {name: span for name, span in dominant.items() if name not in outputs}
    if inner:
        worst = max(inner, key=lambda name: inner[name].clipped)
        found.append(
            f"clipping costs more than rounding in {len(inner)} of {len(ranges)} tensors, most in {worst!r} "
            f"({100 * inner[worst].clipped:.3f} % of its values); calibration method mse or auto, or a higher "
            "percentile, would clip less"
        )
    return tuple(found)


def observe_distributions(observe: Observe, stream: Stream) -> dict[str, Distribution]:
    """Walk over the samples once and give the distribution of every tensor that `observe` shows.

    Raises:
        RecipeError: There is no sample, or a tensor holds NaN or infinity for one.
    """
    walk = _Walk.resume(stream.checkpoint)
    for number, sample in enumerate(stream.samples):
        if number >= walk.seen:
            for name, values in observe(sample):
                walk.add(name, values, number)
            walk.seen = number + 1
            if stream.checkpoint is not None and walk.seen % SAVE_EVERY == 0:
                walk.save(stream.checkpoint)
        stream.on_sample()
    if not walk.counters:
        raise RecipeError("calibration needs at least one sample, the data has none")
    if stream.checkpoint is not None:
        stream.checkpoint.unlink(missing_ok=True)
    return {name: counter.distribution() for name, counter in walk.counters.items()}


class _Counter:
    """A histogram of one tensor whose range doubles when a value lies beyond it."""

    def __init__(self) -> None:
        import numpy as np

        self.low = self.high = 0.0
        self.exponent = -126
        self.zeros = 0
        self.counts = np.zeros(2 * HALF, np.int64)

    def add(self, values: np.ndarray, number: int) -> None:
        import numpy as np

        low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._grow(max(-low, high))
        flat = values.reshape(-1)
        stride = -(-flat.size // KEPT) if flat.size > KEPT and self.counts.sum() >= WHOLE else 1
        if stride > 1:
            self._count(np.array([low, high], np.float32), 1)
            flat = flat[number % stride :: stride]
        self._count(flat, stride)

    def _count(self, values: np.ndarray, weight: int) -> None:
        import numpy as np

        self.zeros += weight * (values.size - int(np.count_nonzero(values)))
        scaled = values * np.float32(HALF / 2.0**self.exponent)
        bins = np.floor(scaled, out=scaled).astype(np.intp)
        bins += HALF
        np.minimum(bins, 2 * HALF - 1, out=bins)
        if bins.size <= FEW:  # no walk over all bins for the two ends of a tensor
            np.add.at(self.counts, bins, weight)
        else:
            self.counts += weight * np.bincount(bins, minlength=2 * HALF)

    def _grow(self, largest: float) -> None:
        import numpy as np

        while largest > 2.0**self.exponent:
            if self.counts.any():
                merged = np.zeros_like(self.counts)
                merged[HALF // 2 : HALF // 2 + HALF] = self.counts.reshape(-1, 2).sum(1)
                self.counts = merged
                self.exponent += 1
            else:
                self.exponent = int(np.ceil(np.log2(largest)))

    def distribution(self) -> Distribution:
        return Distribution(self.low, self.high, 2.0**self.exponent / HALF, self.counts, self.zeros)


class _Walk:
    """The counters of a walk, and how many samples are in them."""

    def __init__(self) -> None:
        self.seen = 0
        self.counters: dict[str, _Counter] = {}

    def add(self, name: str, values: np.ndarray, number: int) -> None:
        try:
            self.counters.setdefault(name, _Counter()).add(values, number)
        except ValueError as error:
            raise RecipeError(
                f"calibration sample {number} gives NaN or infinity in tensor {name!r}; "
                "check the preprocessing (mean, std, scale) and the data"
            ) from error

    def save(self, path: Path) -> None:
        """Replace the file whole; a walk that cannot save itself still goes on."""
        import numpy as np

        counters = list(self.counters.values())
        temporary = path.with_suffix(".half.npz")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(
                temporary,
                seen=self.seen,
                names=np.array(list(self.counters), dtype=np.str_),
                ends=np.array([(c.low, c.high) for c in counters]),
                whole=np.array([(c.exponent, c.zeros) for c in counters], np.int64),
                counts=np.stack([c.counts for c in counters]),
            )
            temporary.replace(path)

    @classmethod
    def resume(cls, path: Path | None) -> _Walk:
        """Read what `save` wrote; a missing or damaged file begins again."""
        import zipfile

        import numpy as np

        walk = cls()
        if path is None or not path.is_file():
            return walk
        try:
            with np.load(path, allow_pickle=False) as archive:
                rows = zip(
                    archive["names"], archive["ends"], archive["whole"], archive["counts"], strict=True
                )
                for name, ends, whole, counts in rows:
                    counter = _Counter()
                    counter.low, counter.high = float(ends[0]), float(ends[1])
                    counter.exponent, counter.zeros = int(whole[0]), int(whole[1])
                    counter.counts = counts.reshape(2 * HALF)
                    walk.counters[str(name)] = counter
                walk.seen = int(archive["seen"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return cls()
        return walk


def _candidates(found: Distribution, calibration: Calibration, *, symmetric: bool) -> tuple[Range, ...]:
    """One range a method, without those that say the same."""
    chosen: dict[tuple[float, float], Range] = {}
    for method in CANDIDATES:
        span = choose(found, method, percentile=calibration.percentile, symmetric=symmetric)
        chosen.setdefault((round(span.low, 9), round(span.high, 9)), span)
    return tuple(chosen.values())


def _quietest(
    candidates: Mapping[str, Sequence[Range]], found: Mapping[str, Distribution], *, symmetric: bool
) -> dict[str, Range]:
    def cost(name: str, span: Range) -> float:
        return sum(found[name].noise(span.low, span.high, symmetric=symmetric))

    return {name: min(spans, key=lambda span: cost(name, span)) for name, spans in candidates.items()}
