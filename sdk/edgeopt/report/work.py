# SPDX-License-Identifier: Apache-2.0
"""What a build asked for, made and measured; everything that its report is written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgeopt.artifacts import Made
from edgeopt.attribute import Attribution
from edgeopt.coverage import Coverage
from edgeopt.plan import Candidate, Plan
from edgeopt.predict import Prediction
from edgeopt.validate import Validation
from edgeopt_wire.manifest import Manifest
from edgeopt_wire.measurement import Measurement

if TYPE_CHECKING:
    from edgeopt.mixed import Mixed
    from edgeopt.request import BuildRequest
    from edgeopt.sources import Source


@dataclass(frozen=True)
class Work:
    """What a build asked for, made and measured; everything that a report is written from."""

    request: BuildRequest
    plan: Plan
    made: Mapping[str, Made]
    source: Source
    manifest: Manifest
    validation: Validation
    measured: Mapping[str, Measurement]
    coverage: Mapping[str, Coverage] = field(default_factory=dict)
    attributions: Mapping[str, Attribution] = field(default_factory=dict)
    mixed: tuple[Mixed, ...] = ()
    predictions: Mapping[str, Prediction] = field(default_factory=dict)

    def prediction(self, candidate_id: str) -> Prediction:
        """What is estimated of a candidate on the device, or why nothing is."""
        return self.predictions.get(candidate_id, Prediction(None))


def reference_of(candidate: Candidate) -> str:
    """The float candidate of the same runtime with as many threads."""
    return f"{candidate.runtime}-fp32-{candidate.threads}t"


def times_faster(candidate: Candidate, measured: Mapping[str, Measurement]) -> float | None:
    """How much faster the median is than that of its float file; None where either was not timed."""
    own = measured.get(candidate.id)
    reference = measured.get(reference_of(candidate))
    if own is None or reference is None or own.timing is None or reference.timing is None:
        return None
    return round(reference.timing.p50_ns / own.timing.p50_ns, 3)
