# SPDX-License-Identifier: Apache-2.0
"""Evidence: published rows as the groups that a device's estimate is made from, and how far each way of estimating errs.

Versions of a runtime, and unsigned and signed 8 bits, are one group: what a user installs is none of the published
versions, so what they differ by belongs into the interval.

Only CPUs: of the accelerators that have a profile one network each is published (ResNet-50 on TensorRT), and one network's
latency says nothing of another's there (MobileNetV2 reaches a third to a seventh of ResNet-50's rate).

A way of estimating (`WAYS`) is judged where it never saw the network's family: MobileNetV2 is estimated from groups
without any MobileNetV2, of whatever width or resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeopt_profiles.latency.architectures import family
from edgeopt_profiles.latency.boards import BOARDS, descriptors
from edgeopt_profiles.latency.fit import Group, fit_groups, predict_ms
from edgeopt_profiles.latency.published import Row, number

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
else:
    Array = Any

WAYS = ("runtime", "device", "kind")
"""From the same runtime on this device; from its other runtimes; from other devices by cores and clock."""

RUNTIMES = {"tflite": "litert", "xnnpack": "litert"}
FEW_MODELS = 3
RIDGE = 0.3
"""How far each descriptor's weight is drawn to what peak arithmetic says (cores and clock: -1, others: none)."""
EXPECTED = (0.0, -0.8, -1.0, -0.3, -0.2)


@dataclass(frozen=True)
class Key:
    """One group: `number` is float32, float16 or int8, `threads` 0 where all cores of the device were used."""

    device: str
    runtime: str
    number: str
    threads: int

    @property
    def kind(self) -> str:
        """Whose proportions it shares."""
        return f"cpu-{self.number}"


def key_of(row: Row) -> Key | None:
    """The group of a row, or None where it says nothing here: efficiency cores, delegates that fell back."""
    board = BOARDS.get(row.device)
    if (
        board is None
        or not row.unit.startswith("cpu")
        or any(word in row.unit for word in ("little", "falls back"))
    ):
        return None
    kind = number(row.precision)
    if kind == "float":
        is_half = row.precision.startswith("fp16") and board.has_half_floats
        kind = "float16" if is_half else "float32"
    runtime = row.runtime.split("-")[0].split(" ")[0]
    asked = int(float(row.threads)) if row.threads else 0
    threads = 0 if asked >= board.cores else asked
    return Key(row.device, RUNTIMES.get(runtime, runtime), kind, threads)


def collect(rows: Sequence[Row]) -> dict[Key, list[Row]]:
    """Rows by group."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        key = key_of(row)
        if key is not None:
            found.setdefault(key, []).append(row)
    return found


@dataclass(frozen=True)
class Fitted:
    """Log costs of every group and of every kind, and how the speed of CPUs follows `descriptors`."""

    costs: Mapping[Key, Array]
    means: Mapping[str, Array]
    speeds: Mapping[str, Array]

    @classmethod
    def of(cls, groups: Mapping[Key, Sequence[Row]]) -> Fitted:
        """Fit everything to these rows."""
        import numpy as np

        names = {str(number): key for number, key in enumerate(groups)}
        costs, means = fit_groups(
            {
                name: Group(
                    key.kind,
                    np.array([row.work for row in groups[key]]),
                    np.array([row.latency_ms for row in groups[key]]),
                )
                for name, key in names.items()
            }
        )
        found = {key: costs[name] for name, key in names.items()}
        return cls(found, means, {kind: _speed(kind, found, mean) for kind, mean in means.items()})

    def estimate(self, way: str, key: Key, work: Sequence[float]) -> float | None:
        """Milliseconds by one way, or None where it has nothing to go by."""
        import numpy as np

        if way == "runtime":
            return float(predict_ms(work, self.costs[key])) if key in self.costs else None
        if way == "device":
            others = self.others(key)
            logs = [np.log(predict_ms(work, self.costs[other])) for other in others]
            return float(np.exp(np.mean(logs))) if logs else None
        board = BOARDS[key.device]
        if key.kind not in self.speeds:
            return None
        speed = float(self.speeds[key.kind] @ described(key, board.cores))
        return float(predict_ms(work, self.means[key.kind] + speed))

    def others(self, key: Key) -> list[Key]:
        """Groups of the same device with another runtime."""
        same = (key.device, key.number, key.threads)
        return [
            other
            for other in self.costs
            if (other.device, other.number, other.threads) == same and other.runtime != key.runtime
        ]


def described(key: Key, cores: int) -> Array:
    """The descriptors of a group's CPU with as many threads as it used."""
    import numpy as np

    board = BOARDS[key.device]
    return np.array(
        descriptors(
            key.threads or cores,
            board.mhz,
            dot_products=board.has_dot_products,
            half_floats=board.has_half_floats,
        )
    )


def _speed(kind: str, costs: Mapping[Key, Array], mean: Array) -> Array:
    """Ridge regression of how fast groups are on what their CPUs are, each device weighing as much as any other."""
    import numpy as np

    keys = [key for key in costs if key.kind == kind]
    if not keys:
        return np.array(EXPECTED)
    count = {key: sum(other.device == key.device for other in keys) for key in keys}
    weight = np.array([1.0 / count[key] for key in keys])
    design = np.array([described(key, BOARDS[key.device].cores) for key in keys])
    level = np.array([float((costs[key] - mean).mean()) for key in keys])
    expected = np.array(EXPECTED)
    drawn = np.diag([1e-6, *[RIDGE] * (len(EXPECTED) - 1)])
    step = np.linalg.solve(
        (design.T * weight) @ design + drawn, (design.T * weight) @ (level - design @ expected)
    )
    found: Array = expected + step
    return found


@dataclass(frozen=True)
class Residual:
    """One estimate against what was published: `log_ratio` is the logarithm of estimate over latency."""

    way: str
    key: Key
    row: Row
    log_ratio: float


def residuals(
    rows: Sequence[Row], hold: Callable[[Row], str] = lambda row: family(row.model)
) -> list[Residual]:
    """Errors of every way, each row estimated without rows that `hold` says the same of."""
    found: list[Residual] = []
    for held in sorted({hold(row) for row in rows}):
        groups = collect([row for row in rows if hold(row) != held])
        tests = collect([row for row in rows if hold(row) == held])
        found.extend(_tested(groups, tests, ("runtime", "device")))
        for device in sorted({key.device for key in tests}):
            elsewhere = {key: entries for key, entries in groups.items() if key.device != device}
            there = {key: entries for key, entries in tests.items() if key.device == device}
            found.extend(_tested(elsewhere, there, ("kind",)))
    return found


def _tested(
    groups: Mapping[Key, Sequence[Row]], tests: Mapping[Key, Sequence[Row]], ways: Sequence[str]
) -> Iterator[Residual]:
    import numpy as np

    fitted = Fitted.of(groups)
    for key, entries in tests.items():
        for way in ways:
            if way == "runtime" and len({row.model for row in groups.get(key, ())}) < FEW_MODELS:
                continue
            for row in entries:
                found = fitted.estimate(way, key, row.work)
                if found is not None:
                    yield Residual(way, key, row, float(np.log(found / row.latency_ms)))
