# SPDX-License-Identifier: Apache-2.0
"""Ranges are exact, hold zero, cut tails by percentile, and cost no memory a sample."""

from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from edgeopt.calibrate import Calibration, find_ranges
from edgeopt_wire.errors import RecipeError

Inputs = Mapping[str, np.ndarray]


def _echo(inputs: Inputs) -> Iterator[tuple[str, np.ndarray]]:
    yield from inputs.items()


def _samples(*rows: list[float]) -> list[Inputs]:
    return [{"x": np.array(row, np.float32)} for row in rows]


def test_minmax_is_the_exact_range_over_all_samples() -> None:
    ranges = find_ranges(_echo, _samples([-1, 2], [-3, 1]), Calibration("minmax"))
    assert ranges == {"x": (-3.0, 2.0)}


@pytest.mark.parametrize(("row", "expected"), [([1.0, 5.0], (0.0, 5.0)), ([-5.0, -1.0], (-5.0, 0.0))])
def test_a_range_holds_zero_so_that_padding_is_exact(row: list[float], expected: tuple[float, float]) -> None:
    assert find_ranges(_echo, _samples(row), Calibration("minmax"))["x"] == expected


def test_percentile_cuts_a_lonely_outlier_and_keeps_the_rest() -> None:
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    values[7] = 1000.0
    low, high = find_ranges(_echo, [{"x": values}], Calibration("percentile", 99.99))["x"]

    assert 3 < high < 5
    assert float(values.min()) <= low < -3


def test_outputs_keep_their_full_range() -> None:
    values = np.zeros(100_000, np.float32)
    values[0] = 50
    ranges = find_ranges(_echo, [{"x": values}], Calibration("percentile", 99.9), keep_full=frozenset({"x"}))
    assert ranges["x"] == (0.0, 50.0)


def test_nan_is_refused_with_the_tensor_and_the_sample() -> None:
    with pytest.raises(RecipeError, match=r"sample 1 .*'x'"):
        find_ranges(_echo, _samples([1.0], [float("nan")]), Calibration("minmax"))


def test_no_sample_is_refused() -> None:
    with pytest.raises(RecipeError, match="at least one sample"):
        find_ranges(_echo, [], Calibration())


def test_an_unknown_method_answers_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="'percentile'"):
        Calibration("percentil")


def test_memory_does_not_grow_with_samples() -> None:
    import tracemalloc

    def peak(count: int) -> int:
        class Stream:
            def __iter__(self) -> Iterator[Inputs]:
                rng = np.random.default_rng(0)
                return ({"x": rng.normal(size=50_000).astype(np.float32)} for _ in range(count))

        tracemalloc.start()
        find_ranges(_echo, Stream(), Calibration())
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    assert peak(64) < 1.1 * peak(4)
