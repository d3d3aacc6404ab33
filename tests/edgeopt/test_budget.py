# SPDX-License-Identifier: Apache-2.0
"""Budgets are read with their units and checked against what was measured."""

import pytest

from edgeopt.budget import Budget, Facts, drop, parse_drop, parse_duration_ns, parse_share, parse_size_bytes
from edgeopt.predict import Estimate
from edgeopt_wire.errors import RecipeError
from edgeopt_wire.manifest import Quality


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.01", 0.01), ("0", 0.0), ("100 %", 1.0)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize(("text", "ns"), [("10ms", 10_000_000), ("0.5 s", 500_000_000), ("300us", 300_000)])
def test_durations(text: str, ns: int) -> None:
    assert parse_duration_ns(text) == ns


@pytest.mark.parametrize(("text", "size"), [("5MB", 5_000_000), ("4MiB", 4 * 2**20), ("800kB", 800_000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size_bytes(text) == size


@pytest.mark.parametrize("text", ["10", "ms", "10 parsecs", "-3ms", "1.2.3ms"])
def test_a_duration_without_a_known_unit_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="10ms, 500us"):
        parse_duration_ns(text)


@pytest.mark.parametrize("text", ["150%", "-1%", "one", "1..2%"])
def test_a_share_outside_of_zero_to_one_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected a share"):
        parse_share(text)


def test_drop_is_of_the_metric_where_there_are_labels_and_of_agreement_elsewhere() -> None:
    assert drop(Quality(100, agreement=0.9, value=0.85, baseline_value=0.87)) == pytest.approx(0.02)
    assert drop(Quality(100, agreement=0.9)) == pytest.approx(0.1)


def test_a_kept_budget_breaks_nothing() -> None:
    quality = Quality(100, agreement=0.99, value=0.87, baseline_value=0.87)
    budget = Budget(max_drop=0.01, max_size_bytes=100)
    assert budget.broken_by(Facts(99, quality)) == []


def test_every_broken_limit_is_said() -> None:
    budget = Budget(max_drop=0.01, max_latency_ns=1, max_size_bytes=10)
    quality = Quality(100, agreement=0.9)
    reasons = budget.broken_by(Facts(11, quality, on_device=True))
    assert [
        any(word in reason for reason in reasons)
        for word in ("--max-size", "drops 10 points", "could not be measured")
    ]
    assert len(reasons) == 3


def test_a_latency_of_another_machine_proves_nothing() -> None:
    reasons = Budget(max_latency_ns=10**9).broken_by(Facts(1))
    assert "not the device" in reasons[0]


ESTIMATE = Estimate(12_000_000, 8_000_000, 19_000_000, "runtime", "112 published latencies")


@pytest.mark.parametrize(
    ("limit_ms", "says"),
    [
        (21.0, ""),
        (20.0, "cannot be told"),
        (9.0, "cannot be told"),
        (8.0, "estimated 12 ms (8 to 19), --max"),
    ],
)
def test_an_estimate_keeps_a_limit_only_with_its_whole_interval(limit_ms: float, says: str) -> None:
    """p90 is 1.06 of p50: 20.1 and 8.5 ms."""
    reasons = Budget(max_latency_ns=round(limit_ms * 1e6)).broken_by(Facts(1, estimate=ESTIMATE))
    assert len(reasons) == bool(says)
    assert says in "".join(reasons)


def test_an_estimate_says_nothing_where_the_device_was_measured() -> None:
    reasons = Budget(max_latency_ns=10**9).broken_by(Facts(1, estimate=ESTIMATE, on_device=True))
    assert "could not be measured here" in reasons[0]


def test_why_there_is_no_estimate_is_part_of_the_reason() -> None:
    reasons = Budget(max_latency_ns=10**9).broken_by(Facts(1, no_estimate="its profile gives no clock"))
    assert "its profile gives no clock" in reasons[0]


def test_a_relative_drop_is_a_part_of_the_baselines_figure() -> None:
    assert parse_drop("1%") == (0.01, False)
    assert parse_drop(" 50%rel ") == (0.5, True)
    quality = Quality(100, metric="top1", value=0.49, baseline_value=0.5)
    assert Budget(max_drop=0.03, relative=True).broken_by(Facts(1, quality)) == []
    assert "allows 0.5" in Budget(max_drop=0.01, relative=True).broken_by(Facts(1, quality))[0]


def test_a_metric_that_falls_when_it_gets_better_is_judged_by_its_own_drop() -> None:
    """A word error rate of 0.12 instead of 0.10 is a loss of 0.02, which values alone do not tell."""
    quality = Quality(100, metric="wer", value=0.12, baseline_value=0.10)
    assert Budget(max_drop=0.01).broken_by(Facts(1, quality, drop=0.02, is_share=False)) == [
        "drops 0.02 wer, --max-drop allows 0.01"
    ]


def test_too_few_integer_operations_break_the_budget() -> None:
    assert Budget(min_coverage=0.9).broken_by(Facts(1, coverage=0.5))
    assert not Budget(min_coverage=0.9).broken_by(Facts(1, coverage=0.95))
    assert not Budget(min_coverage=0.9).broken_by(Facts(1))  # a float candidate has none


def test_memory_that_was_not_measured_cannot_be_promised() -> None:
    assert "could not be measured" in Budget(max_memory_bytes=10).broken_by(Facts(1))[0]
