# SPDX-License-Identifier: Apache-2.0
"""What a sample of this size tells: intervals of a score, paired tests, and the verdict on a drop.

Rules:
- Everything is at 95 %, two-sided; samples are drawn as pairs, because baseline and candidate saw the same ones.
- Shares have closed forms: Wilson's interval, Wald's for a paired difference, McNemar's exact test.
- Other means have the bias-corrected and accelerated bootstrap, BCa (Efron 1987; DiCiccio and Efron 1996, section 2).
  What is no mean of samples (mAP, mIoU) has the percentile bootstrap, because the acceleration would cost one
  evaluation a sample.
- Random numbers are seeded, so that a report can be repeated.
- Fewer than `MIN_SAMPLES` samples give no bootstrap: it would be too sure of itself.
- When no sample's share differs at all, the interval is as wide as if one of them had lost all of it.

Why no scipy? It is 100 MB for four formulas; the tests compare with it where it is installed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from edgeopt.evaluate.scores import Score
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

Z_95 = 1.959963984540054
Z_POWER_80 = 0.8416212335729143
MIN_SAMPLES = 10
NOISE = 0.05
"""A difference whose p-value is not below this is within noise."""

NO_LIMIT = 1e-12
"""An allowed drop below this is none: no number of samples shows it."""

MET, NOT_MET, UNKNOWN = "met", "not met", "cannot be told"
WITHIN_NOISE, BETTER, WORSE = "within noise", "better", "worse"
_CHUNK = 64


@dataclass(frozen=True)
class Interval:
    """The 95 % interval of a figure, and the `method` that it comes from."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Verdict:
    """What the samples tell of a drop; a drop is positive where the candidate is worse, in the metric's own unit.

    `answer` is "met", "not met" or "cannot be told" where a drop was allowed, else "within noise", "better", "worse"
    or "cannot be told". `drop` is infinite where the candidate's figure is no number; `low` and `high` are NaN where the
    samples give no interval. `p_value` is of the two-sided paired test `test` that there is no difference at all.
    """

    answer: str
    drop: float
    low: float
    high: float
    samples: int
    samples_needed: int | None
    metric: str = "top1"
    is_share: bool = True
    p_value: float | None = None
    test: str = ""

    @property
    def is_noise(self) -> bool:
        """Whether the difference cannot be told from none."""
        return math.isfinite(self.drop) and (self.p_value is None or self.p_value >= NOISE)

    def sentence(self) -> str:
        """Say it with its figures, shares in points."""
        if not math.isfinite(self.drop):
            return f"the candidate's {self.metric} is no number: {self.answer}"
        factor, unit, digits = (100, " points", ".2f") if self.is_share else (1, "", ".4g")
        drop, low, high = (f"{factor * value:{digits}}" for value in (self.drop, self.low, self.high))
        text = (
            f"measured drop {drop}{unit}" if self.metric == "top1" else f"{self.metric} worse by {drop}{unit}"
        )
        if math.isfinite(self.low):
            text += f", 95 % interval {low} to {high}"
        text += f" with {self.samples} samples: {self.answer}"
        if self.p_value is not None and self.answer in (MET, NOT_MET, UNKNOWN) and self.is_noise:
            text += f" (within noise, p = {self.p_value:.2g})"
        if self.answer == UNKNOWN and self.samples_needed:
            text += f"; about {self.samples_needed} samples would tell, if the true drop is none"
        return text


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n samples (Wilson 1927)."""
    centre = share + Z_95**2 / (2 * n)
    spread = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n))
    scale = 1 + Z_95**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def interval(score: Score, *, seed: int = 0) -> Interval | None:
    """The interval of one score; None where the samples are too few, the figure is no number, or it has no `weigh`."""
    if score.is_right_or_wrong:
        return Interval(*wilson(score.value, score.samples), "Wilson")
    if not math.isfinite(score.value) or score.samples < MIN_SAMPLES:
        return None
    if score.values is not None:
        drawn_means = _means(score.values, score.resamples, seed)
        return Interval(*_bca(score.values, drawn_means), "BCa bootstrap")
    drawn = _resample(score, score, seed)
    if drawn is None:
        return None
    return Interval(*_quantiles(drawn[0]), "percentile bootstrap")


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided p-value of `lost` against `gained` flips (McNemar 1947; the sign test on what flipped)."""
    flips = lost + gained
    if flips == 0:
        return 1.0
    fewer = min(lost, gained)
    log_terms = (
        math.lgamma(flips + 1) - math.lgamma(k + 1) - math.lgamma(flips - k + 1) - flips * math.log(2)
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * math.fsum(math.exp(term) for term in log_terms))


