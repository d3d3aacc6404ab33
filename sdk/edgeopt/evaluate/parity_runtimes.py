# SPDX-License-Identifier: Apache-2.0
"""The same integers in several runtimes: how far their outputs are apart, in the unit of the output.

Rules:
- Two files carry the same integers where at least `SAME` of their int8 weights are equal. The rest are channels with hardly
  any weight, whose scale ONNX Runtime's quantizer widens so that the bias fits 32 bits (EfficientNet-Lite0: 0.08 %).
- What is apart then is the runtimes' own doing: how sums and averages are rounded, and the grids of activations and
  outputs, which formats choose for themselves.
- Outputs are those of the whole evaluation, one thread each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from edgeopt.evaluate.parity import Difference, compare_models
from edgeopt.integers import int8_weights, share_of_same
from edgeopt_wire.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.artifacts import Made
    from edgeopt.evaluate.outputs import Outputs
    from edgeopt.plan import Artifact

SAME = 0.99


@dataclass(frozen=True)
class Entry:
    """One integer file: its artifact's name, the runtime that ran it, its weights and what it said."""

    name: str
    runtime: str
    weights: tuple[np.ndarray, ...]
    outputs: Outputs
    specs: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True)
class RuntimePair:
    """Two files in two runtimes; `same_weights` is the share of int8 weights that are equal.

    One difference an output, SQNR with the first as the signal; none where the files carry other integers.
    """

    first: str
    second: str
    same_weights: float
    samples: int = 0
    differences: tuple[Difference, ...] = ()

    @property
    def is_same(self) -> bool:
        """Whether both carry the same integers."""
        return self.same_weights >= SAME


def compare_files(
    artifacts: Sequence[Artifact], made: Mapping[str, Made], outputs: Mapping[str, Outputs]
) -> tuple[RuntimePair, ...]:
    """Compare every two int8 files of a build that were run here in different runtimes."""
    wanted = [
        artifact for artifact in artifacts if artifact.precision.startswith("int8") and artifact.id in outputs
    ]
    if len({artifact.runtime for artifact in wanted}) < 2:
        return ()
    files = {artifact.id: made[artifact.id] for artifact in wanted}
    return compare_runtimes(
        [
            Entry(
                artifact.id,
                artifact.runtime,
                int8_weights(files[artifact.id].model()),
                outputs[artifact.id],
                files[artifact.id].description.outputs,
            )
            for artifact in wanted
        ]
    )


def compare_runtimes(entries: Sequence[Entry]) -> tuple[RuntimePair, ...]:
    """Compare every two files of different runtimes, in the order in which they are given."""
    pairs = [(one, two) for one, two in combinations(entries, 2) if one.runtime != two.runtime]
    return tuple(_pair(one, two) for one, two in pairs)


def _pair(one: Entry, two: Entry) -> RuntimePair:
    found = RuntimePair(one.name, two.name, _short(share_of_same(one.weights, two.weights)))
    if not found.is_same:
        return found
    parity = compare_models(one.outputs, two.outputs, one.specs, two.specs)
    return replace(
        found, samples=parity.samples, differences=tuple(_rounded(entry) for entry in parity.differences)
    )


def _rounded(difference: Difference) -> Difference:
    """Six digits, so that a signed report does not depend on the last bit."""
    figures: dict[str, Any] = {
        name: _short(value) for name, value in vars(difference).items() if isinstance(value, float)
    }
    return replace(difference, **figures)


def _short(value: float) -> float:
    return float(f"{value:.6g}")
