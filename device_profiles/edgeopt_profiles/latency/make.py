# SPDX-License-Identifier: Apache-2.0
"""Make `coefficients.toml` from published latencies: `EDGEOPT_DATA=... python -m edgeopt_profiles.latency.make`.

Kept are the groups of boards that have a profile, the proportions and speeds of every kind, and how far each way of
estimating errs (`tests/benchmarks/estimator.py` prints that beside the linear model).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from edgeopt_profiles.latency.boards import BOARDS
from edgeopt_profiles.latency.evidence import FEW_MODELS, WAYS, Fitted, Key, Residual, collect, residuals
from edgeopt_profiles.latency.fit import Array
from edgeopt_profiles.latency.published import Row, read
from edgeopt_profiles.latency.table import FILE, SHARE

HEAD = """\
# What a unit of work costs, in ms, fitted to published latencies. Made by `python -m edgeopt_profiles.latency.make`;
# do not edit. Costs are of: one inference, 1000 operators, then millions of multiply-accumulates of first convolutions,
# dense, 1x1, depthwise, matrix products, then millions of elements of activations and of weights (work.py, FEATURES).
"""


def quantiles(found: Sequence[Residual], share: float = SHARE) -> tuple[float, float]:
    """The middle `share` of log ratios, each device weighing as much as any other: (low, high).

    Few boards say little of the next one: the share is raised by one board's part, as conformal prediction does it
    (Angelopoulos and Bates 2021, section 1).
    """
    import numpy as np

    values = np.array([entry.log_ratio for entry in found])
    devices = [entry.key.device for entry in found]
    share = min(share * (1 + 1 / len(set(devices))), 1.0)
    weight = np.array([1 / devices.count(device) for device in devices])
    order = np.argsort(values)
    reached = (np.cumsum(weight[order]) - weight[order] / 2) / weight.sum()
    low, high = np.interp([(1 - share) / 2, (1 + share) / 2], reached, values[order])
    return float(low), float(high)


def write(rows: Sequence[Row]) -> str:
    """The table as TOML."""
    groups = collect(rows)
    fitted = Fitted.of(groups)
    lines = [HEAD]
    lines.extend(_kinds(fitted, groups))
    lines.extend(_residuals(residuals(rows)))
    for key, entries in groups.items():
        if BOARDS[key.device].profile and len({row.model for row in entries}) >= FEW_MODELS:
            lines.extend(_group(key, entries, fitted.costs[key]))
    return "\n".join(lines)


def _kinds(fitted: Fitted, groups: Mapping[Key, Sequence[Row]]) -> Iterator[str]:
    import numpy as np

    for kind, mean in fitted.means.items():
        boards = {key.device for key in groups if key.kind == kind}
        yield (
            f"[kinds.{kind}]\nboards = {len(boards)}\ncosts = {_numbers(np.exp(mean))}\n"
            f"speed = {_numbers(fitted.speeds[kind])}\n"
        )


def _residuals(found: Sequence[Residual]) -> Iterator[str]:
    for way in WAYS:
        of = [entry for entry in found if entry.way == way]
        low, high = quantiles(of)
        yield f"[residuals.{way}]\nlow = {low:.3f}\nhigh = {high:.3f}\nrows = {len(of)}\n"


def _group(key: Key, rows: Sequence[Row], costs: Array) -> Iterator[str]:
    import numpy as np

    macs = [sum(row.work[2:7]) for row in rows]
    sources = sorted({row.source.split(" ")[0] for row in rows})
    yield (
        f'[[groups]]\ndevice = "{BOARDS[key.device].profile}"\nruntime = "{key.runtime}"\n'
        f'number = "{key.number}"\nthreads = {key.threads}\nrows = {len(rows)}\n'
        f"models = {len({row.model for row in rows})}\nmacs_m = [{min(macs):.3g}, {max(macs):.3g}]\n"
        f"costs = {_numbers(np.exp(costs))}\nsources = [{', '.join(_quoted(sources))}]\n"
    )


def _numbers(values: Iterable[float]) -> str:
    return f"[{', '.join(f'{value:.3g}' for value in values)}]"


def _quoted(texts: Iterable[str]) -> list[str]:
    return [f'"{text}"' for text in texts]


def main() -> None:
    """Read EDGEOPT_DATA and replace the table."""
    folder = os.environ.get("EDGEOPT_DATA", "")
    if not folder:
        sys.exit("set EDGEOPT_DATA to the folder that holds devices/latency_core.csv")
    text = write(read(Path(folder)))
    FILE.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{FILE}: {len(text)} bytes\n")


if __name__ == "__main__":
    main()