def judge(
    baseline: Score, candidate: Score, max_drop: float | None, *, relative: bool = False, seed: int = 0
) -> Verdict:
    """Judge how much worse the candidate's score is than the baseline's, on the same samples.

    `max_drop` is in the metric's own unit (0.01 is one point of a share), or with `relative` a part of the baseline's
    value; None asks only whether there is a difference. `samples_needed` is for 80 % power at 5 %, two-sided.

    Raises:
        RecipeError: The scores are of different metrics or numbers of samples, or the baseline's is no number.
    """
    if (baseline.name, baseline.samples) != (candidate.name, candidate.samples):
        raise RecipeError(
            f"expected the same metric on the same samples, found {baseline.name} of {baseline.samples} and "
            f"{candidate.name} of {candidate.samples}"
        )
    if not math.isfinite(baseline.value):
        raise RecipeError(f"the unmodified model's {baseline.name} is no number; check outputs and labels")
    limit = None if max_drop is None else max_drop * abs(baseline.value) if relative else max_drop
    if not math.isfinite(candidate.value):
        answer = WORSE if limit is None else NOT_MET
        return _verdict(baseline, answer, _Difference(math.inf, math.inf, math.inf, None, None, ""), None)
    found = _difference(baseline, candidate, seed)
    needed = None
    if limit is not None and limit > NO_LIMIT and found.variance is not None:
        needed = math.ceil((Z_95 + Z_POWER_80) ** 2 * found.variance / limit**2)
    return _verdict(baseline, _answer(found, limit), found, needed)


def unchanged(score: Score, max_drop: float | None) -> Verdict:
    """The verdict where every output of every sample is the very same: there is nothing that more samples would tell."""
    found = _Difference(0.0, 0.0, 0.0, None, 1.0, "equal outputs")
    return _verdict(score, _answer(found, max_drop), found, None)


@dataclass(frozen=True)
class _Difference:
    """How much worse, with its interval, the variance of one sample's difference, and the test of none."""

    drop: float
    low: float
    high: float
    variance: float | None
    p_value: float | None
    test: str


def _verdict(score: Score, answer: str, found: _Difference, needed: int | None) -> Verdict:
    return Verdict(
        answer,
        found.drop,
        found.low,
        found.high,
        score.samples,
        needed,
        metric=score.name,
        is_share=score.is_share,
        p_value=found.p_value,
        test=found.test,
    )


def _answer(found: _Difference, limit: float | None) -> str:
    if math.isnan(found.low):
        return UNKNOWN
    if limit is not None:
        return MET if found.high <= limit else NOT_MET if found.low > limit else UNKNOWN
    if found.p_value is None or found.p_value >= NOISE:
        return WITHIN_NOISE
    return WORSE if found.drop > 0 else BETTER


def _difference(baseline: Score, candidate: Score, seed: int) -> _Difference:
    import numpy as np

    if baseline.is_right_or_wrong and candidate.is_right_or_wrong:
        return _of_flips(baseline, candidate)
    drop = baseline.worse_by(candidate)
    unknown = _Difference(drop, math.nan, math.nan, None, None, "")
    if baseline.samples < MIN_SAMPLES:
        return unknown
    sign = 1 if baseline.higher_is_better else -1
    if baseline.values is not None and candidate.values is not None:
        each = sign * (baseline.values.astype(np.float64) - candidate.values.astype(np.float64))
        variance = float(each.var(ddof=1))
        if variance == 0:
            return _unmoved(baseline, drop)
        means = _means(each, baseline.resamples, seed)
        return _Difference(drop, *_bca(each, means), variance, _p_value(means, drop), "paired bootstrap")
    both = _resample(baseline, candidate, seed)
    if both is None:
        return unknown
    change = sign * (both[0] - both[1])
    variance = float(change.var(ddof=1)) * baseline.samples
    if variance == 0:
        return _unmoved(baseline, drop)
    low, high = _quantiles(change)
    return _Difference(drop, low, high, variance, _p_value(change, drop), "paired bootstrap")


