# SPDX-License-Identifier: Apache-2.0
"""Rules of runtimes, one module each: which operators run where they should, and why the others do not.

A module offers `place(operators) -> Placement`. It looks at values only, so it needs neither the board nor the
vendor's compiler. What depends on an operator's attributes (strides, axes, dilations) is not seen here; each module
says which rules it cannot check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

from edgeopt_profiles.operators import Operator
from edgeopt_wire import seam


class LeftOut(NamedTuple):
    """An operator that runs elsewhere or in other numbers, and why."""

    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class Placement:
    """Names of the operators that run as the target wants, and the others, both in the order of the model.

    For an accelerator the others run on the CPU; for a CPU runtime they compute in floats.
    """

    on_accelerator: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


class Support(Protocol):
    """What a module of this folder offers."""

    def place(self, operators: Sequence[Operator]) -> Placement:
        """Sort the operators of one model, in the order in which they run."""
        ...


def sort_out(operators: Sequence[Operator], why_left_out: Callable[[Operator], str]) -> Placement:
    """Sort operators by a rule that gives the reason against one, or nothing where it runs as the target wants."""
    kept, left = [], []
    for operator in operators:
        if reason := why_left_out(operator):
            left.append(LeftOut(operator.name, operator.type, reason))
        else:
            kept.append(operator.name)
    return Placement(tuple(kept), tuple(left))


def names() -> tuple[str, ...]:
    """List the runtimes and accelerators whose rules are known."""
    return seam.names(__name__)


def find(name: str) -> Support:
    """Return the rules called `name`.

    Raises:
        RecipeError: There are none.
    """
    return cast("Support", seam.load(__name__, name))
