# SPDX-License-Identifier: Apache-2.0
"""Published latencies (`latency_core.csv`) as groups to fit: one device, runtime, precision, unit, number of threads.

The rows stay where they are (EDGEOPT_DATA); only what is fitted to them is part of the package.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeopt_profiles.latency.architectures import layers
from edgeopt_profiles.latency.work import features

FILE = "devices/latency_core.csv"


@dataclass(frozen=True)
class Row:
    """One published latency: p50 in ms where the source gives it, else its mean or least."""

    device: str
    model: str
    side: int
    precision: str
    runtime: str
    unit: str
    threads: str
    latency_ms: float
    macs_m: float
    source: str
    conditions: str
    work: tuple[float, ...]

    @property
    def group(self) -> str:
        """The group as it is published, versions of runtimes apart."""
        return f"{self.device} {self.runtime} {self.precision} {self.unit} {self.threads}"

    @property
    def kind(self) -> str:
        """Whose proportions it shares: kernels for a CPU, a GPU or an accelerator, in floats or integers."""
        unit = "cpu" if self.unit.startswith("cpu") else "gpu" if self.unit.startswith("gpu") else "npu"
        return f"{unit}-{number(self.precision)}"


def number(precision: str) -> str:
    """What a published precision computes in."""
    if precision in ("int8", "uint8", "w8a8"):
        return "int8"
    return "int16" if precision.startswith("w8a16") else "float"


def read(folder: Path) -> tuple[Row, ...]:
    """Rows of models whose layers are known, power-saving modes left out.

    Raises:
        OSError: `folder` has no such file.
    """
    with (folder / FILE).open(encoding="utf-8", newline="") as file:
        return tuple(_rows(csv.DictReader(file)))


def _rows(entries: Iterator[dict[str, str]] | csv.DictReader[str]) -> Iterator[Row]:
    for entry in entries:
        work = layers(entry["model"], _side(entry["input"]))
        if not work or "MaxQ" in entry["conditions"]:
            continue
        yield Row(
            entry["profile_device"],
            entry["model"],
            _side(entry["input"]),
            entry["precision"],
            entry["runtime"],
            entry["compute_unit"],
            entry["threads"],
            float(entry["latency_ms"]),
            float(entry["macs_m"]),
            entry["source"],
            entry["conditions"],
            features(work),
        )


def _side(shape: str) -> int:
    sizes = [int(text) for text in re.findall(r"\d+", shape)]
    if not sizes:
        return 224
    return Counter(sizes).most_common(1)[0][0] if len(sizes) > 1 else sizes[-1]


def grouped(rows: tuple[Row, ...], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows by a key, in the order of the file."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found