def _of_flips(baseline: Score, candidate: Score) -> _Difference:
    """Wald's interval for paired shares (Agresti, Categorical Data Analysis, section 11.1), at least one flip assumed.

    Connor (1987) gives the samples that are needed from the share of samples that flip.
    """
    assert baseline.values is not None
    assert candidate.values is not None
    n = baseline.samples
    lost = int((baseline.values & ~candidate.values).sum())
    gained = int((~baseline.values & candidate.values).sum())
    drop, flips = (lost - gained) / n, (lost + gained) / n
    spread = Z_95 * math.sqrt(max(flips - drop**2, 1 / n) / n)
    p_value = mcnemar(lost, gained)
    return _Difference(drop, drop - spread, drop + spread, max(flips, 1 / n), p_value, "McNemar exact")


def _unmoved(score: Score, drop: float) -> _Difference:
    """No sample's contribution changed: as wide as one flip where a flip has a size, else exactly none."""
    spread = Z_95 / score.samples if score.is_share and drop == 0 else 0.0
    return _Difference(
        drop, drop - spread, drop + spread, 1 / score.samples, 1.0 if drop == 0 else 0.0, "paired bootstrap"
    )


def _draws(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n samples stands in each draw, (draws, n), in chunks of bounded memory."""
    import numpy as np

    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        yield generator.multinomial(n, np.full(n, 1 / n), size=min(_CHUNK, resamples - start))


def _means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    import numpy as np

    exact = values.astype(np.float64)
    found: np.ndarray = np.concatenate([counts @ exact for counts in _draws(len(exact), resamples, seed)])
    return found / len(exact)


def _resample(first: Score, second: Score, seed: int) -> np.ndarray | None:
    """Both figures in the same draws, (2, draws); None where a figure cannot be weighed."""
    import numpy as np

    resamples = min(first.resamples, second.resamples)
    if first.weigh is None or second.weigh is None or resamples == 0:
        return None
    rows = []
    for counts in _draws(first.samples, resamples, seed):
        for row in counts.astype(np.float64):
            one = first.weigh(row)
            rows.append((one, one if second is first else second.weigh(row)))
    found = np.asarray(rows, np.float64).T
    kept = found[:, np.isfinite(found).all(0)]  # a draw without any object has no mAP, one label has no R2
    return kept if kept.shape[1] >= resamples / 2 else None


def _quantiles(drawn: np.ndarray) -> tuple[float, float]:
    import numpy as np

    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def _p_value(drawn: np.ndarray, drop: float) -> float:
    """Two-sided: how often draws around none are as far away as `drop` (Efron and Tibshirani 1993, section 16.4)."""
    import numpy as np

    far = int((np.abs(drawn - drop) >= abs(drop) - 1e-12 * abs(drop)).sum())
    return (far + 1) / (len(drawn) + 1)


def _bca(values: np.ndarray, drawn: np.ndarray) -> tuple[float, float]:
    """The BCa interval of a mean from its bootstrap draws (Efron 1987, section 3 and equation 6.6)."""
    import numpy as np

    exact = values.astype(np.float64)
    mean, resamples = float(exact.mean()), len(drawn)
    centred = exact - mean
    spread = float((centred**2).sum())
    if spread == 0:
        return mean, mean
    normal = NormalDist()
    below = float((drawn < mean).sum() + 0.5 * (drawn == mean).sum()) / resamples
    bias = normal.inv_cdf(min(max(below, 0.5 / resamples), 1 - 0.5 / resamples))
    # The mean without sample i moves by centred[i] / (n - 1), so the jackknife needs no loop.
    acceleration = float((centred**3).sum()) / (6 * spread**1.5)
    ends = []
    for z in (-Z_95, Z_95):
        shifted = bias + (bias + z) / (1 - acceleration * (bias + z))
        ends.append(float(np.quantile(drawn, normal.cdf(shifted))))
    return ends[0], ends[1]
