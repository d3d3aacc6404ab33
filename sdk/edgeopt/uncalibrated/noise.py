# SPDX-License-Identifier: Apache-2.0
"""Made-up inputs: noise with the spectrum of photos for pictures, plain noise for everything else.

They tell the tensors of a lowered model apart, and give the second moments by which weights are rounded: neighbouring
pixels are alike in noise as in photos. Amplitudes of photos fall with frequency (Field 1987, "Relations between the
statistics of natural images and the response properties of cortical cells"); the exponent here was measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt_wire.document import canonical_bytes, to_json
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.evaluate.samples import Sample

SAMPLES = 48
"""As many as rounding by second moments looks at."""

EXPONENT = 1.5
"""Of the fall of amplitudes with frequency. EfficientNet-Lite0's rounded weights gave 23.5 dB with 1.0, 24.2 with 1.5 and
with 2.0, 23.8 with white noise and 24.4 with photos (nearest rounding: 18.8)."""

_COLOURS_SHARED = 0.9  # share of the variance that the channels of a picture have in common
_CONTRAST = 0.5  # standard deviation as a share of half the input's range


@dataclass(frozen=True)
class Interval:
    """The lowest and the highest value of an input, per channel or one of each."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high) or any(a >= b for a, b in zip(self.low, self.high, strict=True)):
            raise RecipeError(f"the input's range must rise, found {self.low} to {self.high}")

    @classmethod
    def find(cls, given: tuple[float, ...], preprocess: Mapping[str, Any]) -> Interval:
        """What the recipe declares, else what preprocessing makes of pixels from 0 to 255.

        Raises:
            RecipeError: Neither says it.
        """
        from edgeopt.evaluate.preprocess import Preprocess

        if given:
            return cls(given[:1], given[1:])
        if not preprocess:
            raise RecipeError(
                'calibration method "batchnorm" must know which values the input takes: put input_range = [low, high] into '
                "[calibration], or [preprocess] with mean and std into the recipe"
            )
        found = Preprocess.from_mapping(preprocess)
        ends = [
            sorted(((0.0 - mean) / std, (255.0 * found.scale - mean) / std))
            for mean, std in zip(found.mean, found.std, strict=True)
        ]
        return cls(tuple(low for low, _ in ends), tuple(high for _, high in ends))


@dataclass(frozen=True)
class Noise:
    """Samples for a model with these inputs; the same ones at every walk."""

    inputs: tuple[TensorSpec, ...]
    interval: Interval
    count: int = SAMPLES

    def __post_init__(self) -> None:
        for spec in self.inputs:
            if not spec.dtype.startswith("float"):
                raise RecipeError(
                    f'calibration method "batchnorm" cannot make up values of input {spec.name!r} ({spec.dtype}): give '
                    "--calibration DATA"
                )

    @property
    def digest(self) -> str:
        """SHA-256 of what the samples follow from."""
        said = [to_json(self.inputs), self.interval.low, self.interval.high, self.count, EXPONENT]
        return hashlib.sha256(canonical_bytes(to_json(said))).hexdigest()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        import numpy as np

        from edgeopt.evaluate.samples import Sample

        for number in range(self.count):
            generator = np.random.default_rng(number)
            yield Sample({spec.name: self._array(spec, generator) for spec in self.inputs})

    def _array(self, spec: TensorSpec, generator: np.random.Generator) -> np.ndarray:
        """One input with batch 1, in the layout of `spec`."""
        import numpy as np

        channels_last = spec.layout == "NHWC"
        shape = (spec.shape[0], spec.shape[3], *spec.shape[1:3]) if channels_last else spec.shape
        if len(shape) == 4 and shape[1] in (1, 3):
            unit = _picture(tuple(shape), generator)
        else:
            unit = generator.uniform(-1, 1, shape)
        low, high = (np.array(end) for end in (self.interval.low, self.interval.high))
        if len(low) > 1:
            if len(shape) < 2 or shape[1] != len(low):
                raise RecipeError(
                    f"input {spec.name!r} {spec.shape} has not the {len(low)} channels that [preprocess] describes: put "
                    "input_range = [low, high] into [calibration]"
                )
            low, high = (end.reshape(-1, *[1] * (len(shape) - 2)) for end in (low, high))
        values = low + (high - low) * (unit + 1) / 2
        if channels_last:
            values = values.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(values.astype(spec.dtype))


def _picture(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Noise from -1 to 1 in (batch, channels, height, width) whose amplitudes fall with frequency."""
    import numpy as np

    height, width = shape[2:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1 / max(height, width)
    white = generator.standard_normal(shape)
    mixed = np.sqrt(_COLOURS_SHARED) * white[:, :1] + np.sqrt(1 - _COLOURS_SHARED) * white
    found = np.fft.irfft2(np.fft.rfft2(mixed) / frequency**EXPONENT, s=(height, width))
    axes = (2, 3)
    found = found - found.mean(axes, keepdims=True)
    found /= np.maximum(found.std(axes, keepdims=True), 1e-12)
    clipped: np.ndarray = np.clip(found * _CONTRAST, -1, 1)
    return clipped
