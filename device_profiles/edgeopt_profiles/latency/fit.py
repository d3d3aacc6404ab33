# SPDX-License-Identifier: Apache-2.0
"""Fit what a unit of work costs, from latencies: few of them a device, so devices lend each other their proportions.

A latency is a sum over `FEATURES` of work times cost. Costs are fitted as logarithms, on relative errors:
- Within a group (one device, runtime, precision, unit and number of threads) costs are drawn to the mean proportions
  of all groups of the same kind, each by `SPREAD`; how fast the device is as a whole is drawn to nothing.
- The mean proportions are the mean of the fitted groups (expectation-maximization with fixed variances: a
  hierarchical model, Gelman et al., Bayesian Data Analysis, chapter 5), so a group with one latency has a fit too.
- Residuals beyond `ROBUST` count linearly (Huber 1964): a throttled board does not bend the fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
else:
    Array = Any

NOISE, SPREAD, SCALE = 0.1, 0.7, 4.0
"""Standard deviations, as natural logarithms: of one latency, of one cost between groups, of a device's speed."""
ROBUST = 2.0
ROUNDS, STEPS = 6, 12
START_MS = (0.05, 4.0, 0.1, 0.05, 0.05, 0.1, 0.05, 0.2, 0.2)
"""Where the proportions begin: milliseconds a unit of each of `FEATURES`; only their ratios matter."""
LIMIT = 3.0


@dataclass(frozen=True)
class Group:
    """Latencies in ms (n,) of works (n, features) in one group; `kind` says whose proportions it shares."""

    kind: str
    work: Array
    latency_ms: Array


def fit_groups(groups: Mapping[str, Group]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Fit all groups: log costs of each group, and the mean log proportions of each kind."""
    import numpy as np

    means = {group.kind: np.log(np.array(START_MS)) for group in groups.values()}
    costs: dict[str, Array] = {}
    for _ in range(ROUNDS):
        costs = {
            name: fit_one(group.work, group.latency_ms, means[group.kind], start=costs.get(name))
            for name, group in groups.items()
        }
        for kind in means:
            members = [(costs[name], len(group.work)) for name, group in groups.items() if group.kind == kind]
            means[kind] = _mean(members)
    return costs, means


def fit_one(work: Array, latency_ms: Array, mean: Array, *, start: Array | None = None) -> Array:
    """The log costs of one group, drawn to `mean` in all but the device's speed.

    Args:
        work: Features of each latency, (n, features); n may be 1.
        latency_ms: Latencies, (n,), positive.
        mean: Log costs of the kind, (features,).
        start: Log costs to begin with.
    """
    import numpy as np

    precision = _precision(len(mean))
    log = np.log(latency_ms)
    if start is None:
        start = mean + np.median(log - np.log(work @ np.exp(mean)))
    theta = start.copy()
    for _ in range(STEPS):
        cost = np.exp(theta)
        predicted = work @ cost
        residual = log - np.log(predicted)
        weight = np.minimum(1.0, ROBUST * NOISE / np.maximum(np.abs(residual), 1e-9)) / NOISE**2
        slope = work * cost / predicted[:, None]
        gradient = slope.T @ (weight * residual) - precision @ (theta - mean)
        step = np.linalg.solve((slope.T * weight) @ slope + precision, gradient)
        largest = float(np.abs(step).max())
        theta = theta + step * min(1.0, 1.0 / max(largest, 1e-12))
        if largest < 1e-5:
            break
    found: Array = theta
    return found


def predict_ms(work: Array | Sequence[float], costs: Array) -> Array:
    """Latencies in ms of works (n, features) or (features,)."""
    import numpy as np

    found: Array = np.asarray(work) @ np.exp(costs)
    return found


def _precision(count: int) -> Array:
    """The inverse covariance of log costs around the mean: one speed for all, and each its own deviation."""
    import numpy as np

    covariance = SPREAD**2 * np.eye(count) + SCALE**2
    found: Array = np.asarray(np.linalg.inv(covariance), np.float64)
    return found


def _mean(members: Sequence[tuple[Array, int]]) -> Array:
    """The mean of log proportions, each group brought to the same speed first and weighed by what it knows.

    Drawn to where the proportions began, as by one group more, so that what nobody measured stays there.
    """
    import numpy as np

    start = np.log(np.array(START_MS))
    level = start.mean()
    shifted: list[Array] = [theta - theta.mean() + level for theta, _ in members]
    weight = np.array([min(count, 20) / 20 for _, count in members])
    found: Array = (start + (weight[:, None] * np.array(shifted)).sum(axis=0)) / (1 + weight.sum())
    return found
