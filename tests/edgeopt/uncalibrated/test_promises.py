# SPDX-License-Identifier: Apache-2.0
"""Promised ranges find their tensors by what flows through them, in any layout and behind any padding."""

from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from edgeopt.calibrate import Calibration, Stream, alarms, find_ranges
from edgeopt.ranges import Range
from edgeopt.uncalibrated.promises import Promised, fingerprint
from edgeopt_wire.errors import RecipeError

RNG = np.random.default_rng(0)
TENSORS = {name: RNG.normal(size=(1, 4, 6, 6)).astype(np.float32) for name in ("a", "b")}
SPANS = {"a": (-9.0, 8.0), "b": (-1.0, 7.0)}


def look_up(shown: Mapping[str, np.ndarray], samples: int = 2) -> dict[str, Range]:
    """Ask for the ranges of tensors that a lowered model shows; later samples show them doubled."""

    def observe(inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        for name, values in shown.items():
            yield name, values * float(inputs["times"])

    known = fingerprint(SPANS, TENSORS.items())
    stream = Stream([{"times": np.array(1.0 + n)} for n in range(samples)])
    return find_ranges(observe, stream, Promised(known=known))


def test_a_transposed_a_padded_and_a_reshaped_tensor_take_the_promise() -> None:
    found = look_up(
        {
            "nhwc": TENSORS["a"].transpose(0, 2, 3, 1),
            "padded": np.pad(TENSORS["b"], ((0, 0), (0, 0), (1, 1), (1, 1))),
            "flat": TENSORS["b"].reshape(1, -1),
        }
    )
    assert {name: (span.low, span.high) for name, span in found.items()} == {
        "nhwc": SPANS["a"],
        "padded": SPANS["b"],
        "flat": SPANS["b"],
    }
    assert not alarms(found, frozenset())


def test_what_nothing_was_promised_of_has_its_ends_on_noise_and_is_named() -> None:
    found = look_up({"a": TENSORS["a"], "new": TENSORS["a"] * 3})
    assert (found["a"].low, found["a"].high) == SPANS["a"]
    assert found["new"].high == pytest.approx(6 * TENSORS["a"].max())
    (said,) = alarms(found, frozenset())
    assert "1 of 2 tensors (new): they have the ends that they took on noise" in said


def test_the_method_alone_promises_nothing() -> None:
    with pytest.raises(RecipeError, match="makes static int8 files of a build only; give --calibration DATA"):
        find_ranges(lambda _: [], Stream([]), Calibration("batchnorm"))


def test_an_input_range_is_checked_and_belongs_to_this_method() -> None:
    assert Calibration("batchnorm", input_range=(0.0, 255.0)).input_range == (0.0, 255.0)
    with pytest.raises(RecipeError, match=r"input_range must be \[low, high\], found \[1.0, 0.0\]"):
        Calibration("batchnorm", input_range=(1.0, 0.0))
    with pytest.raises(RecipeError, match="input_range is for method"):
        Calibration("mse", input_range=(0.0, 1.0))
