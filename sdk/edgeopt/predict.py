# SPDX-License-Identifier: Apache-2.0
"""A latency that was not measured: an estimate from published latencies of the device, always with an interval.

Rules:
- Four of five published latencies that the estimate had not seen lie in such an interval (tests/benchmarks/estimator.py
  prints that, and the errors beside `t0 + c * MACs`). It holds no promise for the fifth.
- No evidence, no figure: the reason is given instead. Published are convolutional nets in float and 8-bit integers, so
  transformers, recurrent nets and weights of 4 bits are refused, and so is what is far larger or smaller.
- An estimate never enters a manifest: a device measures itself.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgeopt.plan import Artifact, Candidate, Plan
from edgeopt_profiles.latency import table
from edgeopt_profiles.latency.work import FEATURES, features, work_of
from edgeopt_profiles.operators import Operator
from edgeopt_profiles.profile import HOST, DeviceProfile

MOSTLY = 0.5
"""From this share of multiply-accumulates in matrix products on, convolutional nets say nothing of a model."""

_RECURRENT = ("LSTM", "GRU", "RNN", "Loop", "Scan", "If", "UNIDIRECTIONAL_SEQUENCE_LSTM", "WHILE", "IF")
_NUMBERS = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int8-mixed": "int8"}


@dataclass(frozen=True)
class Estimate:
    """Nanoseconds of one inference, and the interval that holds four of five; `basis` says what it rests on.

    `way` is how (`edgeopt_profiles.latency.table`); `is_of_device` whether latencies of this very board are behind it.
    """

    latency_ns: int
    low_ns: int
    high_ns: int
    way: str
    basis: str
    sources: tuple[str, ...] = ()

    @property
    def is_of_device(self) -> bool:
        """Whether latencies of this very board are behind it."""
        return self.way != "kind"

    def sentence(self) -> str:
        """Such as "estimated 12 ms (8 to 19)", and what that rests on."""
        return f"{self.short()}, not measured; it rests on {self.basis}"

    def short(self) -> str:
        """Such as "estimated 12 ms (8 to 19)"."""
        return f"estimated {_ms(self.latency_ns)} ms ({_ms(self.low_ns)} to {_ms(self.high_ns)})"


@dataclass(frozen=True)
class Prediction:
    """An estimate, or why there is none."""

    estimate: Estimate | None
    reason: str = ""


def predictions(plan: Plan, operators: Mapping[str, Iterable[Operator]]) -> dict[str, Prediction]:
    """Estimate every candidate whose artifact's operators are given, by candidate; nothing for this very machine."""
    if plan.device.id == HOST:
        return {}
    return {
        candidate.id: predict(
            plan.device, candidate, plan.artifact(candidate.artifact), operators[candidate.artifact]
        )
        for candidate in plan.candidates
        if candidate.artifact in operators
    }


def foresee(plan: Plan, operators: Iterable[Operator]) -> dict[str, Prediction]:
    """Estimate what a build would make of a float model, before it is made: its integers are taken to be everywhere."""
    if plan.device.id == HOST:
        return {}
    entries = tuple(operators)
    return {
        candidate.id: predict(
            plan.device, candidate, plan.artifact(candidate.artifact), entries, is_planned=True
        )
        for candidate in plan.candidates
    }


def predict(
    device: DeviceProfile,
    candidate: Candidate,
    artifact: Artifact,
    operators: Iterable[Operator],
    *,
    is_planned: bool = False,
) -> Prediction:
    """Estimate how long one inference of an artifact takes on a device.

    Args:
        device: The profile; a family's figures are those of its default module.
        candidate: Runtime, threads and accelerator.
        artifact: Its precision; a mixed one is estimated operator by operator.
        operators: The artifact's (`edgeopt_converters.graph.of`), with shapes.
        is_planned: The operators are the float model's, and are taken to compute in the artifact's precision.
    """
    entries = tuple(operators)
    number = _NUMBERS.get(artifact.precision)
    if candidate.accelerator != "cpu":
        return Prediction(
            None,
            f"fewer than three networks are published on {candidate.accelerator} of this device, too few to rest on",
        )
    if number is None:
        return Prediction(None, f"no latency of {artifact.precision} is published that this could rest on")
    if reason := _unlike(entries):
        return Prediction(None, reason)
    asked = table.Asked(candidate.runtime, candidate.threads)
    work = {number: features(work_of(entries))} if is_planned else _by_number(entries, number)
    found = table.estimate(table.load(), device, asked, work)
    if isinstance(found, str):
        return Prediction(None, found)
    return Prediction(
        Estimate(
            round(found.ms * 1e6),
            round(found.low_ms * 1e6),
            round(found.high_ms * 1e6),
            found.way,
            found.basis,
            found.sources,
        )
    )


def speaks_for(device: DeviceProfile) -> bool:
    """Whether latencies of this machine say which of two files is faster on a device: the same instruction set."""
    return device.id == HOST or platform.machine() in device.architectures


def is_slower(own: Estimate, reference: Estimate) -> bool:
    """Whether one is slower with confidence: even at its best it is above the other at its worst."""
    return own.low_ns > reference.high_ns


def _unlike(operators: Sequence[Operator]) -> str:
    """Why published latencies say nothing of such a model, or nothing."""
    total = sum(operator.macs for operator in operators)
    if total == 0:
        return "the model's multiply-accumulates are not known: its shapes are not fixed"
    if odd := next((operator.type for operator in operators if operator.type in _RECURRENT), ""):
        return f"the published latencies are of convolutional nets, and this model has {odd} operators"
    if any(tensor.dtype == "int16" for operator in operators for tensor in operator.outputs):
        return "no latency with activations of 16 bits is published that this could rest on"
    products = sum(entry.macs for entry in work_of(operators) if entry.kind == "product")
    if products > MOSTLY * total:
        return (
            "the published latencies are of convolutional nets, and "
            f"{100 * products / total:.0f} % of this model's multiply-accumulates are in matrix products"
        )
    return ""


def _by_number(operators: Sequence[Operator], number: str) -> dict[str, tuple[float, ...]]:
    """Features by the numbers that operators compute in: what an int8 file leaves in floats costs what floats cost."""
    if number != "int8":
        return {number: features(work_of(operators))}
    left = [operator for operator in operators if operator.macs and "float" in operator.dtype]
    if not left:
        return {number: features(work_of(operators))}
    parts = {number: features(work_of(op for op in operators if not (op.macs and "float" in op.dtype)))}
    rest = features(work_of(left))
    parts["float32"] = tuple(
        0.0 if name == "overhead" else value for name, value in zip(FEATURES, rest, strict=True)
    )
    return parts


def _ms(nanoseconds: int) -> str:
    """Two digits: an estimate has no more."""
    value = float(f"{nanoseconds / 1e6:.2g}")
    return f"{value:g}"
