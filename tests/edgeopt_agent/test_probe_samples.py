# SPDX-License-Identifier: Apache-2.0
"""When a latency counts as settled, on a clock of the test's own."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from edgeopt_agent.golden import _stack, compare
from edgeopt_agent.probe_child import MAXIMUM_WINDOWS, Samples, take_samples
from edgeopt_wire.errors import StoreError
from edgeopt_wire.tensor import TensorSpec

MS = 1_000_000


def sample(latencies_ms: Iterable[float], **changes: int) -> Samples:
    now = 0
    latencies = iter(latencies_ms)

    def run() -> None:
        nonlocal now
        now += round(next(latencies) * MS)

    asked = {"warmup_ns": 0, "minimum_runs": 30, "minimum_ns": 0, "maximum_ns": 10_000 * MS, **changes}
    return take_samples(run, clock_ns=lambda: now, **asked)


def test_steady_latency_takes_three_windows() -> None:
    found = sample(itertools.repeat(2.0))
    assert found.is_stable
    assert len(found.latencies_ns) == 30
    assert set(found.latencies_ns) == {2 * MS}
    assert found.warmup == 1
    assert found.dropped == 0


def test_warm_up_lasts_its_time_and_is_not_counted() -> None:
    found = sample(itertools.chain([9.0] * 5, itertools.repeat(2.0)), warmup_ns=45 * MS)
    assert found.warmup == 5
    assert set(found.latencies_ns) == {2 * MS}


def test_minimum_time_outweighs_minimum_runs() -> None:
    assert len(sample(itertools.repeat(1.0), minimum_ns=300 * MS).latencies_ns) == 300


def test_slow_start_is_dropped_and_counted() -> None:
    found = sample(itertools.chain([5.0] * 21, itertools.repeat(2.0)))
    assert found.is_stable
    assert found.dropped == 20
    assert found.window_p50_ns == (5 * MS, 5 * MS, 2 * MS, 2 * MS, 2 * MS)
    assert set(found.latencies_ns) == {2 * MS}


def test_latency_that_keeps_growing_never_settles() -> None:
    found = sample(2.0 * 1.01**i for i in itertools.count())
    assert not found.is_stable
    assert len(found.window_p50_ns) == MAXIMUM_WINDOWS


def test_windows_just_within_ten_percent_agree_and_just_above_do_not() -> None:
    def steps(last: float) -> Iterable[float]:
        return itertools.chain([2.0] * 21, itertools.repeat(last))

    assert len(sample(steps(2.2)).window_p50_ns) == 3
    assert len(sample(steps(2.21)).window_p50_ns) == 5


def test_time_that_is_over_leaves_what_there_is() -> None:
    found = sample(itertools.repeat(400.0), maximum_ns=1000 * MS)
    assert len(found.latencies_ns) == 3
    assert not found.is_stable


def test_one_run_that_takes_all_the_time_is_still_a_sample() -> None:
    assert len(sample(itertools.repeat(400.0), maximum_ns=0).latencies_ns) == 1


@pytest.mark.parametrize(
    ("spec_shape", "file_shape", "samples"),
    [((1, 3), (5, 3), 5), ((1, 3), (5, 1, 3), 5), ((2, 3), (5, 2, 3), 5)],
)
def test_golden_samples_are_stacked_with_or_without_their_batch_axis(
    tmp_path: Path, spec_shape: tuple[int, ...], file_shape: tuple[int, ...], samples: int
) -> None:
    np.save(tmp_path / "0.npy", np.arange(np.prod(file_shape), dtype=np.float16).reshape(file_shape))
    stack = _stack(tmp_path / "0.npy", TensorSpec("x", spec_shape, "float32"))
    assert stack.shape == (samples, *spec_shape)
    assert stack.dtype == np.float32


def test_golden_samples_without_their_batch_axis_cannot_fill_a_batch_of_two(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.zeros((5, 3), np.float32))
    with pytest.raises(StoreError, match=r"expected samples of shape \(2, 3\)"):
        _stack(tmp_path / "0.npy", TensorSpec("x", (2, 3), "float32"))


def test_pickled_golden_samples_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(StoreError, match="damaged"):
        _stack(tmp_path / "0.npy", TensorSpec("x", (1, 3), "float32"))


def test_sqnr_is_over_all_outputs_and_samples() -> None:
    golden = [{"a": np.full((1, 2), 3.0, np.float32)}, {"a": np.full((1, 2), 1.0, np.float32)}]
    found = [{"a": np.full((1, 2), 3.0, np.float32)}, {"a": np.full((1, 2), 0.0, np.float32)}]
    comparison = compare(golden, found, min_sqnr_db=9.0)
    assert comparison.sqnr_db == pytest.approx(10.0)  # 20 / 2
    assert comparison.is_ok
    assert not compare(golden, found, min_sqnr_db=10.5).is_ok


def test_the_same_nan_as_the_golden_output_is_equal() -> None:
    golden = [{"a": np.array([[np.nan, 1.0]], np.float32)}]
    assert compare(golden, [{"a": np.array([[np.nan, 1.0]], np.float32)}], min_sqnr_db=30).is_exact
    assert not compare(golden, [{"a": np.array([[0.0, 1.0]], np.float32)}], min_sqnr_db=-100).is_ok


def test_golden_outputs_that_are_all_zero_need_zeros() -> None:
    zeros = [{"a": np.zeros((1, 2), np.float32)}]
    assert compare(zeros, zeros, min_sqnr_db=30).is_ok
    assert not compare(zeros, [{"a": np.full((1, 2), 1e-9, np.float32)}], min_sqnr_db=-100).is_ok
