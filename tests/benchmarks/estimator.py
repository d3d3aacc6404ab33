# SPDX-License-Identifier: Apache-2.0
"""How far estimated latencies are from published ones: leave one network out, leave one board out, and the linear model.

    EDGEOPT_DATA=... python tests/benchmarks/estimator.py

Every figure is of latencies that the estimate had not seen. "Inside" is the share of them that lie in the 80 % interval,
whose width comes from other networks' (or other boards') errors alone.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgeopt_profiles.latency.architectures import family
from edgeopt_profiles.latency.evidence import WAYS, Residual, residuals
from edgeopt_profiles.latency.fit import Group, fit_groups, predict_ms
from edgeopt_profiles.latency.make import quantiles
from edgeopt_profiles.latency.published import Row, grouped, read

FEW_GROUP = 5


def main() -> None:
    folder = os.environ.get("EDGEOPT_DATA", "")
    if not folder:
        sys.exit("set EDGEOPT_DATA to the folder that holds devices/latency_core.csv")
    rows = read(Path(folder))
    print(f"{len(rows)} published latencies of {len({row.model for row in rows})} networks\n")
    print("Groups as published (versions of runtimes apart); the same rows for both:")
    print(
        "| left out | rows | estimator | median | within 20 % | within 50 % | rank correlation in a group |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, hold in (
        ("network", lambda row: row.model),
        ("family of networks", lambda row: family(row.model)),
    ):
        ours, linear = compare(rows, hold)
        for label, found in (("this", ours), ("t0 + c * MACs", linear)):
            print(f"| {name} | {len(found)} | {label} | {summary(found)} |")
    print(
        "\nBy the way of estimating (groups as in the table of costs; the network's family always left out):"
    )
    print("| way | boards | rows | median | 80 % interval | inside, other families | inside, other boards |")
    print("|---|---|---|---|---|---|---|")
    found = residuals(rows)
    for way in WAYS:
        print(f"| {way} | {way_summary([entry for entry in found if entry.way == way])} |")


Estimates = list[tuple[Row, float]]


def compare(rows: tuple[Row, ...], hold: Callable[[Row], str]) -> tuple[Estimates, Estimates]:
    """Estimates of both models for every row, fitted without the rows that `hold` says the same of."""
    ours: Estimates = []
    linear: Estimates = []
    for held in sorted({hold(row) for row in rows}):
        train = grouped(tuple(row for row in rows if hold(row) != held), lambda row: row.group)
        groups = {name: as_group(entries) for name, entries in train.items()}
        costs, _ = fit_groups(groups)
        for row in rows:
            if hold(row) != held or row.group not in train or len({r.model for r in train[row.group]}) < 2:
                continue
            line = affine(train[row.group])
            expected = line[0] + line[1] * row.macs_m
            if expected > 0:
                ours.append((row, float(predict_ms(row.work, costs[row.group]))))
                linear.append((row, expected))
    return ours, linear


def as_group(rows: Sequence[Row]) -> Group:
    return Group(
        rows[0].kind, np.array([row.work for row in rows]), np.array([row.latency_ms for row in rows])
    )


def affine(rows: Sequence[Row]) -> tuple[float, float]:
    """t0 and c of `t0 + c * MACs`, neither negative, least squares of relative errors."""
    times = np.array([row.latency_ms for row in rows])
    design = np.stack([1 / times, np.array([row.macs_m for row in rows]) / times], axis=1)
    both, *_ = np.linalg.lstsq(design, np.ones(len(times)), rcond=None)
    if both.min() >= 0:
        return float(both[0]), float(both[1])
    alone = design.sum(axis=0) / np.square(design).sum(axis=0)
    errors = [np.square(design[:, axis] * alone[axis] - 1).sum() for axis in (0, 1)]
    return (float(alone[0]), 0.0) if errors[0] < errors[1] else (0.0, float(alone[1]))


def summary(found: Estimates) -> str:
    errors = np.array([abs(estimate / row.latency_ms - 1) for row, estimate in found])
    ranks = [
        spearman([estimate for _, estimate in entries], [row.latency_ms for row, _ in entries])
        for entries in grouped_estimates(found).values()
        if len({row.model for row, _ in entries}) >= FEW_GROUP
    ]
    return (
        f"{100 * np.median(errors):.1f} % | {100 * (errors < 0.2).mean():.0f} % | {100 * (errors < 0.5).mean():.0f} % | "
        f"{np.median(ranks):.3f}"
    )


def grouped_estimates(found: Estimates) -> dict[str, Estimates]:
    groups: dict[str, Estimates] = {}
    for row, estimate in found:
        groups.setdefault(row.group, []).append((row, estimate))
    return groups


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def way_summary(found: list[Residual]) -> str:
    errors = np.abs(np.expm1([entry.log_ratio for entry in found]))
    low, high = quantiles(found)
    families = inside(found, lambda entry: family(entry.row.model))
    boards = inside(found, lambda entry: entry.key.device)
    count = len({entry.key.device for entry in found})
    return (
        f"{count} | {len(found)} | {100 * np.median(errors):.0f} % | {np.exp(-high):.2f} to {np.exp(-low):.2f} times | "
        f"{shown(families)} | {shown(boards)}"
    )


def shown(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def inside(found: list[Residual], hold: Callable[[Residual], str]) -> float | None:
    """The share inside an interval made from the others' errors, each board weighing as much as any other."""
    kept: dict[str, list[bool]] = {}
    for held in {hold(entry) for entry in found}:
        others = [entry for entry in found if hold(entry) != held]
        if not others:
            return None
        low, high = quantiles(others)
        for entry in found:
            if hold(entry) == held:
                kept.setdefault(entry.key.device, []).append(low <= entry.log_ratio <= high)
    return float(np.mean([np.mean(values) for values in kept.values()]))


if __name__ == "__main__":
    main()
