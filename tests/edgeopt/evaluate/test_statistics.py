# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests with known answers, and verdicts that do not claim more than the samples say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeopt.evaluate.scores import Score, Scores, mean_score
from edgeopt.evaluate.statistics import interval, judge, mcnemar
from edgeopt_wire.errors import RecipeError


def _right(right: int, n: int) -> Score:
    return mean_score("top1", np.arange(n) < right)


def _error(values: np.ndarray) -> Score:
    return mean_score("mae", values, higher_is_better=False)


def _ratio(values: np.ndarray, *, is_share: bool = False) -> Score:
    """The mean in the form of a figure that can only be weighed."""
    return Score(
        "ratio",
        float(values.mean()),
        len(values),
        is_share=is_share,
        weigh=lambda weights: float(weights @ values / weights.sum()),
    )


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (1, 9, 2 * 11 / 1024), (3, 3, 1.0), (150, 86, 3.71594e-5)],
)
def test_mcnemar_is_the_sign_test_on_what_flipped(lost: int, gained: int, expected: float) -> None:
    # The first four by hand, the last with scipy.stats.binomtest(86, 236).
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-3)


@settings(deadline=None)
@given(lost=st.integers(0, 400), gained=st.integers(0, 400))
def test_mcnemar_equals_the_binomial_test(lost: int, gained: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


def test_the_interval_of_a_share_is_wilsons() -> None:
    found = interval(_right(18, 20))
    assert found is not None
    assert (round(found.low, 3), round(found.high, 3), found.method) == (0.699, 0.972, "Wilson")


def test_the_bca_interval_of_a_skewed_mean_is_the_one_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).lognormal(size=60)
    found = interval(_error(values))
    expected = stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert found is not None
    width = expected.high - expected.low
    # 1,000 draws leave a standard error of about 3 % of the width in each end.
    assert found.low == pytest.approx(expected.low, abs=0.1 * width)
    assert found.high == pytest.approx(expected.high, abs=0.1 * width)
    assert found.high - values.mean() > values.mean() - found.low


def test_ninety_five_percent_intervals_hold_the_truth_about_that_often() -> None:
    generator = np.random.default_rng(7)
    held = {"mean": 0, "ratio": 0}
    trials = 120
    for _ in range(trials):
        values = generator.exponential(size=80)
        for name, score in (("mean", _error(values)), ("ratio", _ratio(values))):
            found = interval(score)
            assert found is not None
            held[name] += found.low <= 1 <= found.high
    # Binomial(120, 0.95) is below 105 (0.875) with a probability of 0.2 %.
    assert all(count >= 105 for count in held.values()), held


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(2).normal(size=50)
    assert interval(_error(values)) == interval(_error(values)) != interval(_error(values), seed=1)


def test_a_real_drop_a_noisy_one_and_none_are_told_apart() -> None:
    generator = np.random.default_rng(3)
    base = generator.exponential(size=400)
    noisy = base + generator.normal(scale=0.1, size=400)
    for make in (_error, _ratio):
        sign = 1 if make is _error else -1
        worse = judge(make(base), make(base + sign * 0.1), 0.05)
        fine = judge(make(base), make(noisy), 0.05)
        unsure = judge(make(base), make(noisy), 0.001)
        assert (worse.answer, fine.answer, unsure.answer) == ("not met", "met", "cannot be told")
        assert fine.is_noise
        assert worse.drop == pytest.approx(0.1)
        assert unsure.samples_needed is not None
        assert unsure.samples_needed == pytest.approx(7.849 * 0.01 / 0.001**2, rel=0.2)
        assert "would tell" in unsure.sentence()


def test_without_a_limit_the_answer_is_about_the_difference() -> None:
    generator = np.random.default_rng(4)
    base = generator.exponential(size=200)
    jitter = generator.normal(scale=0.01, size=200)
    answers = [
        judge(_error(base), _error(base + shift + jitter), None).answer
        for shift in (0.1, -jitter.mean(), -0.1)
    ]
    assert answers == ["worse", "within noise", "better"]
    assert judge(_right(90, 100), _right(88, 100), None).answer == "within noise"
    assert judge(_right(90, 100), _right(70, 100), None).answer == "worse"
    assert judge(_right(70, 100), _right(90, 100), None).answer == "better"


