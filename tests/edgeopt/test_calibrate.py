# SPDX-License-Identifier: Apache-2.0
"""Ranges are exact, hold zero, cut tails by percentile, and cost no memory a sample."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgeopt.calibrate import Calibration, Stream, alarms, find_ranges, observe_distributions
from edgeopt.ranges import Range, choose
from edgeopt_wire.errors import RecipeError

Inputs = Mapping[str, np.ndarray]


def _echo(inputs: Inputs) -> Iterator[tuple[str, np.ndarray]]:
    yield from inputs.items()


def _samples(*rows: list[float]) -> list[Inputs]:
    return [{"x": np.array(row, np.float32)} for row in rows]


def test_minmax_is_the_exact_range_over_all_samples() -> None:
    ranges = find_ranges(_echo, Stream(_samples([-1, 2], [-3, 1])), Calibration("minmax"))
    assert ranges == {"x": Range(-3.0, 2.0)}


@pytest.mark.parametrize(("row", "expected"), [([1.0, 5.0], (0.0, 5.0)), ([-5.0, -1.0], (-5.0, 0.0))])
def test_a_range_holds_zero_so_that_padding_is_exact(row: list[float], expected: tuple[float, float]) -> None:
    assert find_ranges(_echo, Stream(_samples(row)), Calibration("minmax"))["x"][:2] == expected


def test_percentile_cuts_a_lonely_outlier_and_keeps_the_rest() -> None:
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    values[7] = 1000.0
    low, high = find_ranges(_echo, Stream([{"x": values}]), Calibration("percentile", 99.99))["x"][:2]

    assert 3 < high < 5
    assert float(values.min()) <= low < -3


def test_outputs_keep_their_full_range() -> None:
    values = np.zeros(100_000, np.float32)
    values[0] = 50
    ranges = find_ranges(
        _echo, Stream([{"x": values}]), Calibration("percentile", 99.9), keep_full=frozenset({"x"})
    )
    assert ranges["x"][:2] == (0.0, 50.0)


def test_nan_is_refused_with_the_tensor_and_the_sample() -> None:
    with pytest.raises(RecipeError, match=r"sample 1 .*'x'"):
        find_ranges(_echo, Stream(_samples([1.0], [float("nan")])), Calibration("minmax"))


def test_no_sample_is_refused() -> None:
    with pytest.raises(RecipeError, match="at least one sample"):
        find_ranges(_echo, Stream([]), Calibration())


def test_an_unknown_method_answers_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="'percentile'"):
        Calibration("percentil")


def test_memory_does_not_grow_with_samples() -> None:
    import tracemalloc

    def peak(count: int) -> int:
        class Endless:
            def __iter__(self) -> Iterator[Inputs]:
                rng = np.random.default_rng(0)
                return ({"x": rng.normal(size=50_000).astype(np.float32)} for _ in range(count))

        tracemalloc.start()
        find_ranges(_echo, Stream(Endless()), Calibration())
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(4)  # the first walk also imports what it needs
    assert peak(64) < 1.1 * peak(4)


def _heavy_tail() -> np.ndarray:
    return np.random.default_rng(0).standard_t(3, size=200_000).astype(np.float32)


def test_least_squared_error_beats_every_other_range_by_its_own_measure() -> None:
    found = observe_distributions(_echo, Stream([{"x": _heavy_tail()}]))["x"]
    costs = {m: sum(found.noise(*choose(found, m)[:2])) for m in ("minmax", "percentile", "mse", "entropy")}
    assert min(costs, key=lambda method: costs[method]) == "mse"
    assert costs["minmax"] > 1.3 * costs["mse"]


def test_the_expected_noise_is_what_rounding_and_clipping_cost() -> None:
    values = _heavy_tail()
    found = observe_distributions(_echo, Stream([{"x": values}]))["x"]
    low, high = -6.0, 6.0
    step = (high - low) / 255
    real = float(((np.clip(np.round(values / step) * step, low, high) - values) ** 2).sum())
    assert sum(found.noise(low, high)) == pytest.approx(real, rel=0.03)


def test_entropy_cuts_a_long_thin_tail() -> None:
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    values[:20] = np.linspace(10, 100, 20)
    found = find_ranges(_echo, Stream([{"x": values}]), Calibration("entropy"))["x"]
    assert found.high < 90


def test_auto_takes_the_judges_word_for_every_tensor() -> None:
    asked: dict[str, int] = {}

    def judge(candidates: Mapping[str, Sequence[Range]]) -> dict[str, Range]:
        asked.update({name: len(spans) for name, spans in candidates.items()})
        return {name: spans[-1] for name, spans in candidates.items()}

    samples = [{"x": _heavy_tail(), "y": np.array([0.0, 6.0], np.float32)}]
    found = find_ranges(_echo, Stream(samples), Calibration("auto"), judge=judge)
    assert asked["x"] == 4
    assert found["x"].method == "entropy"


def test_a_histogram_that_grows_says_what_one_of_known_range_says() -> None:
    rng = np.random.default_rng(3)
    rows = [(rng.normal(size=5_000) * 4.0**number).astype(np.float32) for number in range(6)]
    grown = observe_distributions(_echo, Stream([{"x": row} for row in rows]))["x"]
    whole = observe_distributions(_echo, Stream([{"x": np.concatenate(rows)}]))["x"]
    assert np.array_equal(grown.counts, whole.counts)
    assert (grown.low, grown.high, grown.width, grown.zeros) == (
        whole.low,
        whole.high,
        whole.width,
        whole.zeros,
    )


def test_a_walk_that_was_cut_off_goes_on_and_ends_alike(tmp_path: Path) -> None:
    rows = [{"x": row} for row in np.random.default_rng(4).normal(size=(40, 300)).astype(np.float32)]
    seen = []

    def observe(inputs: Inputs) -> Iterator[tuple[str, np.ndarray]]:
        seen.append(1)
        if len(seen) == 37:
            raise KeyboardInterrupt
        yield from inputs.items()

    file = tmp_path / "partial" / "walk.npz"
    with pytest.raises(KeyboardInterrupt):
        observe_distributions(observe, Stream(rows, file))
    assert file.is_file()
    resumed = observe_distributions(observe, Stream(rows, file))["x"]
    assert len(seen) == 37 + 8  # the first 32 samples were saved
    assert np.array_equal(resumed.counts, observe_distributions(_echo, Stream(rows))["x"].counts)
    assert not file.exists()


def test_a_damaged_checkpoint_begins_again(tmp_path: Path) -> None:
    file = tmp_path / "walk.npz"
    file.write_bytes(b"PK\x03\x04 half")
    assert observe_distributions(_echo, Stream(_samples([1.0]), file))["x"].high == 1.0


def test_the_alarm_rings_where_clipping_costs_more_than_rounding() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    quiet = find_ranges(_echo, Stream([{"x": values}]), Calibration("mse"))
    loud = find_ranges(_echo, Stream([{"x": values}]), Calibration("percentile", 90))
    assert not alarms(quiet, frozenset())
    assert "1 of 1 tensors" in alarms(loud, frozenset())[0]
    assert "output 'x' is clipped" in alarms(loud, frozenset({"x"}))[0]
