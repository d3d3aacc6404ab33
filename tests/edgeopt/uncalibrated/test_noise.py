# SPDX-License-Identifier: Apache-2.0
"""Made-up inputs: the same at every walk, within the input's range, pictures with the spectrum of photos."""

import numpy as np
import pytest

from edgeopt.uncalibrated.noise import Interval, Noise
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.tensor import TensorSpec

PHOTO = TensorSpec("x", (1, 3, 64, 64), "float32", "NCHW")
PREPROCESS = {"resize": 64, "crop": 64, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.5, 0.1]}


def test_pixels_lie_where_preprocessing_puts_them_and_both_ends_are_reached() -> None:
    interval = Interval.find((), PREPROCESS)
    np.testing.assert_allclose(interval.low, [-2.0, -0.8, -3.0])
    np.testing.assert_allclose(interval.high, [2.0, 1.2, 7.0])
    values = np.concatenate([sample.inputs["x"] for sample in Noise((PHOTO,), interval, 8)])
    for channel in range(3):
        assert values[:, channel].min() == pytest.approx(interval.low[channel], abs=1e-4)
        assert values[:, channel].max() == pytest.approx(interval.high[channel], abs=1e-4)


def test_every_walk_gives_the_same_samples_and_other_inputs_another_digest() -> None:
    noise = Noise((PHOTO,), Interval((0.0,), (1.0,)), 3)
    first, second = ([sample.inputs["x"] for sample in noise] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    assert noise.digest != Noise((PHOTO,), Interval((0.0,), (2.0,)), 3).digest


def test_neighbours_are_alike_in_pictures_and_not_in_other_inputs() -> None:
    def likeness(spec: TensorSpec) -> float:
        values = next(iter(Noise((spec,), Interval((-1.0,), (1.0,))))).inputs["x"]
        return float(np.corrcoef(values[..., 1:].reshape(-1), values[..., :-1].reshape(-1))[0, 1])

    assert likeness(PHOTO) > 0.9
    assert abs(likeness(TensorSpec("x", (1, 40, 64), "float32"))) < 0.1


def test_channels_last_pictures_are_the_same_pictures() -> None:
    interval = Interval.find((), PREPROCESS)
    last = TensorSpec("x", (1, 64, 64, 3), "float32", "NHWC")
    first, second = (next(iter(Noise((spec,), interval))).inputs["x"] for spec in (PHOTO, last))
    np.testing.assert_array_equal(first.transpose(0, 2, 3, 1), second)


def test_inputs_that_cannot_be_made_up_are_refused_with_what_to_do() -> None:
    with pytest.raises(RecipeError, match=r"input 'ids' \(int64\): give --calibration DATA"):
        Noise((TensorSpec("ids", (1, 8), "int64"),), Interval((0.0,), (1.0,)))
    with pytest.raises(RecipeError, match=r"put input_range = \[low, high\] into \[calibration\]"):
        Interval.find((), {})
    grey = Noise((TensorSpec("x", (1, 1, 8, 8), "float32"),), Interval.find((), PREPROCESS))
    with pytest.raises(RecipeError, match="has not the 3 channels"):
        next(iter(grey))