def test_a_relative_limit_is_a_part_of_the_baseline() -> None:
    base = np.linspace(9, 11, 100)
    assert judge(_error(base), _error(base * 1.04), 0.05, relative=True).answer == "met"
    assert judge(_error(base), _error(base * 1.04), 0.03, relative=True).answer == "not met"


def test_the_samples_that_are_said_to_be_needed_tell_four_times_in_five() -> None:
    generator = np.random.default_rng(5)

    def draw(n: int) -> tuple[Score, Score]:
        """A candidate that is as right as the baseline, 4 % of whose answers flip."""
        was = generator.random(n) < 0.5
        return mean_score("top1", was), mean_score("top1", was ^ (generator.random(n) < 0.04))

    needed = round(7.849 * 0.04 / 0.02**2)
    trials = [judge(*draw(needed), 0.02) for _ in range(400)]
    said = [trial.samples_needed for trial in trials if trial.samples_needed]
    assert np.mean(said) == pytest.approx(needed, rel=0.03)
    # Binomial(400, 0.8) is outside of 288 to 352 with a probability of 0.01 %.
    assert 288 <= sum(trial.answer == "met" for trial in trials) <= 352


def test_a_sentence_says_shares_in_points_and_other_figures_in_their_unit() -> None:
    share = judge(_right(90, 100), _right(80, 100), 0.05)
    assert share.sentence() == (
        "measured drop 10.00 points, 95 % interval 4.12 to 15.88 with 100 samples: cannot be told; "
        "about 314 samples would tell, if the true drop is none"
    )
    base = np.linspace(1, 2, 100)
    error = judge(_error(base), _error(1.5 * base), 0.1)
    assert error.sentence().startswith("mae worse by 0.75, 95 % interval 0.7")
    assert error.sentence().endswith("with 100 samples: not met")


def test_few_samples_get_no_bootstrap() -> None:
    few = np.arange(5.0)
    assert interval(_error(few)) is None
    verdict = judge(_error(few), _error(few + 0.1), 0.2)
    assert verdict.answer == "cannot be told"
    assert "interval" not in verdict.sentence()


def test_equal_shares_leave_as_much_doubt_as_one_sample_and_equal_errors_none() -> None:
    values = np.full(100, 0.5)
    share = judge(_ratio(values, is_share=True), _ratio(values, is_share=True), 0.01)
    assert share.answer == "cannot be told"
    assert share.high == pytest.approx(0.0196, abs=1e-4)
    assert judge(_error(values), _error(values), 0.0).answer == "met"


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_candidate_whose_figure_is_no_number_never_meets_a_limit(odd: float) -> None:
    values = np.arange(20.0)
    verdict = judge(_error(values), _error(np.where(values == 3, odd, values)), 1e9)
    assert (verdict.answer, verdict.drop) == ("not met", math.inf)
    assert not verdict.is_noise
    assert verdict.sentence() == "the candidate's mae is no number: not met"
    with pytest.raises(RecipeError, match="the unmodified model's mae is no number"):
        judge(_error(np.where(values == 3, odd, values)), _error(values), 1.0)


def test_scores_of_other_samples_or_metrics_are_not_compared() -> None:
    with pytest.raises(RecipeError, match="top1 of 20 and top1 of 30"):
        judge(_right(10, 20), _right(10, 30), 0.1)
    with pytest.raises(RecipeError, match="unknown metric 'top6'; did you mean 'top1'"):
        Scores((_right(1, 2),)).find("top6")


@settings(deadline=None, max_examples=30)
@given(
    base=st.lists(st.booleans(), min_size=12, max_size=40),
    flip=st.lists(st.booleans(), min_size=40, max_size=40),
    limit=st.floats(0, 0.5),
)
def test_a_verdict_is_what_its_interval_says(base: list[bool], flip: list[bool], limit: float) -> None:
    was = np.asarray(base)
    now = was ^ np.asarray(flip)[: len(base)]
    for make in (lambda a: mean_score("top1", a), lambda a: _ratio(a.astype(float), is_share=True)):
        found = judge(make(was), make(now), limit)
        assert found.low <= found.drop + 1e-9
        assert found.drop <= found.high + 1e-9
        expected = "met" if found.high <= limit else "not met" if found.low > limit else "cannot be told"
        assert found.answer == expected
