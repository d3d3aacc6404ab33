# SPDX-License-Identifier: Apache-2.0
"""How often the integers that are predicted are those that the runtime gives, counted tensor by tensor.

Two statements, never mixed:
- *From the same inputs*: each piece of a model computes from integers that both are given. It tells whether the
  arithmetic is the runtime's.
- *Through the whole net*: both compute from the model's input on. Where a layer runs in floats (a softmax, a layer norm, a
  convolution without Q behind it) the runtime adds in an order of its own, a value now and then rounds to the other
  side, and later layers see that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Agreement:
    """Of `values` integers of a tensor, how many are `exact`ly the runtime's and how many `near`: at most one step off."""

    name: str
    values: int
    exact: int
    near: int

    @classmethod
    def count(cls, name: str, found: np.ndarray, expected: np.ndarray) -> Agreement:
        """Compare the integers of one tensor."""
        import numpy as np

        steps = np.abs(np.asarray(found, np.int64) - np.asarray(expected, np.int64))
        return cls(name, steps.size, int((steps == 0).sum()), int((steps <= 1).sum()))

    @property
    def near_share(self) -> float:
        """The share that is at most one step off, from 0 to 1."""
        return self.near / self.values if self.values else 1.0

    def sentence(self) -> str:
        """Such as "99.998 % exact, 100.000 % within one step (of 81920)"."""
        exact = self.exact / self.values if self.values else 1.0
        return f"{100 * exact:.3f} % exact, {100 * self.near_share:.3f} % within one step (of {self.values})"


def total(parts: Iterable[Agreement], name: str = "all") -> Agreement:
    """Add agreements up."""
    entries = tuple(parts)
    return Agreement(
        name,
        sum(entry.values for entry in entries),
        sum(entry.exact for entry in entries),
        sum(entry.near for entry in entries),
    )


def by_tensor(rounds: Iterable[Sequence[Agreement]]) -> tuple[Agreement, ...]:
    """Add the agreements of several samples up, tensor by tensor, in the order of the first."""
    found: dict[str, list[Agreement]] = {}
    for entries in rounds:
        for entry in entries:
            found.setdefault(entry.name, []).append(entry)
    return tuple(total(entries, name) for name, entries in found.items())
