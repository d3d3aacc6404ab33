# SPDX-License-Identifier: Apache-2.0
"""A latency is a distribution; a figure that the samples do not carry is left out, never guessed."""

import math
import random
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeopt_wire.document import from_bytes, to_bytes
from edgeopt_wire.errors import DocumentError
from edgeopt_wire.measurement import MINIMUM_FOR_P99, Conditions, Measurement, Timing, nearest_rank

CONDITIONS = Conditions("null", "1", 1, 1, "cpu", "x86_64", "a cpu", "linux")


def timing(samples: list[int]) -> Timing:
    return Timing.of(samples, warmup=3, load_ns=5, first_inference_ns=7)


def measurement(of: Timing | None, error: str = "") -> Measurement:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return Measurement(
        "0" * 64, "net", "1", "v", "fp32", "d", "host", "0.1.0", at, CONDITIONS, of, True, error=error
    )


@pytest.mark.parametrize(
    ("percent", "expected"),
    [(0, 15), (5, 15), (30, 20), (40, 20), (50, 35), (90, 50), (99, 50), (100, 50)],
)
def test_percentiles_are_samples_by_nearest_rank(percent: float, expected: int) -> None:
    assert nearest_rank([15, 20, 35, 40, 50], percent) == expected


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=150), st.sampled_from([1, 50, 90, 99, 100]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_at_least_the_percentage_of_samples_is_at_or_below_it(samples: list[int], percent: int) -> None:
    value = nearest_rank(sorted(samples), percent)
    assert value in samples
    assert sum(sample <= value for sample in samples) * 100 >= percent * len(samples)
    assert sum(sample < value for sample in samples) * 100 < percent * len(samples)


def test_p99_is_given_from_a_hundred_samples_on() -> None:
    assert timing(list(range(1, MINIMUM_FOR_P99))).p99_ns is None
    assert timing(list(range(1, MINIMUM_FOR_P99 + 1))).p99_ns == 99


def test_a_p99_of_too_few_samples_is_refused_when_made_and_when_read() -> None:
    few = timing([1, 2, 3])
    with pytest.raises(ValueError, match="p99 needs 100 samples, found 3"):
        replace(few, p99_ns=3)
    raw = to_bytes(measurement(few)).replace(b'"p99_ns":null', b'"p99_ns":3')
    with pytest.raises(DocumentError, match=r"Measurement\.timing: p99 needs 100 samples"):
        from_bytes(Measurement, raw)


def test_the_order_of_samples_means_nothing() -> None:
    samples = [random.Random(7).randrange(1, 10**9) for _ in range(300)]
    assert timing(samples) == timing(sorted(samples, reverse=True))


def test_load_warm_up_and_first_run_stand_apart() -> None:
    found = timing([10, 30, 20])
    assert (found.n, found.warmup, found.load_ns, found.first_inference_ns) == (3, 3, 5, 7)
    assert (found.min_ns, found.mean_ns, found.p50_ns, found.max_ns) == (10, 20, 20, 30)


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_histogram_counts_every_sample_once_in_eighths_of_an_octave(samples: list[int]) -> None:
    bins = timing(samples).histogram
    assert sum(count for _, count in bins) == len(samples)
    assert list(bins) == sorted(bins)
    assert bins[0][0] <= min(samples)
    assert max(samples) < math.ceil(bins[-1][0] + 1) * 2 ** (1 / 8) + 1


def test_no_samples_give_no_timing() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        timing([])


@pytest.mark.parametrize(
    "changes", [{"min_ns": 0}, {"p50_ns": 10**6}, {"max_ns": 1}, {"n": 4}, {"histogram": ((1, 1),)}]
)
def test_figures_that_contradict_each_other_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"expected 0 < min|histogram does not count"):
        replace(timing([10, 20, 30]), **changes)


def test_a_measurement_has_a_timing_or_says_why_not() -> None:
    with pytest.raises(ValueError, match="a timing or an error"):
        measurement(None)
    failed = measurement(None, error="out of memory")
    assert from_bytes(Measurement, to_bytes(failed)) == failed


def test_a_measurement_survives_the_wire_with_its_conditions() -> None:
    sent = measurement(timing([10, 20, 30]))
    assert from_bytes(Measurement, to_bytes(sent)) == sent
