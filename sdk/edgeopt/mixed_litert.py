# SPDX-License-Identifier: Apache-2.0
"""Mixed precision in LiteRT: levels and how a file with them is made are `litert_levels`'; here is what they cost in quality.

An operator's own error is measured with it in int8 and all others in floats, on real files in the real runtime: making
one takes a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from edgeopt import litert_ends
from edgeopt import litert_levels as levels
from edgeopt.artifacts import Adapted, Made
from edgeopt.litert_bias import with_biases_of
from edgeopt.ranges import Range
from edgeopt.search import Changes, Knob, rank_operators
from edgeopt.side_by_side import loaded
from edgeopt_wire.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    from edgeopt.recipe import Recipe

RANKED_SAMPLES = 8
"""On how many samples an operator's own error is measured."""

UNLESS_ASKED = ("int16", "int4")
"""Levels that are tried only where the recipe names them: 16-bit activations took 2 to 60 times as long as floats."""


@dataclass(frozen=True)
class LitertWorkshop:
    """Everything that making one try needs, set up once."""

    floats: bytes
    ranges: Mapping[str, Range]
    operators: Mapping[str, levels.Operator]
    knobs: tuple[Knob, ...]
    fixed: Mapping[str, str]
    """What is not int8 in the int8 file: its ends and norms, and what the recipe excludes."""

    def make(self, changes: Changes) -> bytes:
        """A file with these operators at these levels."""
        asked = {change.operator: change.level for change in changes}
        return levels.quantize(self.floats, self.ranges, {**self.fixed, **asked})

    def describe(self, name: str) -> str:
        """The type and number of an operator, which survive an export."""
        return self.operators[name].described

    def program(self, file: bytes) -> bytes:
        """A file as a model's program: the same bytes."""
        return file


def open_workshop(made: Made, samples: Adapted, recipe: Recipe) -> LitertWorkshop:
    """Set up for an int8 artifact: ranges read off it, operators ranked by their own error.

    Raises:
        RecipeError: The artifact was not made from a float model.
    """
    if made.base is None:
        raise RecipeError(f"{made.artifact.id} was not made from a float model; nothing can be searched")
    floats = made.base.read_bytes()
    ranges = levels.read_ranges(made.file.read_bytes())
    operators = {operator.name: operator for operator in levels.operators(floats)}
    fixed = levels.read_levels(floats, made.file.read_bytes())
    layers = [name for name, level in fixed.items() if level == levels.DYNAMIC]
    corrected = with_biases_of(floats, made.file.read_bytes(), layers)
    names = tuple(name for name in operators if fixed.get(name) != litert_ends.FLOATS)
    errors = _errors(floats, ranges, {name: fixed.get(name, levels.INT8) for name in names}, samples, made)
    knobs = _knobs(floats, rank_operators(names, errors), operators, fixed, recipe)
    return LitertWorkshop(corrected, ranges, operators, knobs, fixed)


def _errors(
    floats: bytes, ranges: Mapping[str, Range], usual: Mapping[str, str], samples: Adapted, made: Made
) -> list[tuple[str, float]]:
    import numpy as np

    rows = list(islice(samples, RANKED_SAMPLES))

    def outputs(file: bytes) -> np.ndarray:
        with loaded(
            file, made.artifact.runtime, made.description.inputs, made.description.outputs
        ) as session:
            found = [np.concatenate([array.ravel() for array in session.run(row).values()]) for row in rows]
        return np.stack(found).astype(np.float64)

    exact = outputs(floats)
    known = [operator.name for operator in levels.operators(floats)]
    found = []
    for name, level in usual.items():
        alone = {**dict.fromkeys(known, litert_ends.FLOATS), name: level}
        error = outputs(levels.quantize(floats, ranges, alone)) - exact
        found.append((name, float(np.square(error).sum())))
    return found


def _knobs(
    floats: bytes,
    order: Sequence[str],
    operators: Mapping[str, levels.Operator],
    fixed: Mapping[str, str],
    recipe: Recipe,
) -> tuple[Knob, ...]:
    from edgeopt_converters.litert_graph import operators as graph_operators

    known = {operator.name: operator for operator in graph_operators(floats)}
    asked = recipe.search.levels
    found = []
    for name in order:
        is_product = operators[name].type in levels.PRODUCTS
        every = ("int16", "fp32", "fp16") if is_product else ("int16", "fp32")
        tried = (
            frozenset(asked) if name not in fixed else frozenset[str]()
        )  # what reads and writes floats has no grids
        above = tuple(level for level in every if level not in UNLESS_ASKED or level in tried)
        below = tuple(
            level for level in ("int4",) if operators[name].type in levels.FOUR_BITS and level in tried
        )
        found.append(Knob(name, above, below, known[name].macs, known[name].weight_bytes // 4))
    return tuple(found)
